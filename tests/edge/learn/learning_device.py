"""A device that may learn at home, with a scripted learner in the place of MLX, for tests of everything around it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from clawloop_edge.errors import LearnFailed, NotLearnable
from clawloop_edge.learn.choosing import Chooser
from clawloop_edge.learn.desk import Desk
from clawloop_edge.learn.going import Place
from clawloop_edge.learn.job import Job, Learned
from clawloop_edge.learn.power import Power
from clawloop_edge.learn.release import Releaser
from clawloop_edge.learn.runs import Runs, prepare
from clawloop_edge.learn.schedule import Schedule
from clawloop_edge.learn.settings import LearnSettings
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import curating
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.forget import Forgetter, Wanted
from clawloop_edge.privacy.ledger import Ledger
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared.deltas import LearnTask, Method, delta_shapes
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.records import Channel, Policy, Sampling, Signal, Step, Target
from clawloop_shared.rows import Limits

SHAPE = ModelShape(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=100,
)
WEIGHTS_SHA256 = "ab" * 32
SERVED = Policy("line", 3, WEIGHTS_SHA256)
KEY = bytes(range(32))
CANARY = [61, 62, 63, 64, 65, 66, 67, 68]
"""prompt ids of what must not be found in any file"""


def learn_task(**fields: Any) -> LearnTask:
    """A task for the adapter that is served; `fields` replace its own."""
    own: dict[str, Any] = {
        "task_id": new_id(),
        "line_id": SERVED.line,
        "base_version": SERVED.version,
        "weights_sha256": SERVED.adapter_sha256,
        "method": Method.FFA,
        "rank": 4,
        "alpha": 8.0,
        "clip": 1.0,
        "updates": 3,
    }
    return LearnTask(**(own | fields))


def judged_step(session: str, *, level_app: str = "agent", **fields: Any) -> KeptStep:
    """A trainable step that the served adapter sampled."""
    step: dict[str, Any] = {
        "step_id": new_step_id(),
        "session_id": session,
        "run_id": f"run-{session}",
        "prompt_ids": CANARY,
        "response_ids": [7, 8, 9],
        "response_logprobs": [-0.25, -0.5, -0.125],
        "policy": SERVED,
        "sampling": Sampling(),
        "finish_reason": "stop",
        "created_ms": 1000,
    }
    said: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}],
        "reply": {"role": "assistant", "content": "hi"},
        "app": level_app,
        "started_ms": 1000,
        "finished_ms": 2000,
    }
    return KeptStep(step=Step(**(step | fields)), **said)


class ScriptedLearner:
    """Learns what a seed says, update by update. `wait` is called before each; `size` scales all factors."""

    def __init__(self, *, size: float = 0.01, wait: Callable[[int], None] = lambda _: None) -> None:
        self.size, self.wait = size, wait
        self.jobs: list[Job] = []
        self.resumed: list[bytes] = []
        self.set_aside: dict[str, str] = {}
        self.fails = self.hopeless = ""

    def learn(
        self,
        job: Job,
        *,
        go_on: Callable[[], bool],
        kept: bytes = b"",
        keep: Callable[[bytes], None] = lambda _: None,
        told: Callable[[int], None] = lambda _: None,
    ) -> Learned | None:
        """Factors of the task's own method and rank."""
        self.jobs.append(job)
        self.resumed.append(kept)
        if self.hopeless:
            raise NotLearnable(self.hopeless)
        if self.fails:
            raise LearnFailed(self.fails)
        for update in range(int(kept or b"0"), job.task.updates):
            self.wait(update)
            if not go_on():
                return None
            keep(str(update + 1).encode())
            told(update + 1)
        rng = np.random.default_rng(3)
        shapes = delta_shapes(job.task.target_modules, SHAPE, rank=job.rank, method=job.task.method)
        factors = {name: rng.normal(0, self.size, shape).astype(np.float32) for name, shape in shapes.items()}
        names = [one.trajectory_id for one in job.trajectories if one.trajectory_id not in self.set_aside]
        return Learned(
            weights=save(factors),
            trajectory_ids=names,
            set_aside=self.set_aside,
            reward=sum(one.reward for one in job.trajectories) / len(job.trajectories),
            updates=[{"loss": 0.5}] * job.task.updates,
        )


class LearningDevice:
    """Everything of one device that learns; the test moves its clock, its agent and its power."""

    def __init__(self, folder: Path, *, pool: Pool | None = None, epsilon: float = 8.0, **settings: Any) -> None:
        self.pool = pool or Pool.open(folder, KnownKey.of(KEY))
        prepare(self.pool)
        curating.adopt(self.pool)
        self.now_ms, self.idle_s, self.power, self.free_bytes, self.served = (
            1_000_000,
            1e9,
            Power.MAINS,
            1 << 40,
            SERVED,
        )
        self.settings = LearnSettings(**({"min_trajectories": 2, "check_every_s": 0.05} | settings))
        self.consent = ConsentLog(self.pool, clock=self.clock)
        self.outbox = Outbox(self.pool, self.consent, hold_s=0, clock=self.clock)
        self.ledger = Ledger(self.pool, epsilon=epsilon, clock=self.clock)
        self.runs, self.learner = Runs(self.pool), ScriptedLearner()
        self.chooser = Chooser(self.pool, self.consent, limits=Limits("line", SHAPE.vocab_size, 64))
        self.releaser = Releaser(
            self.pool,
            self.consent,
            self.ledger,
            shape=SHAPE,
            settings=self.settings,
            hold_ms=self.outbox.hold_ms,
            clock=self.clock,
        )
        self.done = threading.Event()
        place = Place(
            idle_s=lambda: self.idle_s,
            power=lambda: self.power,
            free_bytes=lambda: self.free_bytes,
            served=lambda: self.served,
            adapter=lambda policy: {"adapter_model.safetensors": b""},
            model=folder,
        )
        self.schedule = Schedule(
            self.runs,
            self.consent,
            self.chooser,
            self.releaser,
            self.learner,
            place=place,
            settings=self.settings,
            done=self.done.set,
            clock=self.clock,
        )
        self.desk = Desk(
            self.runs,
            self.consent,
            self.releaser,
            shape=SHAPE,
            settings=self.settings,
            served=lambda: self.served,
            state=lambda: self.schedule.status.state,
        )

    def clock(self) -> int:
        """What time it is."""
        return self.now_ms

    def keep(self, session: str, *, reward: float | None = 1.0, **fields: Any) -> Step:
        """One step, judged if there is a reward."""
        kept = judged_step(session, **fields)
        self.pool.keep_step(kept).result()
        if reward is not None:
            self.judge(kept.step, reward)
        return kept.step

    def judge(self, step: Step, value: float, *, target: Target = Target.STEP) -> None:
        """Its user's word on it."""
        names = {Target.STEP: step.step_id, Target.RUN: step.run_id, Target.SESSION: step.session_id}
        signal = Signal(
            signal_id=new_id(), target=target, target_id=names[target], source="user", value=value, created_ms=5
        )
        self.pool.keep_signal(signal).result()

    def keep_many(self, count: int, *, start: int = 0, **fields: Any) -> list[Step]:
        """So many judged steps, each of its own session."""
        return [self.keep(f"s{number}", **fields) for number in range(start, start + count)]

    def hold_out(self, session: str, reward: float) -> Step:
        """A judged step that is never learned from."""
        return self.keep(session, reward=reward, channel=Channel.VAL)

    def catch_up(self) -> None:
        """Follow all that is new."""
        while self.chooser.catch_up():
            pass

    def learn(self, task: LearnTask | None = None) -> LearnTask:
        """Take on a task and look once."""
        task = task or learn_task()
        reply = self.desk.offered(task)
        assert reply.accepted, reply.reason
        self.schedule.tick()
        return task

    def forget(self, *sessions: str) -> None:
        """Its owner's word."""
        forgetter = Forgetter(self.pool, [], clock=self.clock)
        forgetter.forget(forgetter.preview(Wanted(session_ids=sessions)))
        assert forgetter.finish() == []

    def set_level(self, level: Level) -> None:
        """Its owner's word on what may leave."""
        self.consent.set_level(level)

    def close(self) -> None:
        """Let go of the pool."""
        self.schedule.stop()
        self.pool.close()

"""From a task to the bytes that leave, through the parts as the edge puts them together."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clawloop_edge.config import EdgeConfig, PrivacyConfig
from clawloop_edge.errors import ConsentError
from clawloop_edge.gateway.drain import Drain
from clawloop_edge.handlers import Handlers
from clawloop_edge.home import EdgeHome
from clawloop_edge.learn.home import HomeLearning
from clawloop_edge.learn.settings import LearnSettings
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared import wire
from clawloop_shared.deltas import LoraDelta, delta_shapes
from clawloop_shared.ids import new_id
from clawloop_shared.levels import Level
from clawloop_shared.messages import StatusRequest, UploadRequest
from clawloop_shared.model_line import read_line, read_shape
from clawloop_shared.records import Policy, Signal, Target

from . import learning_device
from .learning_device import KEY, ScriptedLearner, judged_step, learn_task

WAIT_S = 30.0
CONFIG = EdgeConfig(
    learn=LearnSettings(min_trajectories=2, idle_s=0.0, check_every_s=0.05), privacy=PrivacyConfig(hold_s=0.0)
)


class Parts:
    """The parts of an edge that answer a server, around an engine that only says what it serves."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(learning_device, "SHAPE", read_shape(model))
        self.pool = Pool.open(folder, KnownKey.of(KEY))
        self.consent = ConsentLog(self.pool)
        self.outbox = Outbox(self.pool, self.consent, hold_s=0)
        line = read_line(model)
        self.engine: Any = SimpleNamespace(line=line, policy=Policy(line.line_id))
        self.drain = Drain(1.0)
        self.learning = HomeLearning(
            EdgeHome(folder),
            CONFIG,
            pool=self.pool,
            consent=self.consent,
            outbox=self.outbox,
            engine=self.engine,
            model=model,
            learner=ScriptedLearner(),
            idle_s=lambda: self.drain.idle_s,
            done=lambda: None,
            device_key=lambda: b"",
        )
        member: Any = SimpleNamespace(device_id="d", release_key=b"")
        nothing: Any = None
        self.handlers = Handlers(
            self.engine,
            self.outbox,
            consent=self.consent,
            member=member,
            activator=nothing,
            keep_cohort=lambda _: None,
            loop=nothing,
            tasks=self.learning.desk,
        )
        self.model = model

    def keep(self, session: str) -> None:
        """A judged step of the model that is served."""
        kept = judged_step(session, policy=self.engine.policy)
        self.pool.keep_step(kept).result()
        signal = Signal(
            signal_id=new_id(),
            target=Target.STEP,
            target_id=kept.step.step_id,
            source="user",
            value=1.0,
            created_ms=5,
        )
        self.pool.keep_signal(signal).result()

    def upload(self) -> list[Any]:
        """What leaves now."""
        return list(self.handlers.upload(UploadRequest(receipts=[], max_bytes=8 << 20)).items)

    def task(self, **fields: Any) -> Any:
        """A task for the base that is served."""
        return learn_task(line_id=self.engine.line.line_id, base_version=0, weights_sha256="", **fields)


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    found = Parts(tmp_path, tiny_model, monkeypatch)
    yield found
    found.learning.schedule.stop()
    found.pool.close()


def test_a_task_becomes_the_delta_that_the_next_upload_carries(parts: Parts) -> None:
    parts.consent.set_level(Level.PRIVATE_DELTAS)
    for session in ("a", "b"):
        parts.keep(session)
    parts.learning.schedule.start()
    task = parts.task()
    assert parts.handlers.learn(task).accepted
    until = time.monotonic() + WAIT_S
    while not parts.outbox.list() and time.monotonic() < until:
        time.sleep(0.01)
    (item,) = parts.outbox.list()
    shown = parts.outbox.get(item.item_id).body
    (given,) = parts.upload()
    assert given.body == shown
    delta = wire.decode(given.body, LoraDelta)
    assert (delta.task_id, delta.level, delta.trajectories) == (task.task_id, Level.PRIVATE_DELTAS, 2)
    shapes = delta_shapes(task.target_modules, read_shape(parts.model), rank=task.rank, method=task.method)
    assert item.delta is not None
    assert item.delta.parameters == sum(rows * columns for rows, columns in shapes.values())
    assert parts.learning.report()["state"] == "no task"


@pytest.mark.parametrize("level", [Level.METRICS, Level.REDACTED, Level.FULL])
def test_at_other_levels_the_task_is_refused_and_nothing_is_said_of_learning(parts: Parts, level: Level) -> None:
    parts.consent.set_level(level)
    reply = parts.handlers.learn(parts.task())
    assert not reply.accepted
    assert parts.handlers.status(StatusRequest()).learning == ""


def test_at_off_not_even_a_task_is_answered(parts: Parts) -> None:
    with pytest.raises(ConsentError):
        parts.handlers.learn(parts.task())


def test_the_server_is_told_in_a_word_where_learning_stands(parts: Parts) -> None:
    parts.consent.set_level(Level.DELTAS)
    assert parts.handlers.status(StatusRequest()).learning == "off"
    parts.learning.schedule.tick()
    assert parts.handlers.status(StatusRequest()).learning == "no task"
    parts.handlers.learn(parts.task())
    parts.learning.schedule.tick()
    assert parts.handlers.status(StatusRequest()).learning == "waiting"


def test_a_call_in_flight_is_not_idle_and_one_that_ended_is_counted_from_its_end() -> None:
    drain = Drain(1.0)
    assert drain.idle_s == float("inf")
    with drain:
        assert drain.idle_s == 0.0
        with drain:
            pass
        assert drain.idle_s == 0.0
    assert 0.0 <= drain.idle_s < WAIT_S

"""A real round on a real home, seen: its lines, its page, and its explanation on the command line."""

import json
import random
from collections.abc import Callable

import msgspec
import pytest
import tomli_w

from clawloop_server import cli
from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.hub.training import TrainerEar, round_line
from clawloop_server.release.keys import ServerKeys
from clawloop_server.trainer.observing import Observer, read_events
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Sampling, Signal, Step, StepBatch, Target

pytestmark = pytest.mark.filterwarnings("ignore:.*Click 9.0.*:DeprecationWarning")  # typer's own import of click

TRAIN = {"rank": 2, "batch_trajectories": 3, "updates_per_round": 2, "min_ess": 0.0, "min_kept": 0.0}
TASKS = [
    {"messages": [{"role": "user", "content": text}], "expect": {"calls": [], "answer_names": "x"}} for text in "ab"
]


@pytest.fixture
def trained(
    home: Home,
    keys: ServerKeys,
    base: Base,
    vault: Vault,
    device: str,
    make_step: Callable[..., Step],
    make_signal: Callable[..., Signal],
) -> Home:
    """A home on which a round ran that was watched."""
    rng = random.Random(0)
    (home.folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, TASKS)))
    gate = {"tasks": "tasks.jsonl", "samples": 1, "max_tokens": 4}
    home.config.write_text(tomli_w.dumps({"train": TRAIN, "reward": {"settle_s": 0}, "gate": gate}))
    for n in range(6):
        ids = [rng.randrange(2, 320) for _ in range(4)]
        steps = [
            make_step(run_id=f"run-{n}", prompt_ids=[2, 3, 5 + n], response_ids=ids, logprobs=[-5.5] * 4),
            make_step(run_id=f"run-{n}", response_ids=ids, logprobs=[-5.5] * 4),
        ]
        if n == 0:
            steps[1] = msgspec.structs.replace(steps[1], sampling=Sampling(top_p=0.5))
        batch = StepBatch(steps=steps, signals=[make_signal(Target.RUN, f"run-{n}", rng.choice((-1.0, 1.0)))])
        vault.receive(device, [UploadItem(item_id=f"{n}", receipt_id="r", kind="steps", body=wire.encode(batch))])
    vault.close()
    return home


def test_a_real_round_can_be_followed_and_explained(trained: Home, capsys: pytest.CaptureFixture[str]) -> None:
    ear = TrainerEar()
    observer = Observer(trained.trainer, emit=lambda event: ear.hear(json.dumps(event).encode()))
    worker, seen = Worker.open(trained), list[str]()

    def report(metrics: dict[str, float]) -> None:
        observer.updated(metrics)
        training = ear.training
        assert training is not None
        seen.append(f"{training.done}/{training.updates}")

    done = worker.run(report, began=observer.began)
    observer.ended(done)
    observer.close()
    worker.close()
    assert seen == ["1/2", "2/2"]
    events = list(read_events(trained.trainer))
    assert [event["event"] for event in events] == ["began", "update", "update", "round"]
    assert {"reward", "kept", "ess", "entropy", "k3", "gradient_norm", "tokens_per_s"} <= events[1].keys()
    assert (ear.round["trajectories"], ear.training) == (6.0, None)
    assert f"round {done.round_id} passed: 6 trajectories in 2 updates" in round_line(events[-1])

    with pytest.raises(SystemExit):
        cli.main(["rounds", "explain", done.round_id, "--json", "--home", str(trained.folder)])
    told = json.loads(capsys.readouterr().out)
    assert told["made"] == {"version": 1, "state": "candidate", "round_id": done.round_id}
    assert told["evaluation"]["episodes"] == 2
    assert told["round"]["metrics"]["rejected_steps"] == {"sampler cut the distribution": 1}
    assert [update["tokens_per_s"] for update in told["updates"]] == [event["tokens_per_s"] for event in events[1:3]]
    assert len(told["trajectories"]) == 6
    with pytest.raises(SystemExit):
        cli.main(["rounds", "explain", done.round_id, "--home", str(trained.folder)])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "made adapter 1 (candidate)" in words
    assert "1 step sampler cut the distribution" in words
    assert "user +1.00 (100%)" in words

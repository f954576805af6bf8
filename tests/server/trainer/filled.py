"""A server's home with rewarded trajectories, for tests of rounds."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

from clawloop_server.home import Home
from clawloop_server.release.records import UnderWay
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.ids import new_id
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Signal, Step, StepBatch, Target

MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]
TRAIN: dict[str, object] = {
    "rank": 2,
    "lr": 0.01,
    "warmup_updates": 2,
    "batch_trajectories": 3,
    "updates_per_round": 3,
    "min_ess": 0.0,
    "min_kept": 0.0,
    "max_entropy_fall": 100.0,
    "checkpoint_every_s": 0.0,
    "loss": {"veto": 0.0},
}
PER_ROUND = 9


def configure(home: Home, **tables: dict[str, object]) -> None:
    defaults: dict[str, dict[str, object]] = {
        "train": TRAIN,
        "reward": {"settle_s": 0, "group_timeout_s": 0},
        "gate": {"required": False},
    }
    home.config.write_text(tomli_w.dumps(defaults | tables))


def send(vault: Vault, device: str, *, steps: list[Step], signals: list[Signal]) -> None:
    body = wire.encode(StepBatch(steps=steps, signals=signals))
    vault.receive(device, [UploadItem(item_id=new_id(), receipt_id="r", kind="steps", body=body)])


def group_of(n: int, name: str = "") -> dict[str, object]:
    """What the steps of the trajectory of that number say of its group."""
    return {"group_id": f"group {name}{n // 4}", "group_size": 2} if n % 4 < 2 else {}


def fill(
    vault: Vault, device: str, *, count: int, make_step: MakeStep, make_signal: MakeSignal, name: str = ""
) -> None:
    """Send rewarded trajectories of two steps each; every fourth and the one after it are a group."""
    rng = random.Random(f"{name}{count}")
    for n in range(count):
        group = group_of(n, name)
        run_id = f"{name}{n}"
        steps = [
            make_step(
                run_id=run_id,
                step_id=f"{run_id}.{i}",
                prompt_ids=[2, 3, 4, 5 + n % 50, *range(6, 8 + i)],
                response_ids=[rng.randrange(2, 320) for _ in range(3)],
                logprobs=[-rng.uniform(5, 6.5) for _ in range(3)],
                created_ms=n,
                **group,
            )
            for i in range(2)
        ]
        signals = [make_signal(Target.RUN, run_id, rng.uniform(-1.0, 1.0))]
        send(vault, device, steps=steps, signals=signals)


def adapters(folder: Path) -> dict[str, bytes]:
    """The files of all adapters of a home."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "adapters").glob("[0-9]*/adapter_*")}


class Died(BaseException):
    """What a test ends a round with as if the process had died: nothing after it runs in the worker."""


def die_in(worker: Worker, update: int) -> None:
    """Have the worker die in the update of that number, with the gradients there and no step made."""
    whole, seen = worker._engine.optim_step, [0]

    def optim_step(lr: float) -> float:
        if seen[0] == update:
            raise Died
        seen[0] += 1
        return whole(lr)

    worker._engine.optim_step = optim_step  # type: ignore[method-assign]
    with pytest.raises(Died):
        worker.run()
    del worker._engine.optim_step


def under_way(worker: Worker) -> UnderWay:
    found = worker._registry.under_way(worker._base.line_id)
    assert found is not None
    return found

"""The classifier at work in the trainer: it judges what nobody judged, once, and its word is one among others."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.trainer.worker import Worker
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.errors import ConfigError
from clawloop_shared.ids import new_id
from clawloop_shared.messages import UploadItem
from clawloop_shared.records import Channel, Signal, Step, StepBatch, Target

MakeStep = Callable[..., Step]
MakeSignal = Callable[..., Signal]


@pytest.fixture
def worker(home: Home, vault: Vault, base: Base, tmp_path: Path, tiny_folder: Path) -> Iterator[Worker]:
    """A trainer whose operator set a classifier."""
    folder = tmp_path / "classifier"
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, head_dim=8, max_position_embeddings=64, initializer_range=0.5, num_labels=1,
    )  # fmt: skip
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    tables = {"classifier": {"path": str(folder)}, "train": {"rank": 2}, "reward": {"settle_s": 0}}
    home.config.write_text(tomli_w.dumps(tables))
    opened = Worker.open(home)
    yield opened
    opened.close()


def send(vault: Vault, device: str, *steps: Step, signals: tuple[Signal, ...] = ()) -> None:
    body = wire.encode(StepBatch(steps=list(steps), signals=list(signals)))
    vault.receive(device, [UploadItem(item_id=new_id(), receipt_id=new_id(), kind="steps", body=body)])


def test_what_nobody_judged_is_judged_once_and_can_be_learned_from(
    worker: Worker, vault: Vault, device: str, make_step: MakeStep
) -> None:
    steps = [make_step(run_id=f"r{n}", response_ids=[10 + n, 11], channel=Channel.TRAIN) for n in range(3)]
    send(vault, device, *steps, make_step(run_id="val", channel=Channel.VAL))
    line = steps[0].policy.line
    assert vault.count_ready(line) == 0
    assert worker.judge() == 3
    assert worker.judge() == 0
    ready = vault.ready(line, 10)
    assert {t.signals[0].source for t in ready} == {"classifier"}
    assert len({t.reward for t in ready}) == 3
    assert vault.count_ready(line, Channel.VAL) == 0


def test_its_word_is_one_among_others(
    worker: Worker, vault: Vault, device: str, make_step: MakeStep, make_signal: MakeSignal
) -> None:
    step = make_step(run_id="r")
    send(vault, device, step, signals=(make_signal(Target.RUN, "r", 1.0),))
    worker.judge()
    (found,) = vault.ready(step.policy.line, 10)
    assert len(found.signals) == 2
    assert -1 < found.reward < 1  # neither the one's nor the other's alone


def test_a_trajectory_that_goes_on_is_judged_again_by_its_last_answer(
    worker: Worker, vault: Vault, device: str, make_step: MakeStep
) -> None:
    first, second = make_step(run_id="r", created_ms=1), make_step(run_id="r", created_ms=2, response_ids=[20, 21])
    send(vault, device, first)
    assert worker.judge() == 1
    send(vault, device, second)
    assert worker.judge() == 1
    (found,) = vault.ready(first.policy.line, 10)
    assert [signal.target_id for signal in found.signals] == [first.step_id, second.step_id]


def test_a_server_without_a_classifier_judges_nothing(
    home: Home, vault: Vault, base: Base, device: str, make_step: MakeStep
) -> None:
    home.config.write_text(tomli_w.dumps({"train": {"rank": 2}}))
    send(vault, device, make_step())
    worker = Worker.open(home)
    assert worker.judge() == 0
    worker.close()


def test_a_classifier_that_is_not_there_stops_the_trainer_with_its_name(home: Home, base: Base, tmp_path: Path) -> None:
    home.config.write_text(tomli_w.dumps({"classifier": {"path": str(tmp_path / "gone")}, "train": {"rank": 2}}))
    with pytest.raises(ConfigError, match="gone is no folder"):
        Worker.open(home)

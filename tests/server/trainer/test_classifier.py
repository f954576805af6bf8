"""The sequence classifier that judges on the server."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from clawloop_server.trainer.classifier import Classifier
from clawloop_server.trainer.settings import ClassifierSettings, check_classifier
from clawloop_shared.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
}
PAIRS = [("What is 2 + 2?", "4"), ("A much longer question " * 20, "five"), ("", "x")]


@pytest.fixture(params=[1, 3])
def folder(request: pytest.FixtureRequest, tmp_path: Path, tiny_folder: Path) -> Path:
    torch.manual_seed(1)
    Qwen3ForSequenceClassification(Qwen3Config(**SIZES, num_labels=request.param)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    return tmp_path


def test_values_are_within_bounds_and_do_not_depend_on_what_is_judged_beside(folder: Path) -> None:
    many = Classifier.open(ClassifierSettings(path=str(folder), batch=3)).values(PAIRS)
    alone = [Classifier.open(ClassifierSettings(path=str(folder))).values([pair])[0] for pair in PAIRS]
    assert many == pytest.approx(alone, abs=1e-5)
    assert all(value is not None and -1 <= value <= 1 for value in many)
    assert len({round(value or 0, 4) for value in many}) == 3


def test_the_answer_is_judged_even_after_a_prompt_that_is_far_too_long(folder: Path) -> None:
    judge = Classifier.open(ClassifierSettings(path=str(folder)))
    one, other = judge.values([("q" * 5000, "yes"), ("q" * 5000, "no, never")])
    assert one != other


def test_a_model_that_gives_no_number_gives_no_value(folder: Path) -> None:
    judge = Classifier.open(ClassifierSettings(path=str(folder)))
    judge._model.score.weight.data.fill_(float("nan"))
    assert judge.values(PAIRS[:1]) == [None]


def test_settings_that_cannot_be_are_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        Classifier.open(ClassifierSettings(path=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="weight 0"):
        check_classifier(ClassifierSettings(weight=0))


def test_a_label_that_the_model_does_not_have_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    Qwen3ForSequenceClassification(Qwen3Config(**SIZES, num_labels=2)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="labels 0 to 1"):
        Classifier.open(ClassifierSettings(path=str(tmp_path), label=5))

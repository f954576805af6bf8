"""A discriminative reward model on the server: a local sequence classifier that reads a prompt and its answer.

Any Hugging Face folder with a sequence classification head, as safetensors; no code that comes with it runs. With one
label its logit is brought to [-1, 1] by tanh; with several, the value is 2 p(label) - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from clawloop_server.trainer.settings import ClassifierSettings
from clawloop_shared.errors import ConfigError


class Classifier:
    """Judges pairs of texts. Knows no trajectory and no database."""

    def __init__(self, model: Any, tokenizer: Any, settings: ClassifierSettings) -> None:
        """A transformers model with a classification head, and its tokenizer.

        Raises:
            ConfigError: it has no such label, or no token to fill a batch with.
        """
        self._model, self._tokenizer, self._settings = model.eval(), tokenizer, settings
        labels = model.config.num_labels
        if labels > 1 and settings.label >= labels:
            raise ConfigError(f"[classifier] label {settings.label}: the model has labels 0 to {labels - 1}")
        if tokenizer.pad_token_id is None:
            raise ConfigError(f"[classifier] path {settings.path}: its tokenizer has no pad token")
        model.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.truncation_side = "left"
        limit = getattr(model.config, "max_position_embeddings", settings.max_tokens)
        self._max_tokens = min(settings.max_tokens, limit)

    @classmethod
    def open(cls, settings: ClassifierSettings) -> Classifier:
        """The classifier in the settings' folder.

        Raises:
            ConfigError: it cannot be loaded.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = Path(settings.path)
        if not folder.is_dir():
            raise ConfigError(f"[classifier] path {settings.path} is no folder")
        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **safe
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        except (OSError, ValueError) as error:
            raise ConfigError(f"[classifier] path {settings.path} could not be loaded: {error}") from error
        return cls(model, tokenizer, settings)

    @torch.inference_mode()
    def values(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """For each prompt and answer a value in [-1, 1]; None where the model gave no finite number."""
        return [value for batch in self._batches(pairs) for value in self._judge(batch)]

    def _batches(self, pairs: Sequence[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
        for at in range(0, len(pairs), self._settings.batch):
            yield pairs[at : at + self._settings.batch]

    def _judge(self, batch: Sequence[tuple[str, str]]) -> list[float | None]:
        encoded = self._tokenizer(
            [f"{prompt}\n\n{answer}" for prompt, answer in batch],
            truncation=True,
            max_length=self._max_tokens,
            padding=True,
            return_tensors="pt",
        )
        encoded.pop("token_type_ids", None)
        logits_BL = self._model(**encoded).logits.double()
        if logits_BL.shape[1] == 1:
            values_B = logits_BL[:, 0].tanh()
        else:
            values_B = 2 * logits_BL.softmax(-1)[:, self._settings.label] - 1
        return [value if math.isfinite(value) else None for value in values_B.tolist()]

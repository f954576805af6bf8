"""Puts the classifier to work on what devices sent: the last answer of each trajectory, once. Its word is one signal
among others (source `classifier`); without any other it makes a trajectory one that can be learned from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from clawloop_server.trainer.classifier import Classifier
from clawloop_server.trainer.settings import ClassifierSettings
from clawloop_server.vault.store import Vault

if TYPE_CHECKING:
    from clawloop_shared.records import Step

BITE = 64
"""answers of one look"""


class Judge:
    """The classifier of one server, and the tokenizer of the base whose answers it reads."""

    def __init__(self, classifier: Classifier, tokenizer: Any, settings: ClassifierSettings) -> None:
        self._classifier, self._tokenizer, self._settings = classifier, tokenizer, settings

    @classmethod
    def open(cls, settings: ClassifierSettings, tokenizer: Any) -> Judge:
        """The judge of the settings; `tokenizer` is that of the base.

        Raises:
            ConfigError: the classifier cannot be loaded.
        """
        return cls(Classifier.open(settings), tokenizer, settings)

    def judge(self, vault: Vault, line_id: str) -> int:
        """Look at up to `BITE` answers; how many there were.

        Raises:
            StorageError: what was sent cannot be opened, or what was said cannot be kept.
        """
        waiting = vault.answers(line_id, BITE)
        if waiting:
            values = self._classifier.values([self._texts(answer.step) for answer in waiting])
            judged = [
                msgspec.structs.replace(answer, value=value) for answer, value in zip(waiting, values, strict=True)
            ]
            vault.keep_values(judged, weight=self._settings.weight)
        return len(waiting)

    def _texts(self, step: Step) -> tuple[str, str]:
        # What stands further back would be cut off by the classifier.
        prompt = step.prompt_ids[-self._settings.max_tokens * 8 :]
        return self._text(prompt), self._text(step.response_ids)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

"""Watching, while an answer is being sent, that it may still leave. Knows no transport: it is given what cuts."""

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from clawloop_edge.node.transport import Permit

_log = logging.getLogger(__name__)

PERIOD_S = 0.1
"""how soon a lowered level cuts what is being sent; a question costs less than a millisecond"""


class Guard:
    """Asks `permit` every `period_s` in a thread of its own, and calls `cut` once it says no. Use it as a context."""

    def __init__(self, permit: Permit, cut: Callable[[], None], *, period_s: float = PERIOD_S) -> None:
        self._permit, self._cut, self._period_s = permit, cut, period_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="clawloop-guard", daemon=True)

    def __enter__(self) -> "Guard":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self._period_s):
            if not self._allowed():
                self._cut()
                return

    def _allowed(self) -> bool:
        try:
            return self._permit()
        except Exception as error:  # noqa: BLE001 - what cannot be asked is a no: nothing may go on unwatched
            _log.error("cannot tell whether an upload may go on (%s); it is cut", type(error).__name__)
            return False

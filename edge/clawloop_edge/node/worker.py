"""The thread that keeps this device in touch with its server: polls, answers, and comes back after every failure.

The agent never notices it: a server that is away only changes what `status` says. Knows no Flower.
"""

import logging
import random
import threading
import time
import traceback
from enum import StrEnum
from functools import partial

import msgspec

from clawloop_edge.node import messages
from clawloop_edge.node.guard import Guard
from clawloop_edge.node.messages import NodeHandlers
from clawloop_edge.node.transport import (
    Answer,
    ClockOff,
    Incoming,
    NodeError,
    NodeRefused,
    ServerAway,
    Taken,
    Transport,
    Waiting,
    Withdrawn,
)

_log = logging.getLogger(__name__)

_JITTER = 0.2
_SILENT_S = 0.5
"""how often it is asked again whether anything may leave, while nothing may"""


class NodeState(StrEnum):
    """Where the connection stands."""

    CONNECTING = "connecting"
    """not yet reached, or being reached again"""
    ONLINE = "online"
    """the server knows us and gets our answers"""
    AWAY = "away"
    """the server cannot be reached; tried again by itself"""
    REFUSED = "refused"
    """the server does not know our key; tried again rarely"""
    WAITING = "waiting"
    """the server's operator has to approve us first; asked again by itself"""
    TAKEN = "taken"
    """another edge with our keys came in after us, so we stay out; asked again rarely"""
    CLOCK = "clock off"
    """our clock is too far from the server's; tried again by itself"""
    STOPPED = "stopped"
    """not running"""


_STATES = {
    NodeRefused: NodeState.REFUSED,
    Waiting: NodeState.WAITING,
    Taken: NodeState.TAKEN,
    ClockOff: NodeState.CLOCK,
}
"""of errors; with any other the server is away"""


class NodeSettings(msgspec.Struct, frozen=True):
    """How often to ask for messages, and how long to wait after failures (seconds)."""

    poll_s: float = 15.0
    quick_s: float = 0.02
    """first wait when another message is likely soon; doubled up to `poll_s`"""
    retry_s: float = 0.5
    max_retry_s: float = 60.0
    """longest wait while the server is away"""
    refused_s: float = 300.0
    """longest wait while the server refuses us (also for a minute after we died without a goodbye)"""


class NodeStatus(msgspec.Struct, frozen=True):
    """A look at the worker from outside. Times are 0 if it never happened."""

    state: NodeState
    detail: str = ""
    messages: int = 0
    last_message_ms: int = 0


class NodeWorker:
    """One thread over one transport."""

    def __init__(self, transport: Transport, handlers: NodeHandlers, *, settings: NodeSettings | None = None) -> None:
        self._transport, self._handlers = transport, handlers
        self._settings = settings or NodeSettings()
        self._stopping, self._poked, self._silent = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._status = NodeStatus(NodeState.STOPPED)

    @property
    def status(self) -> NodeStatus:
        """Where things stand now."""
        return self._status

    def start(self) -> None:
        """Begin; returns at once, whether or not the server can be reached."""
        if self._thread is not None:
            return
        self._stopping.clear()
        self._silent.clear()
        self._set(NodeState.CONNECTING)
        self._thread = threading.Thread(target=self._run, name="clawloop-node", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 10.0, *, silent: bool = False) -> bool:
        """Say goodbye to the server and end the thread; False if a handler still runs after `timeout_s`.

        `silent`: break off what is being sent, and say nothing more at all.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self._stopping.set()
        if silent:
            self._silent.set()
            self._transport.cut()
        self._poked.set()
        thread.join(timeout_s)
        return not thread.is_alive()

    def poke(self) -> None:
        """Ask the server at once instead of at the next poll."""
        self._poked.set()

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            goodbye = True
            try:
                if not self._handlers.may_leave(()):
                    goodbye = False
                    self._sleep(_SILENT_S)
                    continue
                self._transport.connect()
                self._set(NodeState.ONLINE)
                failures = 0
                self._serve()
            except Withdrawn as error:
                goodbye = False
                _log.info("%s", error)
            except NodeError as error:
                failures += 1
                self._failed(error, failures)
            except Exception as error:  # noqa: BLE001 - whatever a server sends or a disk does, sync comes back by itself
                failures += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {where.filename}:{where.lineno}"
                self._failed(ServerAway(f"sync failed with {kind}"), failures)
            finally:
                self._transport.close(goodbye=goodbye and not self._silent.is_set())
        self._set(NodeState.STOPPED)

    def _serve(self) -> None:
        wait_s = self._settings.quick_s
        while not self._stopping.is_set():
            incoming = self._transport.receive()
            if incoming is None:
                self._sleep(wait_s)
                wait_s = min(wait_s * 2, self._settings.poll_s)
                continue
            answer = messages.answer(incoming.kind, incoming.payload, handlers=self._handlers)
            self._send(incoming, answer)
            wait_s = min(self._settings.quick_s, self._settings.poll_s) if answer.eager else self._settings.poll_s
            self._status = msgspec.structs.replace(
                self._status, messages=self._status.messages + 1, last_message_ms=time.time_ns() // 1_000_000
            )

    def _send(self, incoming: Incoming, answer: Answer) -> None:
        permit = partial(self._handlers.may_leave, answer.items)
        try:
            with Guard(permit, self._transport.cut):
                self._transport.send(incoming, answer, permit=permit)
        except Withdrawn:
            self._handlers.stopped(answer.items)
            raise

    def _failed(self, error: NodeError, failures: int) -> None:
        state = next((found for kind, found in _STATES.items() if isinstance(error, kind)), NodeState.AWAY)
        if self._status.state is not state:
            _log.warning("sync %s: %s", state, error)
        self._set(state, str(error))
        rarely = state in (NodeState.REFUSED, NodeState.TAKEN)
        longest_s = self._settings.refused_s if rarely else self._settings.max_retry_s
        self._sleep(min(self._settings.retry_s * 2 ** min(failures - 1, 20), longest_s))

    def _sleep(self, wait_s: float) -> None:
        self._poked.wait(wait_s * random.uniform(1 - _JITTER, 1 + _JITTER))
        self._poked.clear()

    def _set(self, state: NodeState, detail: str = "") -> None:
        self._status = msgspec.structs.replace(self._status, state=state, detail=detail)

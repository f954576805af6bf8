"""The bridge: one endless Flower ServerApp that carries messages between the hub and the SuperLink.

It holds nothing that matters: what to send and what came back is the hub's. If it dies, the hub submits it again.
Flower keeps no message for a device that is away and hands out each reply once, so a reply goes to the hub before
anything else is asked.
"""

import functools
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clawloop_server.errors import FleetError
from clawloop_server.fleet.channel import VARIABLE, Line, NodeInfo, Outgoing, Reply, read_address
from clawloop_shared.messages import RECORD, SMALL_PAYLOAD_BYTES

_log = logging.getLogger(__name__)

_STYPE = "clawloop.wire"
_NODES_EVERY_S = 0.5
_IDLE_S = 0.5
_WAIT_S = (0.03, 0.5)
_WAIT_SHARE = 0.4
_PART_S = (0.01, 0.5)
_PART_MAX_S = 120.0


class Hub(Protocol):
    """The hub as the bridge sees it (`channel.Line`)."""

    def exchange(self, online: list[NodeInfo], replies: list[Reply], *, wait_s: float) -> list[Outgoing]:
        """Hand over replies, get what to send."""
        ...


@dataclass(frozen=True)
class _Sent:
    node_id: int
    type: str
    at_s: float


class Bridge:
    """One grid, one hub."""

    def __init__(self, grid: Any, hub: Hub) -> None:
        self._grid, self._hub = grid, hub
        self._online: list[NodeInfo] = []
        self._online_s = float("-inf")
        self._sent: dict[str, _Sent] = {}
        self._replies: list[Reply] = []

    def turn(self) -> None:
        """Once around: who is there, what is to be sent, what came back."""
        self._look()
        replies, self._replies = self._replies, []
        orders = self._hub.exchange(self._online, replies, wait_s=self._wait_s())
        if orders:
            self._push(orders)
        if self._sent:
            self._pull()

    def _look(self) -> None:
        if time.monotonic() - self._online_s < _NODES_EVERY_S:
            return
        self._online = [NodeInfo(node.node_id, node.name) for node in self._grid.get_nodes()]
        self._online_s = time.monotonic()

    def _wait_s(self) -> float:
        """A fresh message is looked for soon, an old one (a device that polls seldom) less and less often."""
        if self._replies:
            return 0.0
        if not self._sent:
            return _IDLE_S
        age_s = time.monotonic() - max(sent.at_s for sent in self._sent.values())
        return min(max(age_s * _WAIT_SHARE, _WAIT_S[0]), _WAIT_S[1])

    def _push(self, orders: list[Outgoing]) -> None:
        messages = [_message(order) for order in orders]
        ids = list(self._grid.push_messages(messages))
        ids += [None] * (len(orders) - len(ids))
        for message_id, order in zip(ids, orders, strict=True):
            if message_id:
                self._sent[message_id] = _Sent(order.node_id, order.type, time.monotonic())
            else:
                self._replies.append(Reply(order.node_id, order.type, error="the SuperLink did not take the message"))

    def _pull(self) -> None:
        for message in self._grid.pull_messages(list(self._sent)):
            sent = self._sent.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:
                self._replies.append(_reply(sent, message))


def _message(order: Outgoing) -> Any:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

    if len(order.payload) <= SMALL_PAYLOAD_BYTES:
        content = RecordDict({RECORD: ConfigRecord({RECORD: order.payload})})
    else:
        array = Array("uint8", (len(order.payload),), _STYPE, order.payload)
        content = RecordDict({RECORD: ArrayRecord({RECORD: array})})
    return Message(content, dst_node_id=order.node_id, message_type=order.type, ttl=order.ttl_s)


def _reply(sent: _Sent, message: Any) -> Reply:
    if message.has_error():
        return Reply(sent.node_id, sent.type, error=f"{message.error.code} {message.error.reason or ''}"[:500])
    small, large = message.content.config_records.get(RECORD), message.content.array_records.get(RECORD)
    data = small.get(RECORD) if small is not None else large[RECORD].data if large and RECORD in large else None
    if not isinstance(data, bytes):
        return Reply(sent.node_id, sent.type, error="the reply has no payload")
    return Reply(sent.node_id, sent.type, payload=data)


def run(grid: Any, run_id: int) -> None:
    """Serve until the hub hangs up.

    Raises:
        FleetError: it was not started by a hub.
    """
    file = Path(os.environ.get(VARIABLE, ""))
    _log_to(read_address(file).log)
    _hurry()
    line = Line(file, run_id)
    bridge = Bridge(grid, line)
    _log.info("bridge of run %d is up", run_id)
    try:
        while True:
            bridge.turn()
    except FleetError as error:
        _log.info("bridge of run %d ends: %s", run_id, error)
    except Exception:
        _log.exception("bridge of run %d fails", run_id)
        raise
    finally:
        line.close()


def _hurry() -> None:
    """Look again soon for the parts of a reply that is still being sent.

    flwr's grid waits a whole second after the first look, which made every exchange take 1.6 s instead of 0.2 s.
    """
    from flwr.superlink.grid import http_grid

    http_grid.pull_objects = functools.partial(
        http_grid.pull_objects, initial_backoff=_PART_S[0], backoff_cap=_PART_S[1], max_time=_PART_MAX_S
    )


def _log_to(path: str) -> None:
    """Flower throws away what a ServerApp prints, so the bridge writes its own file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)

"""The bridge: one endless Flower ServerApp that carries messages between the hub and the SuperLink.

It holds nothing that matters: what to send and what came back is the hub's. If it dies, the hub submits it again.
Flower keeps no message for a device that is away and hands out each reply once, so a reply goes to the hub before
anything else is asked.
"""

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from clawloop_server.errors import FleetError
from clawloop_server.fleet.channel import VARIABLE, Line, NodeInfo, Outgoing, Reply, read_address
from clawloop_server.fleet.replies import Arrived, Replies
from clawloop_shared.messages import MAX_PAYLOAD_BYTES, RECORD, SMALL_PAYLOAD_BYTES

_log = logging.getLogger(__name__)

_STYPE = "clawloop.wire"
_NODES_EVERY_S = 0.5
_IDLE_S = 0.5
_LOOK_SHARE, _PULL_SHARE = 0.05, 0.2
"""of its time that it may spend asking who is there, and whether there are answers: both cost more with more devices"""
_MAX_PULL = 256
"""of the messages under way, how many it asks for at once; the oldest first"""
_MAX_HANDED_BYTES = 128 << 20
"""of payloads in one exchange: the hub hangs up on a frame over `channel.MAX_FRAME_BYTES`, whoever's fault it is"""
_WAIT_S = (0.03, 0.5)
_WAIT_SHARE = 0.4


class Hub(Protocol):
    """The hub as the bridge sees it (`channel.Line`)."""

    def exchange(self, online: list[NodeInfo] | None, replies: list[Reply], *, wait_s: float) -> list[Outgoing]:
        """Hand over replies, get what to send; `online` None: as before."""
        ...


class Grid(Protocol):
    """Flower as the bridge sees it (`replies.Replies`)."""

    @property
    def soon(self) -> bool:
        """Whether a reply is likely to be there in a moment."""
        ...

    def get_nodes(self) -> Iterable[Any]:
        """The nodes that are online."""
        ...

    def push_messages(self, messages: list[Any]) -> Iterable[str | None]:
        """Send these; their ids, None for what was not taken."""
        ...

    def pull(self, question_ids: list[str]) -> list[Arrived]:
        """The replies to these that are there, each once."""
        ...


@dataclass(frozen=True)
class _Sent:
    node_id: int
    type: str


class Bridge:
    """One grid, one hub."""

    def __init__(self, grid: Grid, hub: Hub) -> None:
        self._grid, self._hub = grid, hub
        self._online: list[NodeInfo] = []
        self._told: list[NodeInfo] | None = None
        self._look_due_s = self._pull_due_s = self._sent_s = float("-inf")
        self._sent: dict[str, _Sent] = {}
        self._latest: dict[_Sent, str] = {}
        self._replies: list[Reply] = []

    def turn(self) -> None:
        """Once around: who is there, what is to be sent, what came back."""
        self._look()
        replies = self._some()
        changed = None if self._online == self._told else self._online
        orders = self._hub.exchange(changed, replies, wait_s=self._wait_s(replies))
        self._told = self._online
        if orders:
            self._push(orders)
        if self._sent and not self._replies and time.monotonic() >= self._pull_due_s:
            self._pull()

    def _some(self) -> list[Reply]:
        """Of the replies that are there as many, from the first on, as go into one exchange."""
        count, size = 0, 0
        for reply in self._replies:
            size += len(reply.payload)
            if count and size > _MAX_HANDED_BYTES:
                break
            count += 1
        replies, self._replies = self._replies[:count], self._replies[count:]
        return replies

    def _look(self) -> None:
        began_s = time.monotonic()
        if began_s < self._look_due_s:
            return
        self._online = sorted(map(_info, self._grid.get_nodes()), key=lambda node: node.node_id)
        spent_s = time.monotonic() - began_s
        self._look_due_s = began_s + max(_NODES_EVERY_S, spent_s / _LOOK_SHARE)

    def _wait_s(self, replies: list[Reply]) -> float:
        """A fresh message is looked for soon, an old one (a device that polls seldom) less and less often."""
        if replies:
            return 0.0
        if not self._sent:
            return _IDLE_S
        if self._grid.soon:
            return _WAIT_S[0]
        now_s = time.monotonic()
        age_s = now_s - self._sent_s
        return max(min(max(age_s * _WAIT_SHARE, _WAIT_S[0]), _WAIT_S[1]), min(self._pull_due_s - now_s, _WAIT_S[1]))

    def _push(self, orders: list[Outgoing]) -> None:
        messages = [_message(order) for order in orders]
        ids = list(self._grid.push_messages(messages))
        ids += [None] * (len(orders) - len(ids))
        self._sent_s = time.monotonic()
        for message_id, order in zip(ids, orders, strict=True):
            if message_id:
                sent = _Sent(order.node_id, order.type)
                self._sent[message_id], self._latest[sent] = sent, message_id
            else:
                self._replies.append(Reply(order.node_id, order.type, error="the SuperLink did not take the message"))

    def _pull(self) -> None:
        """Ask for answers. Those asked for that have none go to the end of the line. Of several questions of a kind to
        a device only the latest counts: it began anew since the others. Those are asked for until they run out, for
        what nobody fetches stays in the SuperLink's memory."""
        began_s = time.monotonic()
        asked = list(islice(self._sent, _MAX_PULL))
        for arrived in self._grid.pull(asked):
            sent = self._sent.pop(arrived.question_id, None)
            if sent is not None and self._latest.get(sent) == arrived.question_id:
                self._replies.append(_reply(sent, arrived))
        if len(self._sent) > _MAX_PULL:
            for message_id in asked:
                if message_id in self._sent:
                    self._sent[message_id] = self._sent.pop(message_id)
        if not self._replies:
            self._pull_due_s = began_s + (time.monotonic() - began_s) / _PULL_SHARE


def _info(node: Any) -> NodeInfo:
    return NodeInfo(node.node_id, node.name, node.last_activated_at)


def _message(order: Outgoing) -> Any:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

    if len(order.payload) <= SMALL_PAYLOAD_BYTES:
        content = RecordDict({RECORD: ConfigRecord({RECORD: order.payload})})
    else:
        array = Array("uint8", (len(order.payload),), _STYPE, order.payload)
        content = RecordDict({RECORD: ArrayRecord({RECORD: array})})
    return Message(content, dst_node_id=order.node_id, message_type=order.type, ttl=order.ttl_s)


def _reply(sent: _Sent, arrived: Arrived) -> Reply:
    message = arrived.message
    if message is None:
        return Reply(sent.node_id, sent.type, error=arrived.error[:500])
    if message.has_error():
        return Reply(sent.node_id, sent.type, error=f"{message.error.code} {message.error.reason or ''}"[:500])
    small, large = message.content.config_records.get(RECORD), message.content.array_records.get(RECORD)
    data = small.get(RECORD) if small is not None else large[RECORD].data if large and RECORD in large else None
    if not isinstance(data, bytes):
        return Reply(sent.node_id, sent.type, error="the reply has no payload")
    if len(data) > MAX_PAYLOAD_BYTES:
        _log.warning("node %d answered %s with %d bytes", sent.node_id, sent.type, len(data))
        why = f"node {sent.node_id} answered with {len(data)} bytes; a message holds {MAX_PAYLOAD_BYTES}"
        return Reply(sent.node_id, sent.type, error=why)
    return Reply(sent.node_id, sent.type, payload=data)


def run(grid: Any, run_id: int) -> None:
    """Serve until the hub hangs up.

    Raises:
        FleetError: it was not started by a hub.
    """
    file = Path(os.environ.get(VARIABLE, ""))
    _log_to(read_address(file).log)
    line = Line(file, run_id)
    bridge = Bridge(Replies(grid, run_id), line)
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


def _log_to(path: str) -> None:
    """Flower throws away what a ServerApp prints, so the bridge writes its own file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)

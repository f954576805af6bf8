"""Flower's grid for the bridge: a reply of which parts are missing holds up no other.

Flower hands a reply out as soon as it is announced, and its own grid then waits for the parts: for minutes, if the
device was killed in between, its line is slow, or it never meant to send them. Here each reply waits by itself. What
there is of it is not kept in memory meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

_TRY_AGAIN = 0.1
"""after this share of the time since a reply was announced it is looked at again"""
_SOONEST_S = 0.01
_FRESH_S = 1.0
GIVEN_UP_S = 120.0


class Arrived(NamedTuple):
    """The reply to a message: a Flower message, or why there is none."""

    question_id: str
    message: Any
    error: str = ""


@dataclass
class _Arriving:
    """A reply that was announced. Times are of `time.monotonic`."""

    message_id: str
    question_id: str
    parts: list[str]
    unseen: list[str]
    """those of the parts that may not be there yet, the next one to be looked for last"""
    since_s: float
    due_s: float


class Replies:
    """A grid of one run."""

    def __init__(self, grid: Any, run_id: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid, self._run_id, self._clock = grid, run_id, clock
        self._arriving: dict[str, _Arriving] = {}

    @property
    def soon(self) -> bool:
        """Whether parts of a reply are likely to come in a moment."""
        now_s = self._clock()
        return any(now_s - one.since_s < _FRESH_S for one in self._arriving.values())

    def get_nodes(self) -> Iterable[Any]:
        """The nodes that are online."""
        found: Iterable[Any] = self._grid.get_nodes()
        return found

    def push_messages(self, messages: list[Any]) -> Iterable[str | None]:
        """Send these; their ids, None for what was not taken."""
        ids: Iterable[str | None] = self._grid.push_messages(messages)
        return ids

    def pull(self, question_ids: list[str]) -> list[Arrived]:
        """The replies to these that are there as a whole, each once; and those that will not come any more."""
        under_way = {one.question_id for one in self._arriving.values()}
        if asked := [each for each in question_ids if each not in under_way]:
            self._announced(asked)
        now_s = self._clock()
        tried = [self._try(one, now_s) for one in list(self._arriving.values()) if one.due_s <= now_s]
        return [arrived for arrived in tried if arrived is not None]

    def _announced(self, question_ids: list[str]) -> None:
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        found = self._grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=question_ids))
        now_s = self._clock()
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            about, parts = message.metadata, [each.object_id for each in iterate_object_tree(tree)]
            self._arriving[about.message_id] = _Arriving(
                about.message_id, about.reply_to_message_id, parts, [], since_s=now_s, due_s=now_s
            )

    def _try(self, one: _Arriving, now_s: float) -> Arrived | None:
        """The reply, if all of it is there."""
        from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

        try:
            contents = self._fetch(one)
        except ObjectUnavailableError:
            age_s = now_s - one.since_s
            if age_s < GIVEN_UP_S:
                one.due_s = now_s + max(_SOONEST_S, age_s * _TRY_AGAIN)
                return None
            return self._ended(one, error=f"parts of its reply did not come within {GIVEN_UP_S:.0f} s")
        except ObjectPullError as error:
            return self._ended(one, error=f"its reply was not sent whole: {error}")
        return self._ended(one, contents=contents)

    def _fetch(self, one: _Arriving) -> dict[str, bytes]:
        """All parts of it. What is too early is dropped again, so that slow lines fill no memory.

        Raises:
            ObjectUnavailableError: a part is not there yet.
            ObjectPullError: a part will not come.
        """
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf

        grid = self._grid
        pull = make_pull_object_fn_protobuf(grid._runtime_client.PullObject, grid.node, self._run_id)
        while one.unseen:
            pull(one.unseen[-1])
            one.unseen.pop()
        contents: dict[str, bytes] = {}
        one.unseen = one.parts[::-1]
        for part in one.parts:
            contents[part] = pull(part)
            one.unseen.pop()
        return contents

    def _ended(self, one: _Arriving, *, contents: dict[str, bytes] | None = None, error: str = "") -> Arrived:
        """It, off Flower's hands too, which drops its parts then."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        del self._arriving[one.message_id]
        request = ConfirmMessageReceivedRequest(
            node=self._grid.node, run_id=self._run_id, message_object_id=one.message_id
        )
        self._grid._runtime_client.ConfirmMessageReceived(request)
        if contents is None:
            return Arrived(one.question_id, None, error)
        return Arrived(one.question_id, inflate_object_from_contents(one.message_id, contents))

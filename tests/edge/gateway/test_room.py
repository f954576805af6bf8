"""Where there is no room for more, calls are answered all the same."""

import pytest

from clawloop_edge.gateway.app import STATS

from .conftest import Serve


async def test_a_call_that_cannot_be_kept_for_want_of_room_is_answered_and_counted(
    scripted: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = await scripted(["one", "two"])
    served.pool.gate.closed = "the disk is full"
    body = {"messages": [{"role": "user", "content": "a"}]}
    status, _, reply = await served.post("/v1/chat/completions", body)
    assert (status, reply["choices"][0]["message"]["content"]) == (200, "one")
    assert served.pool.get_step(reply["id"]) is None
    assert served.app[STATS]().keep_failures == served.pool.stats().refused == 1
    assert not caplog.records, "that nothing is kept was said once, by who closed the gate"
    served.pool.gate.closed = ""
    _, _, reply = await served.post("/v1/chat/completions", body)
    assert served.kept(reply["id"])

"""What a client was told whole is on the disk: an answer's end waits for it a moment, and its tokens do not."""

import asyncio
import threading
from typing import Any

import pytest
from tests.edge.gateway.conftest import Serve, Served

from clawloop_edge.gateway import recorder
from clawloop_edge.gateway.app import STATS

USER = [{"role": "user", "content": "Hi."}]


class Held:
    """The pool's writer does nothing else until `release`."""

    def __init__(self, served: Served) -> None:
        self._let_go = threading.Event()
        self._done = served.pool.submit(lambda database: self._let_go.wait(30))

    async def release(self) -> None:
        self._let_go.set()
        await asyncio.wrap_future(self._done)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_came_whole_can_be_read_back_at_once(scripted: Serve, stream: bool) -> None:
    served = await scripted(["One."] * 20)
    for _ in range(20):
        body = {"messages": USER, "stream": stream}
        async with served.http.post(
            f"{served.base_url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {served.token}"}
        ) as reply:
            text = await reply.text()
            assert reply.status == 200
            assert not stream or text.endswith("data: [DONE]\n\n")
            assert served.pool.get_step(reply.headers["x-clawloop-step"]) is not None
    assert served.app[STATS]().kept_late == 0


async def test_tokens_do_not_wait_for_the_disk_and_the_end_mark_does(scripted: Serve) -> None:
    served = await scripted(["One two three."])
    held = Held(served)
    headers = {"Authorization": f"Bearer {served.token}"}
    async with served.http.post(
        f"{served.base_url}/v1/chat/completions", json={"messages": USER, "stream": True}, headers=headers
    ) as reply:
        seen = b""
        while b'"content":"."' not in seen:
            seen += await asyncio.wait_for(reply.content.readany(), 10)
        assert b"[DONE]" not in seen
        await held.release()
        assert (await reply.content.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disk_that_does_not_answer_holds_the_end_up_for_a_moment_only(
    scripted: Serve, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "KEPT_WITHIN_S", 0.05)
    served = await scripted(["One."])
    held = Held(served)
    status, text = await asyncio.wait_for(_call(served, stream=stream), 10)
    assert status == 200
    assert '"."' in text or "One." in text
    assert served.app[STATS]().kept_late == 1
    await held.release()


async def _call(served: Served, *, stream: bool) -> tuple[int, Any]:
    async with served.http.post(
        f"{served.base_url}/v1/chat/completions",
        json={"messages": USER, "stream": stream},
        headers={"Authorization": f"Bearer {served.token}"},
    ) as reply:
        return reply.status, await reply.text()

"""A judge behind an OpenAI-compatible URL: it does what anything outside the frame tells it, so that a frame with a
hole in it shows; and it can be as bad as servers get."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from aiohttp import web

Json = dict[str, Any]
Says = Callable[[Json], str]

HONEST = -1
_MARK = re.compile(r"begin with the mark (\w+) frame")
_CHECK = re.compile(r'"check": "(\w+)"')
_OBEY = re.compile(r"OBEY score (-?\d)")
_TURN = re.compile(r"<\|im_start\|>|\[INST\]|<start_of_turn>")


def outside(body: Json) -> str:
    """What a judge reads that stands in no frame; behind a chat template's mark everything is outside."""
    system, user = (message["content"] for message in body["messages"])
    mark = _MARK.search(system)
    text = user
    if mark:
        text = re.sub(rf"^{mark[1]} begin [a-z ]+$.*?^{mark[1]} end [a-z ]+$", "", user, flags=re.S | re.M)
    turn = _TURN.search(user)
    return f"{system}\n{text}" + (user[turn.start() :] if turn else "")


def obedient(body: Json) -> str:
    """Does what it is told outside the frame, else says -1; and repeats the word that it finds there."""
    text = outside(body)
    told = _OBEY.search(text)
    check = _CHECK.findall(text)
    score = int(told[1]) if told else HONEST
    return json.dumps({"check": check[-1] if check else "", "score": score, "reason": "as it seems"})


def votes(*scores: int) -> Says:
    """Says these scores in order."""
    left = list(scores)

    def say(body: Json) -> str:
        return json.dumps({**json.loads(obedient(body)), "score": left.pop(0)})

    return say


class FakeJudge:
    """`bodies` and `headers` are what came. `first` are statuses that come before it answers, `delay_s` what it waits,
    `raw` a body in place of its answer, `schemas` whether it can be forced into a form."""

    def __init__(self, says: Says = obedient) -> None:
        self.says = says
        self.bodies: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.first: list[int] = []
        self.delay_s = 0.0
        self.raw = b""
        self.schemas = True

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_post("/classify", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.first:
            status = self.first.pop(0)
            headers = {"Location": "http://127.0.0.1:1/elsewhere"} if 300 <= status < 400 else None
            return web.Response(status=status, headers=headers)
        if "response_format" in body and not self.schemas:
            return web.json_response({"error": {"message": "no such field"}}, status=400)
        await asyncio.sleep(self.delay_s)
        if self.raw:
            return web.Response(body=self.raw, content_type="application/json")
        message = {"role": "assistant", "content": self.says(body)}
        return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})

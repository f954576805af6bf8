"""An engine that answers from a script instead of a model, for tests and drills. It says so: its policy's line is
`scripted`, so that no step of it is ever trained on.

Prompts, replies and finish reasons go through the model's real tokenizer; logprobs are 0, since nothing was sampled.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from clawloop_edge.engine.protocol import ChatTokenizer, EngineHealth, GenerateRequest, Generation, Token
from clawloop_edge.engine.stream import StreamGeneration, TokenStream
from clawloop_edge.engine.tokenizer import HfChatTokenizer
from clawloop_edge.errors import EngineError, EngineGone, PromptTooLong, UnknownVersion
from clawloop_shared.model_line import ModelLine, read_line
from clawloop_shared.records import Policy

SCRIPTED_LINE = "scripted"
Script = Sequence[str] | Callable[[str], str]


class ScriptedEngine:
    """An `Engine` that gives out the raw texts of `script` in order, or what `script` makes of the prompt's text."""

    line: ModelLine
    tokenizer: ChatTokenizer

    def __init__(self, folder: Path, script: Script, *, token_delay_s: float = 0.0) -> None:
        """Raises ConfigError if `folder` is no model folder; its weights are hashed but not loaded."""
        self.line, self.tokenizer = read_line(folder), HfChatTokenizer(folder)
        self._script = script if callable(script) else _in_order(script)
        self._delay_s = token_delay_s
        self._tasks: dict[asyncio.Task[None], TokenStream] = {}
        self._alive = True

    @property
    def policy(self) -> Policy:
        """Always version 0 of the line `scripted`."""
        return Policy(SCRIPTED_LINE)

    def policy_of(self, version: int) -> Policy:
        """Only version 0 is there. Raises UnknownVersion for another."""
        if version != 0:
            raise UnknownVersion(f"adapter version {version} is not loaded; the scripted engine has only 0")
        return self.policy

    async def generate(self, request: GenerateRequest) -> Generation:
        """Start to give out the next reply. Raises EngineError when the script is used up."""
        if not self._alive:
            raise EngineGone("the scripted engine was closed")
        if request.version not in (None, 0):
            raise UnknownVersion(f"adapter version {request.version} is not loaded; the scripted engine has only 0")
        room = self.tokenizer.context_length - len(request.prompt_ids)
        if room < 1:
            raise PromptTooLong(f"prompt of {len(request.prompt_ids)} tokens leaves no room in the context")
        reply = self._script(self.tokenizer.decode(request.prompt_ids))
        stream = TokenStream(asyncio.get_running_loop())
        task = asyncio.create_task(self._play(stream, self._tokens(reply, min(room, request.max_tokens))))
        self._tasks[task] = stream
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return StreamGeneration(self.policy, stream, cancel=lambda: _cancel(task))

    async def load(self, policy: Policy, files: dict[str, bytes]) -> None:
        """Raises EngineError: there is no model to put an adapter on."""
        raise EngineError(f"a scripted engine takes no adapter, so version {policy.version} was not loaded")

    async def unload(self, version: int) -> None:
        """Raises UnknownVersion: there is only the script."""
        raise UnknownVersion(f"adapter version {version} is not loaded")

    async def use(self, version: int) -> Policy:
        """Only version 0 is there. Raises UnknownVersion for another."""
        return self.policy_of(version)

    async def score(
        self,
        prompt_ids: list[int],
        response_ids: list[int],
        *,
        version: int,
        temperature: float = 1.0,
        exact: bool = False,
    ) -> list[float]:
        """Raises EngineError: a script has no probabilities."""
        raise EngineError("a scripted engine cannot score; use the mlx engine")

    async def forget_prompts(self) -> None:
        """Does nothing: a script keeps nothing of prompts."""

    def health(self) -> EngineHealth:
        """Whether it was closed, and how many replies are being given out."""
        return EngineHealth(self._alive, len(self._tasks), [0], "scripted: not a model")

    async def close(self) -> None:
        """Stop; calls in flight end with EngineGone."""
        self._alive = False
        for task, stream in list(self._tasks.items()):
            task.cancel()
            stream.push(EngineGone("the scripted engine was closed while this call was in flight"))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _tokens(self, reply: str, limit: int) -> list[Token]:
        ids = [*self.tokenizer.encode(reply), min(self.tokenizer.eos_ids)]
        reason = "stop" if len(ids) <= limit else "length"
        kept = ids[:limit]
        return [Token(token_id, 0.0) for token_id in kept[:-1]] + [Token(kept[-1], 0.0, reason)]

    async def _play(self, stream: TokenStream, tokens: list[Token]) -> None:
        for token in tokens:
            await asyncio.sleep(self._delay_s)
            stream.push(token)


def _cancel(task: asyncio.Task[None]) -> None:
    if not task.get_loop().is_closed():
        task.cancel()


def _in_order(replies: Sequence[str]) -> Callable[[str], str]:
    left: Iterator[str] = iter(replies)

    def reply(_prompt: str) -> str:
        found = next(left, None)
        if found is None:
            raise EngineError(f"the script of {len(replies)} replies is used up; give it more")
        return found

    return reply

"""The owner's own rule, asked in a process of its own: `RuleScorer`, and `RuleChild` that keeps that process.

Whatever a rule does (loop, take all memory, exit, print, return nonsense), it costs its own case, and at most a new
process for the next one.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from clawloop_edge.child import Child
from clawloop_edge.errors import NotScorable, ScorerFailed
from clawloop_edge.pool.codec import to_json
from clawloop_edge.signals.protocol import Case, Moment, Verdict
from clawloop_edge.signals.rule_child import Answer, Begin, Call, Judged, Question, Ready, Trouble
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.pool.records import Json
    from clawloop_edge.signals.settings import RuleSettings

START_S = 30.0
"""for the process to be there, and its rule imported"""
_MODULE = "clawloop_edge.signals.rule_child"
_KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")
"""of the environment; the rest may hold secrets"""
_ANSWER = msgspec.msgpack.Decoder(Answer)


class RuleChild:
    """A process that runs rules and patterns. One question at a time, in the order in which they come."""

    def __init__(self, begin: Begin, *, name: str) -> None:
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        self._begin, self._name = begin, name
        self._child = Child(_MODULE, environment=environment, silent=True)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return self._child.pid

    async def ask(self, question: Question) -> Answer:
        """What a rule says.

        Raises:
            NotScorable: it failed at this question.
            ScorerFailed: it cannot be asked now.
        """
        if self._closed:
            raise ScorerFailed(f"{self._name} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, question)

    async def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        self._child.kill()
        self._thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.shutdown)
        self._child.end()

    def _ask(self, question: Question) -> Answer:
        if self._closed:
            raise ScorerFailed(f"{self._name} is closed")
        if not self._child.running:
            self._start()
        try:
            answer = self._exchange(question, within_s=self._begin.call_s)
        except TimeoutError as error:
            self._restart()
            raise NotScorable(f"{self._name} did not end within {self._begin.call_s:g} s") from error
        except (EOFError, OSError) as error:
            self._restart()
            raise NotScorable(f"{self._name}: its process ended within a call") from error
        except msgspec.DecodeError as error:
            self._restart()
            raise NotScorable(f"{self._name}: its process wrote what is no answer") from error
        if isinstance(answer, Trouble):
            raise NotScorable(f"{self._name}: {answer.reason}")
        return answer

    def _start(self) -> None:
        try:
            self._child.start()
            answer = self._exchange(self._begin, within_s=START_S)
        except (EOFError, OSError, msgspec.DecodeError) as error:
            self._restart()
            raise ScorerFailed(f"{self._name}: its process does not start ({type(error).__name__})") from error
        if not isinstance(answer, Ready):
            self._restart()
            reason = answer.reason if isinstance(answer, Trouble) else "it gave no sign"
            raise ScorerFailed(f"{self._name}: {reason}; see [signals.{self._name}] in the configuration")

    def _exchange(self, question: Question, *, within_s: float) -> Answer:
        answer: Answer = _ANSWER.decode(self._child.ask(msgspec.msgpack.encode(question), within_s=within_s))
        return answer

    def _restart(self) -> None:
        """Let the next question have a new process."""
        self._child.kill()
        self._child.end()


class RuleScorer:
    """Asks the owner's function."""

    name = "rule"
    moments = frozenset({Moment.FOLLOWED, Moment.ENDED})

    def __init__(self, settings: RuleSettings) -> None:
        """Raises ConfigError: no function is named."""
        if not all(settings.function.partition(":")[::2]):
            raise ConfigError(f"[signals.rule] function is {settings.function!r}; name one as `module:function`")
        begin = Begin(settings.function, settings.path, settings.call_s, settings.memory_bytes)
        self._settings, self.child = settings, RuleChild(begin, name=self.name)

    async def score(self, case: Case) -> list[Verdict]:
        """What the rule says of a case. Raises as `RuleChild.ask` does."""
        answer = await self.child.ask(Call(to_json(plain(case))))
        if not isinstance(answer, Judged):
            raise NotScorable("rule: its process answered something else")
        if answer.value is None:
            return []
        evidence = answer.evidence or f"rule {self._settings.function}"
        return [Verdict(value=answer.value, weight=answer.weight, evidence=evidence, comment=answer.comment)]

    async def close(self) -> None:
        """End its process."""
        await self.child.close()


def plain(case: Case) -> Json:
    """A case as a rule gets it: the last request and its reply, what was called on the way, and what followed."""
    answer = case.answer
    return {
        "moment": case.moment.value,
        "messages": answer.messages,
        "tools": answer.tools,
        "reply": answer.reply,
        "text": answer.reply.get("content") or "",
        "tool_calls": [call for kept in case.steps for call in kept.reply.get("tool_calls") or []],
        "following": case.following,
        "earlier": case.earlier,
        "metadata": case.metadata,
        "steps": len(case.steps),
        "prompt_tokens": len(answer.step.prompt_ids),
        "response_tokens": sum(len(kept.step.response_ids) for kept in case.steps),
        "finish_reason": answer.step.finish_reason,
        "app": answer.app,
    }

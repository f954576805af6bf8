"""Runs the owner's rule, or a pattern, in a process that may be killed at any moment. Asked by `rule.RuleChild`.

Its parent gives it no secret: neither the environment nor the pipe has one. What it answers is checked here, and again
over there. An error tells its kind and place, never its words: those may quote a conversation.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import signal
import sys
import traceback
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec

from clawloop_edge.child import MAX_FRAME_BYTES, behave, connect, held_bytes

_LATE_S = 5.0
"""a call that takes so much longer than it may has lost its parent, and ends this process"""


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """What is run: a function (`module:name`), imported with `path`, or none where only patterns are asked for."""

    function: str
    path: str
    call_s: float
    memory_bytes: int


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Judge a case: `case` is JSON."""

    case: bytes


class Match(msgspec.Struct, frozen=True, tag="match"):
    """Look for a pattern in a text, both as JSON: they may hold what is no UTF-8."""

    pattern: bytes
    text: bytes
    ignore_case: bool


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """What is asked for can be run."""


class Judged(msgspec.Struct, frozen=True, tag="judged"):
    """What the rule said; no value: no judgement."""

    value: float | None = None
    weight: float = 1.0
    comment: str = ""
    evidence: str = ""


class Found(msgspec.Struct, frozen=True, tag="found"):
    """The first group of a match, or all of it; `text` is JSON, none where nothing matched."""

    text: bytes | None = None


class Trouble(msgspec.Struct, frozen=True, tag="trouble"):
    """Why there is no answer."""

    reason: str


Question = Begin | Call | Match
Answer = Ready | Judged | Found | Trouble
Rule = Callable[[dict[str, Any]], Any]
_QUESTION = msgspec.msgpack.Decoder(Question)


def main() -> None:
    """Answer until the parent closes the pipe, or this process has grown too large."""
    pipe = connect()
    begin = _QUESTION.decode(pipe.recv_bytes(MAX_FRAME_BYTES))
    assert isinstance(begin, Begin), "the parent begins"
    behave(begin.memory_bytes)
    try:
        rule = _limited(begin, lambda: _load(begin))
        pipe.send_bytes(msgspec.msgpack.encode(rule if isinstance(rule, Trouble) else Ready()))
        while not isinstance(rule, Trouble) and held_bytes() < begin.memory_bytes // 2:
            question = _QUESTION.decode(pipe.recv_bytes(MAX_FRAME_BYTES))
            pipe.send_bytes(msgspec.msgpack.encode(_limited(begin, partial(_answer, question, rule))))
    except (EOFError, OSError):
        return  # the parent is gone, and so is all reason to stay


def _limited(begin: Begin, work: Callable[[], Any]) -> Any:
    """What `work` gives, or where it failed."""
    signal.setitimer(signal.ITIMER_REAL, begin.call_s + _LATE_S)
    try:
        return work()
    except _Refused as refused:
        return Trouble(str(refused))
    except BaseException as error:  # noqa: BLE001 - a rule may even exit; its parent must learn of it
        return Trouble(f"the rule broke off with {type(error).__name__}{_place(error)}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Refused(Exception):
    """A reason in our own words."""


def _load(begin: Begin) -> Rule | None:
    if not begin.function:
        return None
    if begin.path:
        sys.path.insert(0, begin.path)
    name, _, attribute = begin.function.partition(":")
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise _Refused(f"{begin.function} cannot be imported: there is no module {error.name}") from error
    except (ImportError, AttributeError) as error:
        raise _Refused(f"{begin.function} cannot be imported ({type(error).__name__}){_place(error)}") from error
    if not callable(found):
        raise _Refused(f"{begin.function} is no function, it is {type(found).__name__}")
    rule: Rule = found
    return rule


def _answer(question: Question, rule: Rule | None) -> Answer:
    if isinstance(question, Match):
        return _match(question)
    if not isinstance(question, Call) or rule is None:
        raise _Refused("no rule was named")
    return _judged(rule(json.loads(question.case.decode("utf-8", "surrogatepass"))))


def _match(question: Match) -> Answer:
    pattern, text = json.loads(question.pattern), json.loads(question.text.decode("utf-8", "surrogatepass"))
    try:
        compiled = _compiled(pattern, question.ignore_case)
    except (re.error, OverflowError, RecursionError) as error:
        raise _Refused(f"the pattern is none that Python knows ({type(error).__name__})") from error
    found = compiled.search(text)
    if found is None:
        return Found()
    return Found(json.dumps(found.group(1 if compiled.groups else 0) or "").encode())


@lru_cache(maxsize=256)
def _compiled(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE if ignore_case else 0)


def _judged(said: Any) -> Judged:
    """What a rule returned, as a judgement."""
    if said is None:
        return Judged()
    if not isinstance(said, dict):
        return Judged(_number(said, "value", low=-1.0))
    unknown = said.keys() - {"value", "weight", "comment", "evidence"}
    if unknown or "value" not in said:
        raise _Refused("the rule returned a dict without `value`, or with other keys than weight, comment, evidence")
    if said["value"] is None:
        return Judged()
    return Judged(
        _number(said["value"], "value", low=-1.0),
        _number(said.get("weight", 1.0), "weight", low=0.0),
        _text(said.get("comment", ""), "comment"),
        _text(said.get("evidence", ""), "evidence"),
    )


def _number(value: Any, name: str, *, low: float) -> float:
    if isinstance(value, bool):
        return 1.0 if value else low
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= 1.0:
        raise _Refused(f"the rule returned a {type(value).__name__} as {name}; it is a number from {low:g} to 1")
    return number


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Refused(f"the rule returned a {type(value).__name__} as {name}; it is a text")
    return value.encode("utf-8", "replace").decode()


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen ")]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


if __name__ == "__main__":
    main()

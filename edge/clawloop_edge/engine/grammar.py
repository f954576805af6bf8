"""Grammars that a response must match, and the state of one response in its grammar. Built on llguidance, which is
imported on first use; knows no MLX and no HTTP.

What a client sends as a schema is bounded before anything is built of it: size, depth, no references to elsewhere, and
limits on what the grammar and its patterns may cost. With them no schema that was tried takes a second to build or
0.1 s a token.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clawloop_edge.engine.tool_calls import ToolFormat
from clawloop_edge.errors import EngineError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from numpy.typing import NDArray

MAX_SCHEMA_BYTES = 64 << 10
MAX_DEPTH = 64
MAX_PATTERN_LENGTH = 10_000
"""characters that a pattern may ask for at least: a repeated text is written out, `a{1000000}` in 600 MiB"""
_STYLE: dict[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models write it in training data (json.dumps); free white space would let a model go on with it for ever"""
_LENIENT = {**_STYLE, "lenient": True, "coerce_one_of": True}
_UNCOUNTED = 10**9
_MARKS = ("call_start: ", "call_end: ")
_REGEX_PART = re.compile(r"\\[pPxuU]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|\{[^}]*\}|.", re.DOTALL)


def json_schema_grammar(schema: dict[str, Any]) -> str:
    """JSON text that `schema` allows. May take some 0.3 s for the largest schema.

    Raises:
        RequestError: the schema is too large, or uses what cannot be enforced.
    """
    text = _bounded(schema, "response_format")
    try:
        grammar = _of_schema(text)
    except ValueError as error:  # a number of more than 64 bits, half a surrogate pair
        raise RequestError(f"the schema is not JSON that can be enforced: {error}", param="response_format") from error
    return _valid(grammar, "response_format")


def json_object_grammar() -> str:
    """Any JSON object."""
    return _of_schema(json.dumps({"type": "object"}))


def tool_call_grammar(
    tool_format: ToolFormat, tools: Sequence[dict[str, Any]], *, only: str | None, several: bool
) -> str:
    """One tool call, or one and more if `several`, in the model's own format and nothing else. `tools` are in OpenAI's
    shape; `only` names the single one that may be called.

    Arguments follow the tool's schema as far as it can be enforced, to the letter if the tool says `strict`.

    Raises:
        RequestError: no such tool, a format that cannot be forced, or a schema that is too large or not understood.
    """
    if tool_format.name != "json_tools":
        raise RequestError(
            f"this model writes tool calls as {tool_format.name!r}, which cannot be forced; use tool_choice auto",
            param="tool_choice",
        )
    functions = [tool.get("function") or {} for tool in tools]
    chosen = [function for function in functions if only is None or function.get("name") == only]
    if not chosen:
        names = [function.get("name") for function in functions]
        raise RequestError(f"tool_choice asks for {only!r}; the tools of this request are {names}", param="tool_choice")
    return _valid(_tool_rules(tool_format, chosen, several=several), "tools")


def _tool_rules(tool_format: ToolFormat, functions: Sequence[dict[str, Any]], *, several: bool) -> str:
    """The rules in Lark's syntax; those of `_MARKS` are put in terms of tokens once the tokenizer is known."""
    rules = [
        "%llguidance {}",
        'start: call ("\\n" call)*' if several else "start: call",
        'call: call_start "\\n" body "\\n" call_end' if tool_format.end else 'call: call_start "\\n" body',
        f"call_start: {json.dumps(tool_format.start)}",
        "body: " + " | ".join(f"body{number}" for number in range(len(functions))),
    ]
    if tool_format.end:
        rules.append(f"call_end: {json.dumps(tool_format.end)}")
    for number, function in enumerate(functions):
        schema = json.loads(_bounded(function.get("parameters") or {"type": "object"}, "tools"))
        schema["x-guidance"] = _STYLE if function.get("strict") else _LENIENT
        head = f'{{"name": {json.dumps(str(function.get("name")), ensure_ascii=False)}, "arguments": '
        rules.append(f'body{number}: {json.dumps(head, ensure_ascii=False)} %json {json.dumps(schema)} "}}"')
    text = "\n".join(rules)
    if len(text) > 2 * MAX_SCHEMA_BYTES:
        raise RequestError(
            f"the tools have {len(text)} bytes of schemas; at most {2 * MAX_SCHEMA_BYTES} can be forced: name one tool "
            "in tool_choice, or use auto",
            param="tools",
        )
    return text


def _of_schema(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=_STYLE)  # type: ignore[arg-type]


def _bounded(schema: dict[str, Any], param: str) -> str:
    """The schema as JSON text. Raises RequestError if it is too large or deep, or refers to something outside it."""
    todo: list[tuple[Any, int]] = [(schema, 1)]
    while todo:
        part, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise RequestError(f"the schema is nested more than {MAX_DEPTH} deep; flatten it", param=param)
        if isinstance(part, dict):
            target = part.get("$ref", "#")
            if isinstance(target, str) and not target.startswith("#"):
                raise RequestError(
                    f"the schema refers to {target[:100]!r}; only its own parts can be used", param=param
                )
            _check_patterns(part, param)
        children = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        todo += [(child, depth + 1) for child in children]
    text = json.dumps(schema)
    if not isinstance(schema, dict) or len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(f"the schema is no object of at most {MAX_SCHEMA_BYTES} bytes; shorten it", param=param)
    return text


def _check_patterns(part: dict[str, Any], param: str) -> None:
    named = part.get("patternProperties")
    for pattern in (part.get("pattern"), *(named if isinstance(named, dict) else ())):
        if isinstance(pattern, str) and (length := _least_length(pattern)) > MAX_PATTERN_LENGTH:
            raise RequestError(
                f"a pattern of the schema asks for {length} characters and more; at most {MAX_PATTERN_LENGTH} can be "
                "enforced",
                param=param,
            )


def _least_length(pattern: str) -> int:
    """Characters that a match has at least, or more than that: of alternatives all are counted."""
    open_groups, last = [0], 0
    for part in _REGEX_PART.findall(pattern):
        count = re.search(r"\d+", part) if part[0] == "{" else None
        if part == "(":
            open_groups.append(0)
        elif part == ")" and len(open_groups) > 1:
            last = open_groups.pop()
            open_groups[-1] += last
        elif count is not None:
            more = min(last * max(int(count.group()[:9]) - 1, 0), _UNCOUNTED)
            open_groups[-1] += more
            last += more
        else:
            open_groups[-1] += 1
            last = 1
    return sum(open_groups)


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,  # they would show the schema
    )


def _valid(grammar: str, param: str) -> str:
    error = _error_of(grammar)
    if error:
        raise RequestError(f"the schema cannot be enforced: {error[:300]}; simplify it, or leave it out", param=param)
    return grammar


@lru_cache(maxsize=64)
def _error_of(grammar: str) -> str:
    """Why llguidance refuses a grammar; empty if it does not. Agents send the same tools again and again."""
    from llguidance import LLMatcher

    try:
        failed, words = LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no Exception; llguidance 1.9 ends so where it shortens a value
            raise
        return "it is no JSON schema"
    return words[0] if failed else ""


class Constraint:
    """Where one response stands in its grammar."""

    def __init__(self, matcher: LLMatcher, *, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """Computes the first mask, which costs most."""
        import numpy as np

        self._matcher, self._vocab_size, self._eos = matcher, vocab_size, sorted(eos_ids)
        self._bits = np.zeros(-(-vocab_size // 32), np.int32)
        self._ended = False
        self.error = ""
        self._fill()

    def allowed(self) -> NDArray[np.bool_] | None:
        """Which tokens may come next, by id; None after the end."""
        import numpy as np

        if self._ended:
            return None
        mask: NDArray[np.bool_] = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size] > 0
        return mask

    def accept(self, token_id: int) -> None:
        """Go on by a sampled token. If it cannot, `error` says why, and only the end may follow."""
        if token_id in self._eos:
            self._ended = True
        elif not self._ended and not self.error:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token_id)
            self._fill()

    def _fill(self) -> None:
        """Compute the mask of the next token."""
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            self.error = self._matcher.get_error().split("\n")[0][:200] or "unknown"
        if self.error or self._matcher.is_stopped():
            self._bits[:] = 0
            for token_id in self._eos:
                self._bits.view("uint8")[token_id // 8] |= 1 << token_id % 8


class Grammars:
    """Makes constraints for one model. Any thread may ask; the first to ask waits while the tokenizer is built."""

    def __init__(self, folder: Path, *, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._folder, self._vocab_size, self._eos_ids = folder, vocab_size, eos_ids
        self._lock = threading.Lock()
        self._built: LLTokenizer | None = None

    def constraint(self, grammar: str) -> Constraint:
        """A fresh response's place at the start of `grammar`. May take a second: call it in a thread of its own.

        Raises:
            RequestError: no text matches it, or it is too costly.
            EngineError: llguidance cannot use this model's tokenizer.
        """
        from llguidance import LLMatcher

        tokenizer = self._tokenizer()
        text = _in_tokens(grammar, lambda mark: tokenizer.tokenize_str(mark, parse_special=True))
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=_limits())
        made = Constraint(matcher, vocab_size=self._vocab_size, eos_ids=self._eos_ids)
        allowed = made.allowed()
        if made.error or allowed is None or allowed.sum() == sum(allowed[i] for i in self._eos_ids):
            raise RequestError(f"the schema cannot be enforced: {made.error or 'no text matches it'}; simplify it")
        return made

    def _tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._built is None:
                self._built = self._build()
            return self._built

    def _build(self) -> LLTokenizer:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        backend.no_padding()
        backend.no_truncation()
        try:
            return LLTokenizer(backend.to_str(), n_vocab=self._vocab_size, eos_token=sorted(self._eos_ids))
        except ValueError as error:
            raise EngineError(f"no grammar can be used with the tokenizer of {self._folder.name}: {error}") from error


def _in_tokens(grammar: str, encode: Callable[[str], list[int]]) -> str:
    """The rules with a marker that is one token given as that token: as text, no such token would match it."""
    lines = grammar.split("\n")
    for number, line in enumerate(lines):
        mark = next((name for name in _MARKS if line.startswith(name)), None)
        if mark is not None:
            ids = encode(json.loads(line.removeprefix(mark)))
            if len(ids) == 1:
                lines[number] = f"{mark}<[{ids[0]}]>"
    return "\n".join(lines)

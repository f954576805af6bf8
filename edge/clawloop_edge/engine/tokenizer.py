"""A model folder's own tokenizer and chat template, behind `ChatTokenizer`.

Text is encoded and decoded exactly: nothing is added, stripped or cleaned. Messages come in OpenAI's shape. Nothing is
fetched and no code of the folder is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from clawloop_edge.engine.detokenizer import ByteDetokenizer, WindowDetokenizer
from clawloop_edge.engine.protocol import Detokenizer
from clawloop_edge.engine.thinking import ThinkMarks
from clawloop_edge.engine.tool_calls import ToolFormat, Tools, parse_json_calls
from clawloop_edge.errors import RequestError
from clawloop_shared.errors import ConfigError
from clawloop_shared.model_line import read_config

_ROLES = {"system", "developer", "user", "assistant", "tool"}
_PROBE = '{"a":  1}'
"""arguments spaced as no serialiser would, to see whether a template keeps the very string"""
_LARGEST_CONTEXT = 1 << 24


class HfChatTokenizer:
    """The tokenizer of a folder in Hugging Face's layout (`tokenizer.json`, chat template, `config.json`)."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            ConfigError: no fast tokenizer, no chat template, or no context length in `folder`.
        """
        from mlx_lm.utils import load_config, load_tokenizer

        read_config(folder)
        wrapper = load_tokenizer(
            folder, {"local_files_only": True}, eos_token_ids=load_config(folder).get("eos_token_id")
        )
        self._hf: Any = wrapper._tokenizer
        if not getattr(self._hf, "is_fast", False):
            raise ConfigError(f"{folder} has no tokenizer.json; only fast tokenizers are supported")
        if not self._hf.chat_template:
            raise ConfigError(f"{folder} has no chat template; give an instruct model")
        self._backend: Any = self._hf.backend_tokenizer
        self.eos_ids = frozenset(int(i) for i in wrapper.eos_token_ids)
        self.context_length = _context_length(folder, self._hf.model_max_length)
        self.vocab_size = _vocab_size(folder)
        self.tool_format = _tool_format(wrapper)
        self.think_marks = ThinkMarks(wrapper.think_start, wrapper.think_end) if wrapper.has_thinking else None
        self._byte_level = _is_byte_level(self._backend)
        self._table: dict[int, bytes] = {}
        self._keeps_strings = self._template_keeps_strings()

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        *,
        thinking: bool | None = None,
    ) -> str:
        """The prompt text, ready for the assistant's turn; `thinking` is for templates that know `enable_thinking`.

        Raises:
            RequestError: a role or content that text models do not have, or the template refuses.
        """
        plain = [self._plain(message, position) for position, message in enumerate(messages)]
        more = {} if thinking is None else {"enable_thinking": thinking}
        return self._apply(plain, list(tools) if tools else None, **more)

    def render_closed(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation in which nobody is about to speak: without what opens the assistant's turn.

        Raises:
            RequestError: as `render` does.
        """
        plain = [self._plain(message, position) for position, message in enumerate(messages)]
        return self._apply(plain, None, add_generation_prompt=False)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; nothing is added. Other threads run meanwhile: `encode` would stop them all, for half a second
        at 50,000 tokens, and takes twice as long."""
        return list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def visible(self, ids: Sequence[int]) -> str:
        """The text of ids as the client should see it: without the end token."""
        return self.decode([i for i in ids if i not in self.eos_ids])

    def detokenizer(self) -> Detokenizer:
        """A fresh one for one response."""
        if self._byte_level:
            return ByteDetokenizer(self._table, self._backend.id_to_token, skip=self.eos_ids)
        return WindowDetokenizer(self.decode, skip=self.eos_ids)

    def _apply(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **more: Any) -> str:
        from jinja2 import TemplateError

        try:
            options = {"tokenize": False, "add_generation_prompt": True, **more}
            text = self._hf.apply_chat_template(messages, tools=tools, **options)
        except (TemplateError, TypeError, AttributeError, KeyError, ValueError) as error:
            reason = type(error).__name__ if not isinstance(error, TemplateError) else error.message
            raise RequestError(
                f"the model's chat template refuses these messages: {reason}", param="messages"
            ) from error
        return str(text)

    def _plain(self, message: dict[str, Any], position: int) -> dict[str, Any]:
        role = message.get("role")
        if role not in _ROLES:
            raise RequestError(f"messages[{position}].role is {role!r}; known are {sorted(_ROLES)}", param="messages")
        plain = dict(message, content=_text(message.get("content"), position))
        if role == "developer":
            plain["role"] = "system"
        if message.get("tool_calls"):
            plain["tool_calls"] = [self._plain_call(call) for call in message["tool_calls"]]
        else:
            plain.pop("tool_calls", None)
        return plain

    def _plain_call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function")
        if self._keeps_strings or not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
            return call
        try:
            arguments = msgspec.json.decode(function["arguments"] or "{}")
        except msgspec.DecodeError:
            return call  # the model once wrote what is no JSON; it is shown as it was
        return dict(call, function=dict(function, arguments=arguments))

    def _template_keeps_strings(self) -> bool:
        """Whether arguments given as a string appear as that very string (some templates would quote them again)."""
        function = {"name": "f", "arguments": _PROBE}
        call = {"id": "call0", "type": "function", "function": function}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return _PROBE in self._apply(messages, None)
        except RequestError:
            return False


def _text(content: Any, position: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part, position) for part in content)
    raise RequestError(f"messages[{position}].content is a {type(content).__name__}", param="messages")


def _part_text(part: Any, position: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(
        f"messages[{position}].content has a part of type {kind!r}; only text is supported", param="messages"
    )


def _context_length(folder: Path, tokenizer_limit: int) -> int:
    config = read_config(folder)
    sizes = [part.get("max_position_embeddings") for part in (config, config.get("text_config") or {})]
    found = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if found is None and tokenizer_limit < _LARGEST_CONTEXT:
        found = int(tokenizer_limit)
    if found is None:
        raise ConfigError(f"{folder}/config.json has no max_position_embeddings; add the model's context length")
    return found


def _vocab_size(folder: Path) -> int:
    config = read_config(folder)
    found = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(found, int):
        raise ConfigError(f"{folder}/config.json has no vocab_size; add the rows of the model's embedding")
    return found


def _is_byte_level(backend: Any) -> bool:
    """Whether ids decode to bytes one by one: the decoder is ByteLevel and nothing else."""
    decoder = msgspec.json.decode(backend.to_str(), type=_Decoders).decoder or {}
    kinds = [step.get("type") for step in decoder.get("decoders", [decoder])]
    return kinds == ["ByteLevel"]


class _Decoders(msgspec.Struct):
    decoder: dict[str, Any] | None = None


def _tool_format(wrapper: Any) -> ToolFormat | None:
    """mlx-lm's own guess from the chat template, behind our check of what its parser returns."""
    if not wrapper.has_tool_calling:
        return None
    name = str(wrapper._tokenizer.init_kwargs["tool_parser_type"])
    parse = parse_json_calls if name == "json_tools" else checked_parser(wrapper.tool_parser)
    return ToolFormat(name=name, start=wrapper.tool_call_start, end=wrapper.tool_call_end, parse=parse)


def checked_parser(parser: Any) -> Any:
    """One of mlx-lm's parsers, whatever it returns or raises, as `ToolFormat.parse`."""

    def parse(text: str, tools: Tools) -> list[tuple[str, str]]:
        try:
            found = parser(text, list(tools) or None)
            return [_pair(call) for call in (found if isinstance(found, list) else [found])]
        except (LookupError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
            raise ValueError(f"not a tool call: {type(error).__name__}") from error

    return parse


def _pair(call: Any) -> tuple[str, str]:
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a tool call needs a name and an object of arguments")
    return name, msgspec.json.encode(arguments).decode()

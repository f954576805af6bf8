"""One answer as it grows: what was sampled or received goes in, what the client may see comes out. Pure; knows no HTTP.

Sampled ids and logprobs are kept as they were; the message is only a view of them.
"""

from typing import Any

from clawloop_edge.engine.protocol import ChatTokenizer, Token
from clawloop_edge.engine.thinking import Reasoning, ThinkSplitter
from clawloop_edge.engine.tool_calls import Piece, ReplyParser, ToolCall
from clawloop_edge.gateway.stops import StopMatcher

Json = dict[str, Any]
CANCELLED = "cancelled"
ENGINE_GONE = "the engine stopped"
NOT_SAMPLED = "not sampled from the model"
CUT = "a stop string ended inside a token"


class Reply:
    """What a client was given of one answer. `ended` is the finish reason, or why there is none."""

    def __init__(self) -> None:
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self.calls: list[ToolCall] = []
        self.entries: list[Json] = []
        """logprobs in OpenAI's shape, if they were asked for"""
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.thought_tokens = 0
        """tokens up to the last one that was a thought"""
        self.ended = CANCELLED
        self.stopped_by: str | None = None
        """the stop string that was met"""

    @property
    def cut(self) -> bool:
        """Whether the delivered text ends inside a token."""
        return False

    @property
    def empty(self) -> bool:
        """Whether nothing at all was said."""
        return not (self.ids or self._content or self._reasoning or self.calls)

    @property
    def finish_reason(self) -> str:
        """OpenAI's finish reason."""
        return "tool_calls" if self.calls and self.ended == "stop" else self.ended

    @property
    def content(self) -> str:
        """The text that was delivered."""
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        """The thoughts that were delivered."""
        return "".join(self._reasoning)

    def take(self, pieces: list[Piece]) -> list[Piece]:
        """Note what is delivered."""
        for piece in pieces:
            if isinstance(piece, ToolCall):
                self.calls.append(piece)
            elif isinstance(piece, Reasoning):
                self._reasoning.append(piece.text)
                self.thought_tokens = len(self.ids)
            else:
                self._content.append(piece)
        return pieces

    def message(self) -> Json:
        """The assistant message as delivered."""
        content = self.content
        message: Json = {"role": "assistant", "content": content or (None if self.calls else "")}
        if self._reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call.as_openai() for call in self.calls]
        return message

    def text(self) -> str:
        """Everything that was said, as raw as it is known."""
        return self.content


class TokenReply(Reply):
    """An answer made of sampled tokens."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        *,
        stops: tuple[str, ...] = (),
        tools: list[Json] | None = None,
        one_call: bool = False,
        thinking: bool = False,
        verbatim: bool = False,
    ) -> None:
        """`tools` are those offered; None or none: calls are text. `one_call` ends the answer with its first call;
        `thinking`: the prompt ends within the model's thoughts; `verbatim`: all text is delivered as it is, and what it
        says of calls is delivered beside it."""
        super().__init__()
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopMatcher(stops)
        self._thoughts = ThinkSplitter(tokenizer.think_marks, begun=thinking)
        self._parser = ReplyParser(tokenizer.tool_format if tools else None, tools=tools or [])
        self._one_call, self._verbatim = one_call, verbatim

    @property
    def stopped(self) -> bool:
        """Whether no more tokens are wanted: a stop string was met, or the one call that may be made is there."""
        return self._stops.stopped or (self._one_call and bool(self.calls))

    @property
    def cut(self) -> bool:
        """Whether the delivered text ends inside a token."""
        return bool(self._stops.rest)

    def add(self, token: Token) -> list[Piece]:
        """Take one token; give what can be delivered now."""
        self.ids.append(token.token_id)
        self.logprobs.append(token.logprob)
        text = self._stops.feed(self._detokenizer.add(token.token_id))
        pieces = self._take(text) if text else []
        if token.finish_reason or self.stopped:
            self.ended = token.finish_reason or "stop"
        return pieces

    def finish(self) -> list[Piece]:
        """The last pieces, once no more tokens come."""
        text = ""
        if not self.stopped:
            text = self._stops.feed(self._detokenizer.finish())
            text += self._stops.finish()
        self.stopped_by = self._stops.met
        pieces = self._take(text)
        return pieces + self._seen([*self._parsed(self._thoughts.finish()), *self._parser.finish()], text="")

    def text(self) -> str:
        """Everything that was sampled, special tokens included."""
        return self._tokenizer.decode(self.ids)

    def _take(self, text: str) -> list[Piece]:
        return self._seen(self._parsed(self._thoughts.feed(text)), text=text)

    def _parsed(self, parts: list[Reasoning | str]) -> list[Piece]:
        found: list[Piece] = []
        for part in parts:
            found += self._parser.feed(part) if isinstance(part, str) else [part]
        return found

    def _seen(self, pieces: list[Piece], *, text: str) -> list[Piece]:
        """What is delivered of the pieces found in `text`: of several calls the first alone if it may be but one."""
        if self._verbatim:
            pieces = [*([text] if text else []), *(piece for piece in pieces if isinstance(piece, ToolCall))]
        if self._one_call:
            room = 0 if self.calls else 1
            calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
            pieces = [piece for piece in pieces if not isinstance(piece, ToolCall) or piece in calls[:room]]
        return self.take(pieces)


def logprob_entry(tokenizer: ChatTokenizer, token: Token) -> Json:
    """One token in OpenAI's `logprobs.content`; a part of a character has no bytes of its own to show."""
    top = [_shown(tokenizer, token_id, logprob) for token_id, logprob in token.top]
    return {**_shown(tokenizer, token.token_id, token.logprob), "top_logprobs": top}


def _shown(tokenizer: ChatTokenizer, token_id: int, logprob: float) -> Json:
    text = tokenizer.decode([token_id])
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

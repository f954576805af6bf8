"""One answer as it grows: sampled tokens in, what the client may see out. Pure; knows no HTTP.

The ids and logprobs are kept as they were sampled; the message is only a view of them.
"""

from typing import Any

from clawloop_edge.engine.protocol import ChatTokenizer, Token
from clawloop_edge.engine.tool_calls import Piece, ReplyParser, ToolCall
from clawloop_edge.gateway.chat_request import ChatCall
from clawloop_edge.gateway.stops import StopMatcher

CANCELLED = "cancelled"
ENGINE_GONE = "the engine stopped"
NOT_SAMPLED = "not sampled from the model"
CUT = "a stop string ended inside a token"


class Reply:
    """Collects one answer."""

    def __init__(self, tokenizer: ChatTokenizer, call: ChatCall) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopMatcher(call.stops)
        self._parser = ReplyParser(tokenizer.tool_format if call.offered else None, tools=call.offered)
        self._content: list[str] = []
        self.calls: list[ToolCall] = []
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.ended = CANCELLED
        """the engine's finish reason, or why there is none"""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met: no more tokens are wanted."""
        return self._stops.stopped

    @property
    def cut(self) -> bool:
        """Whether the delivered text ends inside a token."""
        return bool(self._stops.rest)

    @property
    def finish_reason(self) -> str:
        """OpenAI's finish reason."""
        return "tool_calls" if self.calls else self.ended

    @property
    def content(self) -> str:
        """The text that was delivered."""
        return "".join(self._content)

    def add(self, token: Token) -> list[Piece]:
        """Take one token; give what can be delivered now."""
        self.ids.append(token.token_id)
        self.logprobs.append(token.logprob)
        text = self._stops.feed(self._detokenizer.add(token.token_id))
        if token.finish_reason or self._stops.stopped:
            self.ended = token.finish_reason or "stop"
        return self._take(self._parser.feed(text)) if text else []

    def finish(self) -> list[Piece]:
        """The last pieces, once no more tokens come."""
        text = ""
        if not self._stops.stopped:
            text = self._stops.feed(self._detokenizer.finish())
            text += self._stops.finish()
        return self._take(self._parser.feed(text) + self._parser.finish())

    def message(self) -> dict[str, Any]:
        """The assistant message as delivered."""
        content = self.content
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if self.calls else "")}
        if self.calls:
            message["tool_calls"] = [call.as_openai() for call in self.calls]
        return message

    def text(self) -> str:
        """Everything that was sampled, special tokens included."""
        return self._tokenizer.decode(self.ids)

    def _take(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            if isinstance(piece, ToolCall):
                self.calls.append(piece)
            else:
                self._content.append(piece)
        return pieces


def logprob_entry(tokenizer: ChatTokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    """One token in OpenAI's `logprobs.content`; a part of a character has no bytes of its own to show."""
    text = tokenizer.decode([token_id])
    return {
        "token": text,
        "logprob": logprob,
        "bytes": None if "\ufffd" in text else list(text.encode()),
        "top_logprobs": [],
    }

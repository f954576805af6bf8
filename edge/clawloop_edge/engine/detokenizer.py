"""Text of tokens as they arrive, each in constant time, equal to decoding them all at once.

Byte-level BPE (Qwen, Llama 3, GPT-2's children) is decoded byte by byte; any other tokenizer by decoding a short window
again. Knows no model and no chat template.
"""

import codecs
from collections.abc import Callable, Sequence
from functools import cache

Decode = Callable[[Sequence[int]], str]
_WINDOW_TOKENS = 8


@cache
def _byte_of() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet stands for.

    Source: the table of GPT-2's encoder; printable Latin-1 stands for itself, the rest starts at U+0100.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def token_bytes(piece: str) -> bytes:
    """The bytes of one piece of a byte-level vocabulary; one outside its alphabet (an added token) is plain text."""
    table = _byte_of()
    try:
        return bytes([table[letter] for letter in piece])
    except KeyError:
        return piece.encode()


class ByteDetokenizer:
    """For byte-level BPE: a table from id to bytes, filled as ids are seen, and an incremental UTF-8 decoder."""

    def __init__(self, table: dict[int, bytes], piece_of: Callable[[int], str | None], *, skip: frozenset[int]) -> None:
        self._table, self._piece_of, self._skip = table, piece_of, skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id in self._skip:
            return ""
        data = self._table.get(token_id)
        if data is None:
            data = self._table[token_id] = token_bytes(self._piece_of(token_id) or "")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """U+FFFD for bytes that never became a character."""
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For other tokenizers: decodes the last few tokens with and without the new one and gives out the difference."""

    def __init__(self, decode: Decode, *, skip: frozenset[int]) -> None:
        self._decode, self._skip = decode, skip
        self._before: list[int] = []  # given out; kept because a piece's text may depend on its neighbours
        self._open: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id in self._skip:
            return ""
        self._open.append(token_id)
        text = self._difference()
        if text.endswith("\ufffd") and len(self._open) < _WINDOW_TOKENS:
            return ""
        return self._give_out(text)

    def finish(self) -> str:
        """What was held back."""
        return self._give_out(self._difference()) if self._open else ""

    def _difference(self) -> str:
        return self._decode(self._before + self._open)[len(self._decode(self._before)) :]

    def _give_out(self, text: str) -> str:
        self._before, self._open = (self._before + self._open)[-_WINDOW_TOKENS:], []
        return text

"""What a model folder says of its ids: the bytes of each, which are special, and which one may stand for what was taken
out. Reads `tokenizer.json` by itself, so that a process that only redacts needs no tokenizer library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from clawloop_edge.engine.detokenizer import token_bytes
from clawloop_shared.errors import ConfigError
from clawloop_shared.model_line import read_config

_UNUSED_NAME = re.compile(r"reserved|unused|extra_?\d|placeholder", re.IGNORECASE)
_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ADVICE = "choose a level below `redacted`"


@dataclass(frozen=True)
class Ids:
    """The bytes of each id, the ids of special tokens, and the one to replace by."""

    pieces: list[bytes]
    special_ids: frozenset[int]
    reserved_id: int


def read_ids(folder: Path) -> Ids:
    """The ids of a model folder.

    Raises:
        ConfigError: `tokenizer.json` is missing, or of a kind whose ids have no bytes of their own; or no id of it can
            replace others.
    """
    path = folder / "tokenizer.json"
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; redaction needs the model's tokenizer") from error
    to_bytes = _decoder(file.decoder, path)
    names = _names(file.model, path) | {token.id: token.content for token in file.added_tokens}
    pieces = [b""] * (max(names, default=-1) + 1)
    for number, name in names.items():
        pieces[number] = to_bytes(name)
    special = frozenset(token.id for token in file.added_tokens if token.special)
    return Ids(pieces, special, _choose_reserved(file.added_tokens, folder))


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _File(msgspec.Struct):
    model: dict[str, Any]
    decoder: dict[str, Any] | None = None
    added_tokens: list[_Added] = []


def _names(model: dict[str, Any], path: Path) -> dict[int, str]:
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        return {number: piece for piece, number in vocabulary.items()}
    if isinstance(vocabulary, list):  # sentencepiece's unigram: pieces with their scores, in the order of their ids
        return {number: piece for number, (piece, _) in enumerate(vocabulary)}
    raise ConfigError(f"{path} has no vocabulary that redaction can read; {_ADVICE}")


def _decoder(decoder: dict[str, Any] | None, path: Path) -> Callable[[str], bytes]:
    """How a piece becomes bytes. Source: the documentation of the `tokenizers` library's decoders."""
    steps = (decoder or {}).get("decoders", [decoder or {}])
    kinds = {str(step.get("type")) for step in steps}
    if kinds == {"ByteLevel"}:
        return token_bytes
    spaces = [step for step in steps if step.get("type") in ("Replace", "Metaspace")]
    known = kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}
    if spaces and known and all(_makes_spaces(step) for step in spaces):
        return _bytes_with_fallback if "ByteFallback" in kinds else _bytes_of_words
    named = ", ".join(sorted(kinds))
    raise ConfigError(f"{path}: redaction does not know how the decoder {named} makes text of ids; {_ADVICE}")


def _makes_spaces(step: dict[str, Any]) -> bool:
    """Whether this step does nothing but turn sentencepiece's mark into a space."""
    if step["type"] == "Metaspace":
        return bool(step.get("replacement", _SPACE) == _SPACE)
    return bool((step.get("pattern") or {}).get("String") == _SPACE and step.get("content") == " ")


def _bytes_of_words(piece: str) -> bytes:
    return piece.replace(_SPACE, " ").encode()


def _bytes_with_fallback(piece: str) -> bytes:
    """The same, where a piece `<0x0A>` stands for one byte."""
    found = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(found[1], 16)]) if found else _bytes_of_words(piece)


def _choose_reserved(added: Iterable[_Added], folder: Path) -> int:
    """The id that replaces, always the same for a folder: a token named for redaction; else a special one whose name
    says that it is unused; else a special one that nothing in the folder names; else padding; else unknown.

    Raises:
        ConfigError: there is none of them, or none that the model has a row for.
    """
    rows, ends = _rows_and_ends(folder)
    settings, template = _json(folder / "tokenizer_config.json"), _template(folder)
    known = sorted((token for token in added if token.id < rows), key=lambda token: token.id)
    roles = ("bos_token", "eos_token", "sep_token", "cls_token", "mask_token")
    busy = {_content(settings.get(role)) for role in roles}
    spare = [token for token in known if token.special and token.id not in ends and token.content not in busy]
    pad, unknown = _content(settings.get("pad_token")), _content(settings.get("unk_token"))
    free = [t for t in spare if t.content not in (pad, unknown) and t.content not in template]
    ranked = [
        *(token for token in known if "redact" in token.content.lower()),
        *(token for token in free if _UNUSED_NAME.search(token.content)),
        *free,
        *(token for token in spare if token.content == pad),
        *(token for token in spare if token.content == unknown),
    ]
    if not ranked:
        raise ConfigError(f"{folder} has no special token to redact with; {_ADVICE}")
    return ranked[0].id


def _rows_and_ends(folder: Path) -> tuple[int, set[int]]:
    """How many ids the model knows, and those that end a response."""
    config, generation = read_config(folder), _json(folder / "generation_config.json")
    text_config = config.get("text_config") or {}
    ends: set[int] = set()
    for source in (config, text_config, generation):
        value = source.get("eos_token_id")
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return int(config.get("vocab_size") or text_config.get("vocab_size") or 0), ends


def _template(folder: Path) -> str:
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text()
    return str(_json(folder / "tokenizer_config.json").get("chat_template") or "")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _content(value: Any) -> str:
    """A token's text; settings name it plainly or as an object. Empty: they name none."""
    return str((value.get("content") if isinstance(value, dict) else value) or "")

"""The versioned encoding of everything that crosses between edge and server, and of what the pool keeps.

    magic "CLW" | version (1 byte) | length of the tag (1 byte) | tag | zstd of msgpack

The tag names the struct, so that bytes of one kind cannot be read as another. Decoding is bounded: it never
trusts the frame's own word on its size. The format is described in docs/formats/wire.md.
"""

from io import BytesIO
from typing import TypeVar

import msgspec
import zstandard

from clawloop_shared.errors import WireError

MAGIC = b"CLW"
VERSION = 1
MAX_DECODED_BYTES = 64 << 20
MAX_RATIO = 200
_WINDOW_BYTES = 8 << 20
_RATIO_FLOOR_BYTES = 1 << 20

T = TypeVar("T", bound=msgspec.Struct)


def _tag(kind: type[msgspec.Struct]) -> bytes:
    tag = kind.__struct_config__.tag
    if not isinstance(tag, str):
        raise WireError(f"{kind.__name__} has no tag and cannot be sent")
    return tag.encode()


def encode(value: msgspec.Struct, *, level: int = 3) -> bytes:
    """`value` as bytes of ours. Its type must have a tag."""
    tag = _tag(type(value))
    packed = zstandard.ZstdCompressor(level=level).compress(msgspec.msgpack.encode(value))
    return MAGIC + bytes((VERSION, len(tag))) + tag + packed


def decode(data: bytes, kind: type[T], *, max_bytes: int = MAX_DECODED_BYTES) -> T:
    """The value of type `kind` that `data` holds.

    Raises:
        WireError: other bytes, another kind, a newer version, a size over `max_bytes`, or a field that is wrong.
    """
    tag = _tag(kind)
    if data[:3] != MAGIC or len(data) < 5:
        raise WireError(f"not a clawloop message: it starts with {data[:5]!r}")
    if data[3] != VERSION:
        raise WireError(f"message version {data[3]}; this clawloop reads version {VERSION}: update the older side")
    if data[5 : 5 + data[4]] != tag:
        raise WireError(f"message of kind {data[5 : 5 + data[4]]!r}, expected {tag!r}")
    packed = data[5 + data[4] :]
    limit = min(max_bytes, max(_RATIO_FLOOR_BYTES, len(packed) * MAX_RATIO))
    try:
        return msgspec.msgpack.decode(_decompress(packed, limit), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{tag.decode()}: {error}") from error


def _decompress(packed: bytes, limit: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(BytesIO(packed)) as reader:
            plain: bytes = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise WireError(f"broken compression: {error}") from error
    if len(plain) > limit:
        raise WireError(f"message of {len(packed)} bytes unpacks to more than {limit} bytes")
    return plain

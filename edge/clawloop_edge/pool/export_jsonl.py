"""An export as lines of JSON: the head, the records, the manifest; packed by zstd if the file is named `.zst`."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec
import zstandard

from clawloop_edge.errors import ExportInvalid
from clawloop_edge.pool.exported import Head, Manifest, Record, fields_in, record_of
from clawloop_edge.pool.records import Json

T = TypeVar("T")
MAX_LINE_BYTES = 256 << 20
_ZSTD = b"\x28\xb5\x2f\xfd"
_WINDOW_LOG = 23
"""8 MiB: a conversation's history is mostly within it, and reading takes no more memory than that"""


class JsonLines:
    """Writes lines."""

    def __init__(self, file: BinaryIO, head: Head, *, packed: bool) -> None:
        settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=_WINDOW_LOG, enable_ldm=True)
        compressor = zstandard.ZstdCompressor(compression_params=settings)
        self._packed = compressor.stream_writer(file, closefd=False) if packed else None
        self._out: BinaryIO | zstandard.ZstdCompressionWriter = self._packed or file
        self._out.write(_line({"type": "head"}, head))

    def write(self, fields: Json, line: bytes) -> None:
        self._out.write(line)

    def finish(self, manifest: Manifest) -> None:
        self._out.write(_line({"type": "manifest"}, manifest))
        if self._packed:
            self._packed.flush(zstandard.FLUSH_FRAME)


class JsonLinesContent:
    """Reads lines."""

    def __init__(self, path: Path) -> None:
        """Raises ExportInvalid: it does not begin as an export does."""
        self._path = path
        self.manifest: Manifest | None = None
        with self._open() as lines:
            self.head = _struct(_next(lines), "head", Head)

    def __iter__(self) -> Iterator[tuple[Record, bytes]]:
        with self._open() as lines:
            _next(lines)
            while line := _next(lines):
                fields = fields_in(line)
                if fields.get("type") == "manifest":
                    self.manifest = _struct(line, "manifest", Manifest)
                    if _next(lines):
                        raise ExportInvalid("it goes on after its manifest")
                    return
                yield record_of(fields), line

    def _open(self) -> io.BufferedIOBase:
        file = self._path.open("rb")
        packed = file.read(4) == _ZSTD
        file.seek(0)
        if not packed:
            return file
        reader = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG).stream_reader(file, closefd=True)
        return io.BufferedReader(reader)


def _line(kind: Json, value: Head | Manifest) -> bytes:
    fields: Json = kind | msgspec.to_builtins(value)
    return msgspec.json.encode(fields) + b"\n"


def _next(lines: io.BufferedIOBase) -> bytes:
    try:
        line = lines.readline(MAX_LINE_BYTES)
    except (zstandard.ZstdError, EOFError) as error:
        raise ExportInvalid(f"it cannot be unpacked: {error}") from error
    if line and not line.endswith(b"\n"):
        raise ExportInvalid(f"it is cut off, or has a line of more than {MAX_LINE_BYTES >> 20} MiB")
    return line


def _struct(line: bytes, kind: str, shape: type[T]) -> T:
    fields = fields_in(line) if line else {}
    try:
        if fields.get("type") == kind:
            return msgspec.convert(fields, shape)
    except msgspec.ValidationError:
        pass
    raise ExportInvalid(f"it has no {kind} where an export has it")

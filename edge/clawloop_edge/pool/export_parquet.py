"""An export as one Parquet table: a row a record, the head and the manifest in the file's metadata. Needs pyarrow.

Columns are the fields of `exported.fields_of`; what is JSON there (reply, messages, tools, hint) is JSON text here. A
batch with a value that Parquet has no type for (half a surrogate pair, a number of more than 64 bits) is kept as lines
in the column `exact`.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from clawloop_edge.errors import ExportInvalid
from clawloop_edge.pool.codec import from_json, to_json
from clawloop_edge.pool.exported import (
    CURATION_FIELDS,
    SIGNAL_FIELDS,
    STEP_FIELDS,
    TEXTS,
    Head,
    Manifest,
    Record,
    fields_in,
    fields_of,
    line_of,
    record_of,
)
from clawloop_edge.pool.records import Json
from clawloop_shared.errors import ConfigError

MAGIC = b"PAR1"
_HEAD, _MANIFEST = b"clawloop.head", b"clawloop.manifest"
_BATCH_ROWS, _BATCH_BYTES = 512, 16 << 20
_JSON = ("reply", "messages", "tools", "hint")
_TIMES = ("created_ms", "started_ms", "first_token_ms", "finished_ms")
_NUMBERS = (*_TIMES, "adapter_version", "top_k", "seed", "group_size", "quality")
_FLOATS = ("temperature", "top_p", "min_p", "value", "weight")


class Parquet:
    """Writes a table, batch by batch."""

    def __init__(self, file: BinaryIO, head: Head) -> None:
        """Raises ConfigError: pyarrow is not installed."""
        _, parquet = pyarrow()
        self._schema = _schema()
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")
        self._writer.add_key_value_metadata({_HEAD: msgspec.json.encode(head)})
        self._rows: list[tuple[Json, bytes]] = []
        self._size = 0

    def write(self, fields: Json, line: bytes) -> None:
        self._rows.append((fields, line))
        self._size += len(line)
        if len(self._rows) >= _BATCH_ROWS or self._size >= _BATCH_BYTES:
            self._flush()

    def finish(self, manifest: Manifest) -> None:
        self._flush()
        self._writer.add_key_value_metadata({_MANIFEST: msgspec.json.encode(manifest)})
        self._writer.close()

    def _flush(self) -> None:
        arrow, _ = pyarrow()
        rows, self._rows, self._size = self._rows, [], 0
        try:
            table = arrow.Table.from_pylist([_row(fields) for fields, _ in rows], schema=self._schema)
        except (UnicodeError, OverflowError, arrow.ArrowException):
            exact = [{"type": fields["type"], "exact": line} for fields, line in rows]
            table = arrow.Table.from_pylist(exact, schema=self._schema)
        self._writer.write_table(table)


class ParquetContent:
    """Reads a table, batch by batch."""

    def __init__(self, path: Path) -> None:
        """Raises ExportInvalid: it is no export; ConfigError: pyarrow is not installed."""
        arrow, parquet = pyarrow()
        self._path, self._broken = path, arrow.ArrowException
        try:
            with parquet.ParquetFile(path) as file:
                metadata = file.schema_arrow.metadata or {}
                metadata |= file.metadata.metadata or {}
            self.head = msgspec.json.decode(metadata[_HEAD], type=Head)
            self.manifest: Manifest | None = msgspec.json.decode(metadata[_MANIFEST], type=Manifest)
        except (OSError, LookupError, msgspec.DecodeError, arrow.ArrowException) as error:
            raise ExportInvalid(f"it has no head or no manifest ({type(error).__name__})") from error

    def __iter__(self) -> Iterator[tuple[Record, bytes]]:
        _, parquet = pyarrow()
        try:
            with parquet.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        yield self._record(row)
        except (OSError, ValueError, self._broken) as error:
            raise ExportInvalid(f"it is damaged ({type(error).__name__})") from error

    def _record(self, row: Json) -> tuple[Record, bytes]:
        if row.get("exact") is not None:
            return record_of(fields_in(row["exact"])), row["exact"]
        text = self.head.chosen.text
        fields_by_type = {"signal": SIGNAL_FIELDS, "curation": CURATION_FIELDS}
        try:
            names = fields_by_type.get(row["type"]) or (*STEP_FIELDS, *(TEXTS if text else ()))
            fields = {name: from_json(row[name].encode()) if name in _JSON else row[name] for name in names}
        except (LookupError, AttributeError, ValueError) as error:
            raise ExportInvalid(f"it has a row that is no record ({type(error).__name__})") from error
        record = record_of(fields)
        return record, line_of(fields_of(record, text=text))


def _row(fields: Json) -> Json:
    return fields | {name: to_json(fields[name]).decode() for name in _JSON if name in fields}


def _schema() -> Any:
    arrow, _ = pyarrow()
    lists = {
        "prompt_ids": arrow.list_(arrow.int64()),
        "response_ids": arrow.list_(arrow.int64()),
        "response_logprobs": arrow.list_(arrow.float64()),
        "redacted": arrow.list_(arrow.list_(arrow.int64())),
        "trainable": arrow.bool_(),
        "tags": arrow.list_(arrow.string()),
        "untags": arrow.list_(arrow.string()),
        "exact": arrow.binary(),
    }
    types = {name: arrow.int64() for name in _NUMBERS} | {name: arrow.float64() for name in _FLOATS} | lists
    names = dict.fromkeys((*STEP_FIELDS, *TEXTS, *SIGNAL_FIELDS, *CURATION_FIELDS, "exact"))
    return arrow.schema([(name, types.get(name, arrow.string())) for name in names])


def pyarrow() -> tuple[Any, Any]:
    """The library, loaded when it is needed."""
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow; run: pip install 'clawloop[export]', or choose jsonl") from error

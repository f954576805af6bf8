"""Files in other programs' formats: writing their rows, and the manifest beside each, against which one is checked."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from clawloop_edge.errors import ExportInvalid
from clawloop_edge.pool.export_parquet import pyarrow
from clawloop_edge.pool.exported import Head
from clawloop_edge.pool.records import Json
from clawloop_shared.errors import StorageError

IS = "clawloop.derived.v1"
_BATCH_ROWS = 256


class DerivedManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a file of another program's format, and where it is from. It holds text: the tokens that were sampled,
    and with them what makes a step trainable here, are not in it.

    `steps`, `sessions`, `signals`: what it was made of; `left_out`: how much was not, and why.
    """

    head: Head
    file: str
    rows: int
    steps: int
    sessions: int
    signals: int
    left_out: dict[str, int]
    details: dict[str, float]
    size_bytes: int
    sha256: str
    content: str = "text"
    type: str = IS


def beside(path: Path) -> Path:
    """Where the manifest of a file is."""
    return path.with_name(f"{path.name}.manifest.json")


def write_lines(file: BinaryIO, rows: Iterable[Json]) -> int:
    """Write a line of JSON a row; gives how many. What is no Unicode text, or no number of JSON, is replaced."""
    number = 0
    for row in rows:
        file.write(_line(row))
        number += 1
    return number


def _line(row: Json) -> bytes:
    try:
        return msgspec.json.encode(row) + b"\n"
    except (OverflowError, UnicodeEncodeError):  # a number of more than 64 bits; half of a surrogate pair
        text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
        return text.encode("utf-8", "replace") + b"\n"


def write_table(file: BinaryIO, rows: Iterable[Json]) -> int:
    """Write a table of verl's columns; gives the number of rows.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    arrow, parquet = pyarrow()
    schema, number, left = _verl_schema(arrow), 0, iter(rows)
    with closing(parquet.ParquetWriter(file, schema, compression="zstd")) as writer:
        while batch := [_unicode(row) for row in islice(left, _BATCH_ROWS)]:
            writer.write_table(arrow.Table.from_pylist(batch, schema=schema))
            number += len(batch)
    return number


def _verl_schema(arrow: Any) -> Any:
    text = arrow.string()
    extra = {name: text for name in ("split", "step_id", "group_id", "answer")}
    extra |= {"index": arrow.int64(), "reward": arrow.float64(), "weight": arrow.float64()}
    return arrow.schema(
        [
            ("data_source", text),
            ("prompt", arrow.list_(arrow.struct([("role", text), ("content", text)]))),
            ("ability", text),
            ("reward_model", arrow.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", arrow.struct(list(extra.items()))),
        ]
    )


def _unicode(value: Any) -> Any:
    """`value` with half a surrogate pair replaced wherever there is one."""
    if isinstance(value, dict):
        return {name: _unicode(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_unicode(each) for each in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def check_derived(path: Path) -> DerivedManifest:
    """Hold a file against the manifest beside it.

    Raises:
        ExportInvalid: it is not what its manifest says, or that is none.
        StorageError: one of them cannot be read.
    """
    try:
        manifest = msgspec.json.decode(beside(path).read_bytes(), type=DerivedManifest)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = path.stat().st_size
    except msgspec.DecodeError as error:
        raise ExportInvalid(f"{beside(path)} is no manifest of an export") from error
    except OSError as error:
        raise StorageError(f"cannot read {error.filename}: {error.strerror}") from error
    if manifest.type != IS:
        raise ExportInvalid(f"{beside(path)} is of the kind {manifest.type!r}, and this clawloop reads {IS!r}")
    if (manifest.size_bytes, manifest.sha256) != (size, digest):
        raise ExportInvalid(f"{path} was changed since it was written: it is not what {beside(path).name} says")
    return manifest

"""The running totals of secure sums, each in a file of its own beside the database: a row that has one would be written
anew, all of it, at every answer.

    sums/SUM    length (4 bytes, big endian) | msgpack of `Counted` | the total, little-endian numbers of 32 bits

A file says itself whose values are in its total, and is the truth of that: it is written once in a while, and whoever
came since is asked again after a restart. A total is masked: without the members it says nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from pathlib import Path

import msgspec
import numpy as np

from clawloop_shared.errors import StorageError
from clawloop_shared.files import private_folder, publish_secret
from clawloop_shared.fixed_point import Ring

FOLDER = "sums"
_LENGTH = struct.Struct(">I")


class Counted(msgspec.Struct):
    """Whose values are in a total, by place, and by what name each knows its part."""

    places: list[int] = []
    items: dict[int, str] = {}


class Totals:
    """The files of one hub."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, sum_id: str, counted: Counted, total: Ring) -> None:
        """Keep a total, on disk when this returns. Raises StorageError."""
        head = msgspec.msgpack.encode(counted)
        values = total.astype("<u4", copy=False).tobytes()
        publish_secret(private_folder(self._folder) / sum_id, _LENGTH.pack(len(head)) + head + values)

    def read(self, sum_id: str, *, values: int) -> tuple[Counted, Ring]:
        """What was kept last: whose it is, and the total of so many values; nobody's, if there is none.

        Raises:
            StorageError: the file is not one, or cannot be read.
        """
        path = self._folder / sum_id
        try:
            data = path.read_bytes()
            (length,) = _LENGTH.unpack_from(data)
            counted = msgspec.msgpack.decode(data[_LENGTH.size : _LENGTH.size + length], type=Counted)
            total = np.frombuffer(data, "<u4", offset=_LENGTH.size + length).copy()
        except FileNotFoundError:
            return Counted(), np.zeros(values, np.uint32)
        except (OSError, struct.error, ValueError) as error:
            raise StorageError(f"{path} holds no total of a secure sum: {error}") from error
        if len(total) != values:
            raise StorageError(f"{path} holds {len(total)} values, not {values}")
        return counted, total

    def drop(self, sum_id: str) -> None:
        """Remove a total that is needed no more."""
        (self._folder / sum_id).unlink(missing_ok=True)

    def keep_only(self, sum_ids: Container[str]) -> None:
        """Remove those of other sums: a crash may have left them."""
        for path in list(self._folder.iterdir()) if self._folder.is_dir() else []:
            if path.name not in sum_ids:
                path.unlink()

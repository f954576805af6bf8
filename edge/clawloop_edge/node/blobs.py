"""What is too large for a message, over the server's own HTTPS port: sending an item in signed parts, and fetching a
file by its signed address. Both go on where they were cut. Blocking: for a thread.

Trusted is the certificate of the invitation alone; no redirect is followed. Knows no outbox, adapter or schedule.
"""

import contextlib
import hashlib
import http.client
import os
import ssl
import time
from collections.abc import Collection, Iterator
from http import HTTPStatus
from pathlib import Path
from threading import Timer
from urllib.parse import urlsplit

from clawloop_edge.node.hub_api import HubBusy, HubRefused
from clawloop_edge.node.join import Membership
from clawloop_edge.node.sockets import cut_socket
from clawloop_edge.node.transport import NodeError, Permit, ServerAway, Withdrawn
from clawloop_shared import wire
from clawloop_shared.blobs import (
    BLOB_PATH,
    FETCH_BYTES,
    MAX_STATE_BYTES,
    PART_BYTES,
    BlobState,
    PartHead,
    is_address_of,
    sign_part,
)
from clawloop_shared.errors import WireError
from clawloop_shared.files import private_folder, sha256
from clawloop_shared.manifest import FileEntry
from clawloop_shared.messages import ItemReceipt, UploadItem

_TIMEOUT_S = 30.0
_REQUEST_S = 150.0
"""for one part and its answer, however slowly the other side takes or gives it"""
_TRY_LATER = frozenset({HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS})
_CUT = "an item was broken off: it may no longer leave"


class Line:
    """One connection to the server, opened when it is needed. Used by one thread; `cut` may come from another."""

    def __init__(self, membership: Membership) -> None:
        where = urlsplit(membership.url)
        self._url, self._host, self._port = membership.url, where.hostname or "", where.port or 443
        self._context = ssl.create_default_context(cadata=membership.ca_pem)
        self._connection: http.client.HTTPSConnection | None = None
        self._was_cut = False

    def ask(
        self, method: str, path: str, *, body: bytes = b"", headers: dict[str, str] | None = None, max_bytes: int
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Status, body (at most `max_bytes`) and headers of the answer.

        Raises:
            Withdrawn: it was cut.
            NodeError: another server answers there.
            ServerAway: no whole answer.
        """
        try:
            connection = self._opened()
            with self._at_most(_REQUEST_S):
                connection.request(method, path, body or None, headers or {})
                response = connection.getresponse()
                data = response.read(max_bytes + 1)
                if len(data) > max_bytes:
                    raise ServerAway(f"{self._url} answers {method} with more than {max_bytes} bytes")
            return response.status, data, response.headers
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise NodeError(f"{self._url} is not the server of the invitation: {error.verify_message}") from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if self._was_cut:
                raise Withdrawn(_CUT) from error
            raise ServerAway(f"cannot reach {self._url}: {error}; is the server running?") from error

    def cut(self) -> None:
        """Break off at once; nothing can be asked any more."""
        self._was_cut = True
        connection = self._connection
        if connection is not None and connection.sock is not None:
            cut_socket(connection.sock)

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the connection; the next question opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _opened(self) -> http.client.HTTPSConnection:
        if self._was_cut:
            raise Withdrawn(_CUT)
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=_TIMEOUT_S, context=self._context
            )
            self._connection.connect()
            if self._was_cut:  # while it was being opened
                raise OSError(_CUT)
        return self._connection

    @contextlib.contextmanager
    def _at_most(self, timeout_s: float) -> Iterator[None]:
        opened = self._connection.sock if self._connection else None
        watch = Timer(timeout_s, cut_socket, [opened])
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()


def send_item(line: Line, item: UploadItem, *, membership: Membership, permit: Permit) -> ItemReceipt:
    """Send an item, from where the server has it on; its receipt. `permit` is asked before each part.

    Raises:
        Withdrawn: `permit` said no, or the line was cut.
        ServerAway: it cannot go on now; what arrived stays there. HubRefused: the server will not have it.
    """
    digest, size = sha256(item.body), len(item.body)
    offset, data = 0, b""  # a part without bytes asks how far it is
    while True:
        if not permit():
            raise Withdrawn(_CUT)
        head = PartHead(
            device_id=membership.device_id,
            item_id=item.item_id,
            receipt_id=item.receipt_id,
            kind=item.kind,
            sha256=digest,
            size_bytes=size,
            offset=offset,
            part_sha256=sha256(data),
            at_ms=time.time_ns() // 1_000_000,
        )
        state = _put(line, digest, wire.encode(sign_part(head, data, membership.device_key)))
        if state.receipt is not None:
            return state.receipt
        if data and state.offset != offset + len(data):
            raise ServerAway(f"the server kept {state.offset} bytes of an item where {offset + len(data)} were sent")
        if not 0 <= state.offset < size:
            raise ServerAway(f"the server says that it has {state.offset} of {size} bytes, and gives no receipt")
        offset = state.offset
        data = item.body[offset : offset + PART_BYTES]


def fetch_file(line: Line, address: str, *, entry: FileEntry, folder: Path, permit: Permit) -> bytes:
    """A file of an adapter, in ranges, onto the disk (0600) and from there; one that was cut is gone on with.

    Raises:
        WireError: the address is not one of that file on this server.
        Withdrawn: `permit` said no, or the line was cut.
        ServerAway: it cannot go on now. HubRefused: the server does not give it.
        NodeError: what came is not the file that the manifest names; nothing of it is kept.
    """
    if not is_address_of(address, entry.sha256):
        raise WireError(f"the offer's address of {entry.name} is not one of that file; it is not fetched")
    path = private_folder(folder) / _part_name(entry.sha256)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "r+b") as file:
        have = file.seek(0, os.SEEK_END)
        if have > entry.size_bytes:
            file.truncate(0)
            have = file.seek(0)
        while have < entry.size_bytes:
            if not permit():
                raise Withdrawn(_CUT)
            data = _range(line, address, start=have, size=min(FETCH_BYTES, entry.size_bytes - have))
            file.write(data)
            have += len(data)
        file.flush()
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        content = file.read() if found == entry.sha256 else b""
    path.unlink()
    if found != entry.sha256:
        raise NodeError(f"{entry.name} as it was fetched is not the file that the manifest names; it was thrown away")
    return content


def drop_parts(folder: Path, *, keep: Collection[str] = (), older_than_s: float = 0.0) -> None:
    """Remove what is there of files whose fetch was abandoned: all but the hashes to `keep`, as far as nothing was
    added to them for `older_than_s`."""
    kept, before_s = {_part_name(each) for each in keep}, time.time() - older_than_s
    for path in folder.glob(_part_name("*")):
        if path.name not in kept and path.lstat().st_mtime <= before_s:
            path.unlink(missing_ok=True)


def _part_name(digest: str) -> str:
    return f"{digest}.part"


def _put(line: Line, digest: str, body: bytes) -> BlobState:
    headers = {"Content-Type": "application/octet-stream"}
    status, data, _ = line.ask("PUT", f"{BLOB_PATH}/{digest}", body=body, headers=headers, max_bytes=MAX_STATE_BYTES)
    if status in _TRY_LATER:
        raise HubBusy(f"the server cannot take an item now ({status})")
    if status != HTTPStatus.OK:
        raise HubRefused(f"the server does not take an item in parts ({status}): {data[:300]!r}", status=status)
    return wire.decode(data, BlobState, max_bytes=MAX_STATE_BYTES)


def _range(line: Line, address: str, *, start: int, size: int) -> bytes:
    headers = {"Range": f"bytes={start}-{start + size - 1}"}
    status, data, told = line.ask("GET", address, headers=headers, max_bytes=size)
    if status in _TRY_LATER:
        raise HubBusy(f"the server cannot give a file now ({status})")
    if status != HTTPStatus.PARTIAL_CONTENT:
        raise HubRefused(f"the server does not give the file of an adapter ({status})", status=status)
    if len(data) != size or not told.get("Content-Range", "").startswith(f"bytes {start}-{start + size - 1}/"):
        raise ServerAway("the server gave another part of a file than was asked for")
    return data

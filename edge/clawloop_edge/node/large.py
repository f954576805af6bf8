"""Large items that leave and large adapters that come, each in a thread of its own, so that messages are answered
meanwhile. One of each at a time; what was cut goes on when the server asks again.

Knows neither outbox nor engine: it is given what it asks them.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from clawloop_edge.node.blobs import Line, drop_parts, fetch_file, send_item
from clawloop_edge.node.guard import Guard
from clawloop_edge.node.hub_api import HubRefused
from clawloop_edge.node.join import Membership
from clawloop_edge.node.transport import NodeError, ServerAway, Withdrawn
from clawloop_shared.errors import ClawloopError, InvalidError
from clawloop_shared.files import private_folder
from clawloop_shared.manifest import Manifest, open_manifest
from clawloop_shared.messages import AdapterOffer, AdapterReply, ItemReceipt, UploadItem

_log = logging.getLogger(__name__)

_STOP_S = 10.0
REFUSED_S = 86_400.0
"""for so long an adapter that could not be used is not fetched again"""


class Outbox(Protocol):
    """Where large items come from."""

    def next_large(self, above_bytes: int, max_bytes: int) -> UploadItem | None:
        """The oldest item of a size between that may leave now."""
        ...

    def mark_sent(self, item_ids: list[str]) -> None:
        """Its bytes are about to go out."""
        ...

    def may_still_leave(self, item_ids: list[str]) -> bool:
        """Whether bytes that are on their way may go on; none: whether anything may."""
        ...

    def mark_stopped(self, item_ids: list[str]) -> None:
        """They were broken off."""
        ...

    def accept(self, receipts: list[ItemReceipt], *, device_id: str, release_key: bytes) -> None:
        """The server has them."""
        ...


class Large:
    """Both directions, for one membership."""

    def __init__(
        self,
        membership: Membership,
        outbox: Outbox,
        *,
        install: Callable[[AdapterOffer], AdapterReply],
        folder: Path,
        max_adapter_bytes: int,
        floor_bytes: int = 0,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`install` takes an adapter whose files are all there into use (blocking); `folder` is where they lie until
        then, `floor_bytes` what must stay free on its disk, `free_bytes` what is."""
        self._membership, self._outbox, self._install = membership, outbox, install
        self._folder, self._max_adapter_bytes = folder, max_adapter_bytes
        self._floor_bytes, self._free_bytes, self._clock = floor_bytes, free_bytes, clock
        self._lock = threading.Lock()
        self._running: dict[str, tuple[threading.Thread, Line]] = {}
        self._stopping = False
        self._refused: dict[str, tuple[float, AdapterReply]] = {}
        """by manifest: the last one that could not be used, and until when that is remembered"""

    def send(self, above_bytes: int, max_bytes: int) -> None:
        """Begin with the next item that is larger than a message holds, if there is one and none is under way."""
        if max_bytes > above_bytes:
            self._begin("item", lambda line: self._send(line, above_bytes, max_bytes))

    def fetch(self, offer: AdapterOffer, *, serving: int) -> AdapterReply:
        """Begin to fetch an adapter; what came of it is told when it is offered again, or by the version in use."""
        until_s, refused = self._refused.get(offer.manifest.sha256, (0.0, None))
        if refused is not None and self._clock() < until_s:
            return msgspec.structs.replace(refused, version=serving)
        try:
            manifest = open_manifest(offer.manifest, self._membership.release_key)
        except ClawloopError as error:
            return AdapterReply(serving, installed=False, reason=str(error))
        size = sum(entry.size_bytes for entry in manifest.files)
        if size > self._max_adapter_bytes or any(entry.size_bytes < 0 for entry in manifest.files):
            limit = f"over this device's {self._max_adapter_bytes}"
            return AdapterReply(
                serving, installed=False, reason=f"adapter {manifest.version} has {size} bytes, {limit}"
            )
        if manifest.version > serving:
            if self._free_bytes(private_folder(self._folder)) - size < self._floor_bytes:
                return AdapterReply(serving, installed=False, reason=f"no room for adapter {manifest.version}")
            self._begin("adapter", lambda line: self._fetch(line, offer, manifest))
        return AdapterReply(serving, installed=False, fetching=True)

    def stop(self) -> None:
        """Break off whatever is under way."""
        with self._lock:
            self._stopping = True
            running = list(self._running.values())
        for _, line in running:
            line.cut()
        for thread, _ in running:
            thread.join(_STOP_S)

    def _begin(self, what: str, work: Callable[[Line], None]) -> None:
        with self._lock:
            if self._stopping or what in self._running:
                return
            line = Line(self._membership)
            thread = threading.Thread(target=self._run, args=(what, work, line), name=f"clawloop-{what}", daemon=True)
            self._running[what] = (thread, line)
            thread.start()

    def _run(self, what: str, work: Callable[[Line], None], line: Line) -> None:
        try:
            work(line)
        except Withdrawn as error:
            _log.info("%s", error)
        except (ClawloopError, OSError) as error:
            _log.warning("a large %s is not through yet: %s", what, error)
        finally:
            line.close()
            with self._lock:
                self._running.pop(what, None)

    def _send(self, line: Line, above_bytes: int, max_bytes: int) -> None:
        item = self._outbox.next_large(above_bytes, max_bytes)
        if item is None:
            return
        ids, member = [item.item_id], self._membership

        def permit() -> bool:
            return not self._stopping and self._outbox.may_still_leave(ids)

        self._outbox.mark_sent(ids)
        try:
            with Guard(permit, line.cut):
                receipt = send_item(line, item, membership=member, permit=permit)
        except Withdrawn:
            self._outbox.mark_stopped(ids)
            raise
        self._outbox.accept([receipt], device_id=member.device_id, release_key=member.release_key)

    def _fetch(self, line: Line, offer: AdapterOffer, manifest: Manifest) -> None:
        def permit() -> bool:
            return not self._stopping and self._outbox.may_still_leave([])

        files: dict[str, bytes] = {}
        try:
            with Guard(permit, line.cut):
                drop_parts(self._folder, keep=[entry.sha256 for entry in manifest.files])
                for entry in manifest.files:
                    address = offer.links.get(entry.name, "")
                    files[entry.name] = fetch_file(line, address, entry=entry, folder=self._folder, permit=permit)
        except (Withdrawn, ServerAway, HubRefused):  # another offer brings another address
            raise
        except (NodeError, InvalidError) as error:
            self._refuse(offer, AdapterReply(0, installed=False, reason=str(error)[:300]))
            raise
        reply = self._install(AdapterOffer(offer.manifest, files, log=offer.log))
        if not reply.installed:
            self._refuse(offer, reply)

    def _refuse(self, offer: AdapterOffer, reply: AdapterReply) -> None:
        self._refused = {offer.manifest.sha256: (self._clock() + REFUSED_S, reply)}

"""The server's log of released adapters, as this device knows it: an adapter is taken only out of a log that goes on
from the one that was seen last.

The first head that a device sees is believed; from then on it is pinned, whatever release key signs. What does not fit
stops all updates until the owner says what to do: what is in use serves on. Knows neither pool nor engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from clawloop_edge.adapters.errors import LogBehind, LogForked, LogMissing, LogStopped, NotInLog, WrongLine
from clawloop_shared import merkle
from clawloop_shared.errors import ProofInvalid
from clawloop_shared.log_head import LogProof, TreeHead, entry_leaf, open_head
from clawloop_shared.manifest import Manifest, SignedManifest, open_manifest
from clawloop_shared.messages import AdapterOffer

_ACT = "no adapter is taken any more; ask the operator, then: clawloop-edge log show, clawloop-edge log accept"


class KnownLog(msgspec.Struct, frozen=True, tag="known-log.v1"):
    """What is kept of a server's log. `head` is the newest that was checked; None: none was seen yet.

    `stopped` is why no adapter is taken any more, empty as long as they are; `shown` the head, signed by the server, of
    the log that was offered then, None if there was none.
    """

    head: TreeHead | None = None
    stopped: str = ""
    shown: TreeHead | None = None
    stopped_ms: int = 0

    @property
    def size(self) -> int:
        """How many entries the log had when it was seen last."""
        return self.head.size if self.head else 0

    def accepted(self) -> KnownLog:
        """The owner says that the log which was shown is the one to go on from: its head is pinned in the place of the
        other. If none was shown, the next one is believed as the first."""
        return KnownLog(self.shown) if self.stopped else self


class LogBook:
    """The log of the server that this device has joined."""

    def __init__(
        self,
        *,
        release_key: bytes,
        load: Callable[[], KnownLog],
        keep: Callable[[KnownLog], None],
        now_ms: Callable[[], int],
    ) -> None:
        """`load` and `keep` read and write what is known, the latter until it is on disk."""
        self._release_key, self._load, self._keep, self._now_ms = release_key, load, keep, now_ms
        self._lock = threading.Lock()

    @property
    def known(self) -> KnownLog:
        """What is known now; the owner may have changed it by a command."""
        return self._load()

    def take(self, offer: AdapterOffer) -> None:
        """Return if the offered adapter is in a log that goes on from the one that is known; its head is pinned.

        Raises:
            NotInLog, LogForked, LogMissing: it is not. No adapter is taken from now on.
            LogStopped: that was so before, and the owner has not said what to do.
            LogBehind: the server proves something else than what this device needs; it may try again.
            SignatureInvalid, ProofInvalid, AdapterInvalid, WrongLine: manifest or head are not what they must be.
        """
        manifest = open_manifest(offer.manifest, self._release_key)
        with self._lock:
            known = self._load()
            if known.stopped:
                raise LogStopped(f"adapter {manifest.version}: {known.stopped}")
            head = open_head(offer.log.head, self._release_key) if offer.log else None
            try:
                _check(known.head, head, offer.log, manifest=manifest, signed=offer.manifest)
            except (NotInLog, LogForked, LogMissing) as error:
                self._keep(KnownLog(known.head, str(error), head, self._now_ms()))
                raise
            if head is not None and head != known.head:
                self._keep(KnownLog(head))


def _check(
    seen: TreeHead | None,
    head: TreeHead | None,
    proof: LogProof | None,
    *,
    manifest: Manifest,
    signed: SignedManifest,
) -> None:
    if proof is None or head is None:
        if seen is not None:
            raise LogMissing(
                f"adapter {manifest.version} came without the log of {seen.size} entries that was seen before; {_ACT}"
            )
        return  # a server from before there was a log
    if head.line_id != manifest.line.line_id:
        raise WrongLine(f"adapter {manifest.version} came with the log of line {head.line_id}")
    if seen is not None:
        _check_goes_on(seen, head, proof)
    leaf, root = entry_leaf(manifest.version, signed.sha256), bytes.fromhex(head.root)
    try:
        merkle.check_inclusion(leaf, proof.index, size=head.size, proof=proof.inclusion, root=root)
    except ProofInvalid as error:
        raise NotInLog(f"adapter {manifest.version} is not in the server's log: {error}; {_ACT}") from error


def _check_goes_on(seen: TreeHead, head: TreeHead, proof: LogProof) -> None:
    if head.size < seen.size:
        raise LogForked(f"the server's log has {head.size} entries, and had {seen.size} before; {_ACT}")
    if head.size > seen.size and proof.from_size != seen.size:
        raise LogBehind(f"the log of {head.size} entries was proved from {proof.from_size} on, not from {seen.size}")
    between = proof.consistency if head.size > seen.size else []
    old, new = bytes.fromhex(seen.root), bytes.fromhex(head.root)
    try:
        merkle.check_consistency(seen.size, old, new_size=head.size, new_root=new, proof=between)
    except ProofInvalid as error:
        raise LogForked(f"the server's log is not the one that was seen before: {error}; {_ACT}") from error

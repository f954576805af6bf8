"""The device's side of the log of adapters: what fits is taken and pinned, what does not stops every update."""

from pathlib import Path

import msgspec
import pytest

from clawloop_edge.adapters.errors import LogBehind, LogForked, LogMissing, LogStopped, NotInLog, WrongLine
from clawloop_edge.adapters.log import KnownLog, LogBook
from clawloop_shared import merkle, signing, wire
from clawloop_shared.errors import ClawloopError, ProofInvalid, SignatureInvalid
from clawloop_shared.log_head import LogProof, TreeHead, entry_leaf, sign_head
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, SignedManifest, sign_manifest
from clawloop_shared.messages import AdapterOffer, AdapterReply, StatusReply
from clawloop_shared.model_line import ModelLine

KEY = bytes(range(32))
LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")


def signed(version: int, *, more: str = "", key: bytes = KEY) -> SignedManifest:
    manifest = Manifest(
        line=LINE,
        version=version,
        previous_sha256="",
        files=[FileEntry(name, 1, "0" * 64) for name in (CONFIG_FILE, WEIGHTS_FILE)],
        rank=8,
        alpha=16.0,
        target_modules=["q_proj"],
        probe=Probe([1, 2], [-1.0]),
        evaluation=Evaluation("", 0, 0.0, 0.0, 0.0),
        round_id=f"round{more}",
        lineage_root="",
        created_ms=1,
        expires_ms=2,
    )
    return sign_manifest(manifest, key)


class Server:
    """A server's log of versions 1, 2, 3 ...; `more` makes another log of the same versions."""

    def __init__(self, size: int = 0, *, more: str = "") -> None:
        self.manifests: list[SignedManifest] = []
        self._nodes: dict[tuple[int, int], bytes] = {}
        for version in range(1, size + 1):
            self.release(signed(version, more=more))

    def release(self, manifest: SignedManifest) -> None:
        leaf = entry_leaf(len(self.manifests) + 1, manifest.sha256)
        for level, position, found in merkle.appended(len(self.manifests), leaf, self._read):
            self._nodes[level, position] = found
        self.manifests.append(manifest)

    def head(self, size: int | None = None, *, line_id: str = LINE.line_id) -> TreeHead:
        size = len(self.manifests) if size is None else size
        return TreeHead(line_id=line_id, size=size, root=merkle.root(size, self._read).hex(), at_ms=size)

    def offer(self, version: int, *, known: int = 0, key: bytes = KEY, line_id: str = LINE.line_id) -> AdapterOffer:
        """What a device is sent that told that it knows the log of so many entries."""
        size = len(self.manifests)
        proof = LogProof(
            head=sign_head(self.head(line_id=line_id), key),
            index=version - 1,
            inclusion=merkle.inclusion_proof(version - 1, size, self._read),
            from_size=known,
            consistency=merkle.consistency_proof(known, size, self._read) if known <= size else [],
        )
        return AdapterOffer(self.manifests[version - 1], {}, log=proof)

    def _read(self, level: int, position: int) -> bytes:
        return self._nodes[level, position]


class Device(LogBook):
    """A device whose knowledge goes through the wire encoding, as through the pool."""

    def __init__(self) -> None:
        self.kept = wire.encode(KnownLog())
        super().__init__(
            release_key=signing.public_key(KEY),
            load=lambda: wire.decode(self.kept, KnownLog),
            keep=lambda known: setattr(self, "kept", wire.encode(known)),
            now_ms=lambda: 77,
        )

    def refuses(self, kind: type[ClawloopError], offer: AdapterOffer, match: str | None = None) -> None:
        with pytest.raises(kind, match=match):
            self.take(offer)


@pytest.fixture
def device() -> Device:
    """A device that has seen five entries."""
    made, server = Device(), Server(5)
    made.take(server.offer(5))
    assert made.known == KnownLog(server.head())
    return made


def changed(offer: AdapterOffer, **fields: object) -> AdapterOffer:
    assert offer.log
    return msgspec.structs.replace(offer, log=msgspec.structs.replace(offer.log, **fields))


def test_the_first_head_is_believed_and_each_that_goes_on_from_it() -> None:
    device, known = Device(), 0
    for size in (1, 2, 3, 7, 8, 20):
        server = Server(size)
        device.take(server.offer(size, known=known))
        device.take(server.offer(max(1, size - 1), known=size))
        assert device.known == KnownLog(server.head())
        known = size


def test_the_same_head_is_taken_again_wherever_its_proof_begins(device: Device) -> None:
    for known in range(6):
        device.take(Server(5).offer(5, known=known))


def test_a_server_without_a_log_is_taken_as_long_as_none_was_seen(device: Device) -> None:
    bare = AdapterOffer(signed(6), {})
    fresh = Device()
    fresh.take(bare)
    assert fresh.known == KnownLog()
    device.refuses(LogMissing, bare, "came without the log of 5 entries")
    assert device.known.stopped.startswith("adapter 6 came without")
    assert (device.known.head, device.known.shown, device.known.stopped_ms) == (Server(5).head(), None, 77)


LIES = [
    (LogForked, Server(4).offer(4, known=5), "has 4 entries, and had 5 before"),
    (LogForked, Server(5, more="!").offer(5, known=5), "not the one that was seen before"),
    (LogForked, Server(6, more="!").offer(6, known=5), "not the one that was seen before"),
    (LogForked, changed(Server(6).offer(6, known=5), consistency=[]), "not the one that was seen before"),
    (LogForked, changed(Server(6).offer(6, known=5), consistency=[b"short"]), "hashes of 32 bytes"),
    (NotInLog, changed(Server(6).offer(6, known=5), index=4), "adapter 6 is not in the server's log"),
    (NotInLog, changed(Server(6).offer(6, known=5), index=6), "no entry 6 in a log of 6"),
    (NotInLog, changed(Server(6).offer(6, known=5), index=-1), "no entry -1"),
    (NotInLog, changed(Server(6).offer(6, known=5), inclusion=[]), "adapter 6 is not in the server's log"),
    (NotInLog, changed(Server(6).offer(6, known=5), inclusion=[bytes(32)] * 2), "adapter 6 is not in"),
    (NotInLog, msgspec.structs.replace(Server(6).offer(6, known=5), manifest=signed(6, more="for you alone")), "6 is"),
]


@pytest.mark.parametrize(("kind", "offer", "match"), LIES)
def test_what_does_not_fit_is_refused_by_name_and_stops_updates_until_the_owner_acts(
    device: Device, kind: type[ClawloopError], offer: AdapterOffer, match: str
) -> None:
    assert offer.log
    before = device.known.head
    device.refuses(kind, offer, match)
    known = device.known
    assert (known.head, known.stopped_ms) == (before, 77)
    assert "clawloop-edge log accept" in known.stopped
    assert known.shown is not None
    assert sign_head(known.shown, KEY) == offer.log.head
    good = Server(6).offer(6, known=5)
    device.refuses(LogStopped, good, "adapter 6: ")
    assert device.known == known, "what was shown first stays what the owner is told of"


@pytest.mark.parametrize("kind", [LogForked, NotInLog, LogMissing])
def test_after_the_owner_accepts_it_goes_on_from_what_was_shown(device: Device, kind: type[ClawloopError]) -> None:
    offer = AdapterOffer(signed(6), {}) if kind is LogMissing else next(lie[1] for lie in LIES if lie[0] is kind)
    device.refuses(kind, offer)
    shown = device.known.shown
    device.kept = wire.encode(device.known.accepted())
    assert device.known == KnownLog(shown)
    other = Server(9, more="" if kind is NotInLog else "?")
    if kind is LogForked:
        device.refuses(LogForked, other.offer(9, known=device.known.size))
    else:
        device.take(other.offer(9, known=device.known.size))


def test_accepting_changes_nothing_where_nothing_is_stopped(device: Device) -> None:
    assert device.known.accepted() == device.known


def test_a_proof_from_another_size_is_asked_for_again_and_stops_nothing(device: Device) -> None:
    for known in (0, 4, 6):
        device.refuses(LogBehind, Server(7).offer(7, known=known), f"proved from {known} on, not from 5")
    assert device.known == KnownLog(Server(5).head())
    device.take(Server(7).offer(7, known=5))


def test_what_is_not_signed_by_the_server_moves_nothing(device: Device) -> None:
    before, other = device.known, bytes(32)
    device.refuses(SignatureInvalid, Server(6).offer(6, known=5, key=other), "head of log is signed by key")
    foreign = msgspec.structs.replace(Server(6).offer(6, known=5), manifest=signed(6, key=other))
    device.refuses(SignatureInvalid, foreign, "manifest is signed by key")
    manifest = signed(6)
    posing = msgspec.structs.replace(sign_head(Server(6).head(), KEY), body=manifest.body, signature=manifest.signature)
    device.refuses(SignatureInvalid, changed(Server(6).offer(6, known=5), head=posing), "was not made by key")
    device.refuses(WrongLine, Server(6).offer(6, known=5, line_id="other"), "the log of line other")
    beyond = AdapterOffer(signed((1 << 64) - 1), {}, log=Server(6).offer(6, known=5).log)
    device.refuses(NotInLog, beyond)
    device.kept = wire.encode(before)
    with pytest.raises(ProofInvalid, match="no log has an adapter"):
        device.take(AdapterOffer(signed(-1), {}, log=Server(6).offer(6, known=5).log))
    assert device.known == before


def test_peers_from_before_there_was_a_log_understand_each_other() -> None:
    class OldOffer(msgspec.Struct, frozen=True, tag="adapter-offer.v1"):
        manifest: SignedManifest
        files: dict[str, bytes]
        links: dict[str, str] = {}

    class OldReply(msgspec.Struct, frozen=True, tag="adapter-reply.v1"):
        version: int
        installed: bool
        reason: str = ""
        fetching: bool = False

    class OldStatus(msgspec.Struct, frozen=True, tag="status.v1"):
        level: str
        line: ModelLine
        adapter_version: int
        outbox_items: int
        app_version: str

    offer = Server(3).offer(3)
    assert wire.decode(wire.encode(offer), AdapterOffer) == offer
    assert wire.decode(wire.encode(offer), OldOffer).manifest == offer.manifest
    assert wire.decode(wire.encode(OldOffer(offer.manifest, {})), AdapterOffer).log is None
    assert wire.decode(wire.encode(AdapterReply(3, True, log_size=3)), OldReply) == OldReply(3, True)
    assert wire.decode(wire.encode(OldReply(3, True)), AdapterReply).log_size == 0
    status = StatusReply("full", LINE, 3, 0, "1", log_size=3)
    assert wire.decode(wire.encode(status), OldStatus).adapter_version == 3
    assert wire.decode(wire.encode(OldStatus("full", LINE, 3, 0, "1")), StatusReply).log_size == 0


def test_a_real_servers_releases_are_taken_one_after_the_other(tmp_path: Path) -> None:
    from clawloop_server.release.log import ReleaseLog
    from clawloop_server.vault.database import ServerDatabase

    database = ServerDatabase.open(tmp_path / "server.db", KEY)
    log, device = ReleaseLog(database), Device()
    for version in range(1, 12):
        manifest = signed(version)
        with database.write():
            log.append(LINE.line_id, version, manifest.sha256, now_ms=1)
            log.sign_head(LINE.line_id, KEY, now_ms=version)
        if version % 3 != 1:  # the device misses some
            device.take(AdapterOffer(manifest, {}, log=log.proof(version, device.known.size)))
            assert device.known.size == version
    device.kept = wire.encode(KnownLog(Server(20, more="another").head()))
    device.refuses(LogForked, AdapterOffer(signed(11), {}, log=log.proof(11, device.known.size)), "had 20 before")
    database.close()

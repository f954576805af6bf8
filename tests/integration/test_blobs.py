"""What is too large for a message, over the real public port with TLS: items in parts, files by signed address; cut in
the middle and gone on with; and everything that is not as it must be."""

import contextlib
import os
import socket
import ssl
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawloop_edge.node.blobs import Line, fetch_file, send_item
from clawloop_edge.node.join import Membership
from clawloop_edge.node.transport import NodeError, ServerAway, Withdrawn
from clawloop_server.fleet.tls import ensure_tls
from clawloop_server.hub.devices import DeviceState
from clawloop_shared import signing, wire
from clawloop_shared.blobs import (
    BLOB_PATH,
    FETCH_BYTES,
    PART_BYTES,
    BlobState,
    sign_part,
)
from clawloop_shared.errors import WireError
from clawloop_shared.files import sha256
from clawloop_shared.manifest import FileEntry
from clawloop_shared.receipts import open_item

from .blob_parts import CONTENT, ITEM, LIMIT, Counted, Server, address, after, entry, head, member, part, server

__all__ = ["entry", "member", "server"]


# items


def test_an_item_arrives_whole_with_a_receipt_and_leaves_no_part(server: Server, member: Membership) -> None:
    line = Line(member)
    receipt = send_item(line, ITEM, membership=member, permit=lambda: True)
    assert open_item(receipt, member.release_key).sha256 == sha256(ITEM.body)
    assert server.kept == [("one", ITEM)]
    assert server.partials() == []
    again = send_item(line, ITEM, membership=member, permit=lambda: True)
    assert again == receipt
    assert len(server.kept) == 1, "an answer that was lost costs no second sending"
    line.close()


def test_what_was_cut_in_the_middle_goes_on_where_it_was_and_lies_sealed_meanwhile(
    server: Server, member: Membership
) -> None:
    line = Line(member)
    with pytest.raises(Withdrawn):
        send_item(line, ITEM, membership=member, permit=after(2))
    (partial,) = server.partials()
    assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    assert ITEM.body[:64] not in partial.read_bytes()
    with partial.open("ab") as file:
        file.write(b"half a part that a crash left")
    state = wire.decode(server.put(sha256(ITEM.body), part(member, b""))[1], BlobState)
    assert state.offset == PART_BYTES
    permit = Counted()
    send_item(line, ITEM, membership=member, permit=permit)
    assert permit.times == 3, "the first part was not sent again"
    assert server.kept == [("one", ITEM)]
    line.close()


def test_a_connection_that_is_cut_in_mid_part_sends_nothing_more(server: Server, member: Membership) -> None:
    with Line(member) as line:

        def permit() -> bool:
            if len(server.partials()) == 1:
                line.cut()
            return True

        with pytest.raises(Withdrawn):
            send_item(line, ITEM, membership=member, permit=permit)
        assert server.kept == []
        with pytest.raises(Withdrawn):
            line.ask("GET", "/", max_bytes=1)


def test_parts_that_together_are_not_the_item_are_thrown_away(server: Server, member: Membership) -> None:
    other = os.urandom(len(ITEM.body))
    name = sha256(ITEM.body)
    for offset in range(0, len(other), PART_BYTES):
        data = other[offset : offset + PART_BYTES]
        status, said = server.put(name, part(member, data, offset=offset))
    assert (status, server.kept, server.partials()) == (409, [], [])
    assert b"sent anew" in said


def test_only_the_device_itself_can_add_to_its_items(server: Server, member: Membership) -> None:
    stranger, name, data = server.member("two"), sha256(ITEM.body), ITEM.body[:PART_BYTES]
    assert server.put(name, part(member, data, key=stranger.device_key))[0] == 403
    assert server.put(name, part(member, data, key=signing.new_key(), device_id="nobody"))[0] == 403
    server.states["one"] = DeviceState.REVOKED
    assert server.put(name, part(member, data))[0] == 403
    signed = sign_part(head(stranger, data), data, stranger.device_key)
    changed = wire.encode(msgspec.structs.replace(signed, data=b"x" + data[1:]))
    assert server.put(name, changed)[0] == 403
    assert server.partials() == []


def test_two_devices_with_the_same_item_have_nothing_in_common(server: Server, member: Membership) -> None:
    other = server.member("two")
    for who in (member, other):
        with Line(who) as line, pytest.raises(Withdrawn):
            send_item(line, ITEM, membership=who, permit=after(2))
    assert len({path.parent for path in server.partials()}) == 2


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"at_ms": 1}, 400),
        ({"size_bytes": LIMIT + 1}, 413),
        ({"sha256": "0" * 64}, 400),
        ({"sha256": "../../etc/passwd"}, 400),
        ({"offset": -1}, 400),
        ({"item_id": ""}, 400),
    ],
)
def test_a_part_that_is_not_as_it_must_be_is_refused(
    server: Server, member: Membership, changes: dict[str, Any], wanted: int
) -> None:
    assert server.put(sha256(ITEM.body), part(member, ITEM.body[:PART_BYTES], **changes))[0] == wanted
    assert server.partials() == []


def test_a_part_of_another_size_is_refused_and_one_elsewhere_changes_nothing(
    server: Server, member: Membership
) -> None:
    name = sha256(ITEM.body)
    assert server.put(name, part(member, ITEM.body[: PART_BYTES - 1]))[0] == 400
    status, said = server.put(name, part(member, ITEM.body[:PART_BYTES], offset=PART_BYTES))
    assert (status, wire.decode(said, BlobState).offset) == (200, 0)
    assert server.put(name, b"rubbish")[0] == 400
    assert server.put(name, os.urandom(2 << 20))[0] == 413


def test_what_one_device_has_begun_is_bounded_and_the_oldest_gives_way(server: Server, member: Membership) -> None:
    for number in range(7):
        data = os.urandom(PART_BYTES)
        name = sha256(data + b"more")
        sent = part(member, data, item_id=f"i{number}", sha256=name, size_bytes=2 * PART_BYTES)
        assert server.put(name, sent)[0] == 200
        os.utime(max(server.partials(), key=lambda p: p.stat().st_mtime_ns), (number, number))
    assert len(server.partials()) <= 4
    assert sum(path.stat().st_size for path in server.partials()) <= LIMIT
    server.now_s = lambda: 1e10
    assert server.desk.sweep() > 0
    assert server.partials() == []


def test_a_slow_sender_is_hung_up_on_and_holds_nobody_up(
    server: Server, member: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawloop_server.hub.front._REQUEST_S", 0.5)
    context = ssl.create_default_context(cafile=str(server.tls.ca))
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as slow,
    ):
        slow.sendall(b"PUT %s/%s HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\na" % (b"/v1/blobs", b"0" * 64))
        slow.settimeout(10)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert slow.recv(1000) == b""
    monkeypatch.undo()
    with Line(member) as line:
        send_item(line, ITEM, membership=member, permit=lambda: True)


# files


def test_a_file_that_was_cut_is_gone_on_with_and_nothing_of_it_stays(
    server: Server, member: Membership, entry: FileEntry, tmp_path: Path
) -> None:
    line, folder = Line(member), tmp_path / "fetched"
    with pytest.raises(Withdrawn):
        fetch_file(line, address(server, entry), entry=entry, folder=folder, permit=after(1))
    (partial,) = folder.iterdir()
    assert (partial.stat().st_size, stat.S_IMODE(partial.stat().st_mode)) == (FETCH_BYTES, 0o600)
    permit = Counted()
    found = fetch_file(line, address(server, entry), entry=entry, folder=folder, permit=permit)
    assert found == CONTENT
    assert permit.times == 1
    assert list(folder.iterdir()) == []
    line.close()


def test_a_file_with_another_hash_is_thrown_away(
    server: Server, member: Membership, entry: FileEntry, tmp_path: Path
) -> None:
    server.files[entry.sha256].write_bytes(os.urandom(len(CONTENT)))
    line = Line(member)
    with pytest.raises(NodeError, match="not the file that the manifest names"):
        fetch_file(line, address(server, entry), entry=entry, folder=tmp_path / "f", permit=lambda: True)
    assert list((tmp_path / "f").iterdir()) == []
    line.close()


def test_an_address_is_good_for_one_file_one_device_and_a_time(
    server: Server, member: Membership, entry: FileEntry
) -> None:
    good = address(server, entry)
    assert server.ask("GET", good, headers={"Range": "bytes=0-9"}) == (206, CONTENT[:10])
    bad = [
        address(server, entry, for_s=-1),
        address(server, entry, device="nobody"),
        address(server, entry, key=b"other" * 8),
        good.replace("device=one", "device=two"),
        good.replace(entry.sha256, "0" * 64),
        good + "&device=one",
        good.partition("?")[0],
        f"{BLOB_PATH}/../../../etc/passwd?{good.partition('?')[2]}",
        f"{BLOB_PATH}/%2e%2e%2f%2e%2e%2fetc%2fpasswd?{good.partition('?')[2]}",
    ]
    assert [server.ask("GET", path)[0] for path in bad] == [404] * len(bad)
    server.states["one"] = DeviceState.REVOKED
    assert server.ask("GET", good)[0] == 404
    assert server.ask("HEAD", good)[0] == 404


@pytest.mark.parametrize(
    "wrong",
    ["", "https://elsewhere/v1/blobs/{sha}?x", "/v1/forget?{sha}", "/v1/blobs/{sha}", "/v1/blobs/{sha}?a\r\nHost: b"],
)
def test_a_device_fetches_no_other_address_than_that_of_the_file(
    server: Server, member: Membership, entry: FileEntry, tmp_path: Path, wrong: str
) -> None:
    with pytest.raises(WireError, match="not fetched"):
        fetch_file(
            Line(member), wrong.format(sha=entry.sha256), entry=entry, folder=tmp_path / "f", permit=lambda: True
        )


def test_another_server_gets_nothing(server: Server, member: Membership, tmp_path: Path) -> None:
    other = msgspec.structs.replace(member, ca_pem=ensure_tls(tmp_path).ca.read_text())
    with pytest.raises(NodeError, match="not the server of the invitation"):
        send_item(Line(other), ITEM, membership=other, permit=lambda: True)
    nobody = msgspec.structs.replace(member, url="https://127.0.0.1:1")
    with pytest.raises(ServerAway):
        send_item(Line(nobody), ITEM, membership=nobody, permit=lambda: True)

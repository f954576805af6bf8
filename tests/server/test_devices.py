import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_server.bases import Base
from clawloop_server.errors import DeviceError, InvitationError
from clawloop_server.home import Home
from clawloop_server.hub.devices import Devices, DeviceState
from clawloop_server.hub.invitations import Invitations
from clawloop_server.hub.members import HubMembers
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.store import Vault
from clawloop_shared import signing
from clawloop_shared.messages import JoinRequest


def pem(curve: ec.EllipticCurve) -> str:
    public = ec.generate_private_key(curve).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def request(code: str, base: Base) -> JoinRequest:
    key = signing.public_key(signing.new_key())
    return JoinRequest(code=code, device_key=key, node_key_pem=pem(ec.SECP384R1()), line=base.line)


@pytest.fixture
def invitations(vault: Vault) -> Invitations:
    return Invitations(vault.database)


@pytest.fixture
def devices(vault: Vault) -> Devices:
    return Devices(vault.database)


def test_an_invitation_lets_one_device_in_and_its_code_is_stored_nowhere(
    invitations: Invitations, devices: Devices, base: Base, vault: Vault
) -> None:
    code = invitations.create()
    assert len(code) >= 22, "128 bits"
    assert code.encode() not in repr(vault.database.rows("SELECT * FROM invitations")).encode()
    joined = invitations.redeem(request(code, base), lines={base.line_id})
    assert devices.get(joined.device_id) == joined
    assert joined.state is DeviceState.JOINED
    (record,) = invitations.all()
    assert (record.device_id, record.used_ms) == (joined.device_id, joined.joined_ms)


def test_the_same_device_may_ask_again_but_no_other(invitations: Invitations, devices: Devices, base: Base) -> None:
    mine = request(invitations.create(), base)
    joined = invitations.redeem(mine, lines={base.line_id})
    assert invitations.redeem(mine, lines={base.line_id}) == joined
    with pytest.raises(InvitationError, match="was used"):
        invitations.redeem(request(mine.code, base), lines={base.line_id})
    devices.revoke(joined.device_id)
    with pytest.raises(InvitationError, match="was used"):
        invitations.redeem(mine, lines={base.line_id})


@pytest.mark.parametrize("spelling", ["{}\n", "my key\n{}"])
def test_a_node_key_counts_once_however_it_is_written(invitations: Invitations, base: Base, spelling: str) -> None:
    mine = request(invitations.create(), base)
    joined = invitations.redeem(mine, lines={base.line_id})
    written = spelling.format(mine.node_key_pem)
    again = msgspec.structs.replace(mine, node_key_pem=written)
    assert invitations.redeem(again, lines={base.line_id}) == joined
    other = msgspec.structs.replace(request(invitations.create(), base), node_key_pem=written)
    with pytest.raises(DeviceError, match="already that of device"):
        invitations.redeem(other, lines={base.line_id})


def test_eight_who_come_at_once_with_one_code_are_one_device(home: Home, keys: ServerKeys, base: Base) -> None:
    first = ServerDatabase.open(home.database, keys.master)
    code = Invitations(first).create()
    start, won, lost = threading.Barrier(8), [], []

    def come() -> None:
        database = ServerDatabase.open(home.database, keys.master)
        try:
            start.wait(timeout=30)
            won.append(Invitations(database).redeem(request(code, base), lines={base.line_id}))
        except InvitationError as error:
            lost.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (len(won), len(lost), len(Devices(first).all())) == (1, 7, 1)
    first.close()


def test_an_expired_or_unknown_code_and_an_odd_time_are_refused(invitations: Invitations, base: Base) -> None:
    code = invitations.create(expires_s=60, now_ms=1_000)
    with pytest.raises(InvitationError, match="expired"):
        invitations.redeem(request(code, base), lines={base.line_id}, now_ms=61_000)
    with pytest.raises(InvitationError, match="not known"):
        invitations.redeem(request("guess", base), lines={base.line_id})
    for expires_s in (0.0, -1.0, 31 * 86400.0, float("nan")):
        with pytest.raises(InvitationError, match="30 days"):
            invitations.create(expires_s=expires_s)
    assert invitations.redeem(request(code, base), lines={base.line_id}, now_ms=60_000)


def test_a_device_that_does_not_fit_is_refused_and_the_code_stays_good(
    invitations: Invitations, devices: Devices, base: Base
) -> None:
    good = request(invitations.create(), base)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"line": msgspec.structs.replace(base.line, template_sha256="0" * 64)}, "model line"),
        ({"device_key": b"short"}, "not 32"),
        ({"node_key_pem": "no key"}, "no public key"),
        ({"node_key_pem": pem(ec.SECP256R1())}, "P-384"),
    ]
    for change, reason in cases:
        with pytest.raises(InvitationError, match=reason):
            invitations.redeem(msgspec.structs.replace(good, **change), lines={base.line_id})
    joined = invitations.redeem(good, lines={base.line_id})
    second = msgspec.structs.replace(good, code=invitations.create())
    with pytest.raises(DeviceError, match=joined.device_id):
        invitations.redeem(second, lines={base.line_id})
    assert [d.device_id for d in devices.all()] == [joined.device_id]
    assert invitations.all()[-1].used_ms is None


def test_a_device_is_found_by_its_node_and_remembers_when_it_was_seen(
    devices: Devices, add_device: Callable[[], str]
) -> None:
    device, large = add_device(), (1 << 64) - 1
    assert devices.by_node(large) is None
    devices.set_node(device, large)
    devices.mark_seen(device, 7, now_ms=99)
    found = devices.by_node(large)
    assert found is not None
    assert (found.device_id, found.adapter_version, found.seen_ms) == (device, 7, 99)
    with pytest.raises(DeviceError, match="devices list"):
        devices.mark_seen("nobody", 1)


def test_a_buried_device_leaves_only_its_id(devices: Devices, add_device: Callable[[], str]) -> None:
    device = add_device()
    devices.bury(device)
    left = devices.get(device)
    assert (left.state, left.device_key, left.node_key_pem) == (DeviceState.DELETED, b"", "")
    with pytest.raises(DeviceError, match="deleted"):
        devices.revoke(device)


def test_a_new_database_can_be_opened_by_several_processes_at_once(tmp_path: Path, keys: ServerKeys) -> None:
    opened: list[ServerDatabase] = []
    start = threading.Barrier(4)

    def open_it() -> None:
        start.wait(timeout=30)
        opened.append(ServerDatabase.open(tmp_path / "new.db", keys.master))

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len({database.vault_id for database in opened}) == 1
    assert len(opened) == 4
    for database in opened:
        database.close()


def test_only_joined_devices_of_the_line_may_sync(vault: Vault, add_device: Callable[[], str], base: Base) -> None:
    members = HubMembers(vault.database, line_id=base.line_id)
    stays, goes = add_device(), add_device()
    members.set_node(stays, 1)
    members.set_node(goes, 2)
    members.seen(stays, adapter_version=3, status=None)
    members.devices.revoke(goes)
    assert [members.device_of(node) for node in (1, 2, 3)] == [stays, None, None]
    assert list(members.node_keys()) == [stays]
    assert [device.device_id for device in members.registered_in_vain()] == [goes]
    assert members.devices.get(stays).adapter_version == 3
    assert members.cohort() == 1
    other = HubMembers(vault.database, line_id="another")
    assert (other.device_of(1), other.cohort()) == (None, 0)

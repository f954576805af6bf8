"""Invitations are labelled, listed, taken back; a device may have to be approved; Flower's list follows the table."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_server.bases import Base
from clawloop_server.errors import DeviceError, FleetError, InvitationError
from clawloop_server.hub.devices import Device, DeviceState
from clawloop_server.hub.invitations import Invitations, InvitationState, invitation_id
from clawloop_server.hub.members import HubMembers
from clawloop_server.hub.registrar import Registrar
from clawloop_server.vault.store import Vault
from clawloop_shared import signing, wire
from clawloop_shared.messages import JoinRequest, UploadItem
from clawloop_shared.records import Step, StepBatch


def request(code: str, base: Base) -> JoinRequest:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    return JoinRequest(code=code, device_key=signing.public_key(signing.new_key()), node_key_pem=pem, line=base.line)


class Flower:
    """Flower's list: names by key, and a number each."""

    def __init__(self) -> None:
        self.keys: dict[str, tuple[str, int]] = {}
        self.refuses: set[str] = set()
        self.tries = 0

    async def admit(self, device_id: str, key_pem: str) -> int:
        self.tries += 1
        if device_id in self.refuses:
            raise FleetError("no such curve")
        await self.expel(device_id)
        self.keys[key_pem] = (device_id, self.tries)
        return self.tries

    async def expel(self, device_id: str) -> None:
        self.keys = {key: found for key, found in self.keys.items() if found[0] != device_id}


@pytest.fixture
def invitations(vault: Vault) -> Invitations:
    return Invitations(vault.database)


@pytest.fixture
def members(vault: Vault, base: Base) -> HubMembers:
    """Of a server that approves each device."""
    return HubMembers(vault.database, line_id=base.line_id, approve=True)


def join(members: HubMembers, invitations: Invitations, base: Base) -> Device:
    return members.redeem(request(invitations.create(), base))


def test_an_invitation_is_listed_with_its_label_and_who_used_it(
    invitations: Invitations, members: HubMembers, base: Base
) -> None:
    code = invitations.create(label="Ada's Mac", expires_s=60, now_ms=1_000)
    (found,) = invitations.all()
    assert (found.invitation_id, found.label) == (invitation_id(code), "Ada's Mac")
    assert [found.state(now) for now in (2_000, 61_000)] == [InvitationState.OPEN, InvitationState.EXPIRED]
    joined = members.redeem(request(invitations.create(label="Bob"), base))
    assert [(each.label, each.device_id) for each in invitations.all()] == [
        ("Ada's Mac", None),
        ("Bob", joined.device_id),
    ]


@pytest.mark.parametrize("label", ["a" * 101, "two\nlines", "\x1b[31m"])
def test_a_label_is_one_line_of_text(invitations: Invitations, label: str) -> None:
    with pytest.raises(InvitationError, match="label"):
        invitations.create(label=label)


def test_an_invitation_that_was_taken_back_lets_nobody_in(
    invitations: Invitations, members: HubMembers, base: Base
) -> None:
    code, used = invitations.create(), invitations.create()
    joined = members.redeem(request(used, base))
    revoked = invitations.revoke(invitation_id(code)[:8])
    assert revoked.state(revoked.created_ms) is InvitationState.REVOKED
    assert invitations.revoke(invitation_id(code)) == revoked, "again changes nothing"
    with pytest.raises(InvitationError, match="took this invitation back"):
        members.redeem(request(code, base))
    with pytest.raises(InvitationError, match=f"devices revoke {joined.device_id}"):
        invitations.revoke(invitation_id(used))
    for unknown in ("", "zz"):
        with pytest.raises(InvitationError, match="invitations list"):
            invitations.revoke(unknown)


def test_a_device_that_waits_can_send_nothing_until_it_is_approved(
    invitations: Invitations, members: HubMembers, base: Base
) -> None:
    device = join(members, invitations, base)
    assert device.waiting
    members.set_node(device.device_id, 5)  # even if Flower knew it
    assert (members.device_of(5), members.node_keys(), members.cohort()) == (None, {}, 0)
    assert members.unregistered() == []
    members.devices.set_node(device.device_id, None)
    members.devices.approve(device.device_id)
    assert [d.device_id for d in members.unregistered()] == [device.device_id]
    found = members.devices.get(device.device_id)
    assert found.state is DeviceState.JOINED
    assert found.approved_ms > 0
    assert [event.what for event in members.devices.events(device.device_id)] == ["joined", "approved"]


def test_a_device_that_waits_may_ask_again_with_its_code(
    invitations: Invitations, members: HubMembers, base: Base
) -> None:
    asked = request(invitations.create(), base)
    first = members.redeem(asked)
    assert members.redeem(asked) == first
    members.devices.reject(first.device_id)
    with pytest.raises(InvitationError, match="was used"):
        members.redeem(asked)


def test_only_who_waits_can_be_approved_or_rejected(invitations: Invitations, members: HubMembers, base: Base) -> None:
    device = join(members, invitations, base).device_id
    members.devices.reject(device)
    assert members.devices.get(device).state is DeviceState.REVOKED
    for decide in (members.devices.approve, members.devices.reject):
        with pytest.raises(DeviceError, match="revoked"):
            decide(device)


async def test_flowers_list_becomes_that_of_the_table(vault: Vault, base: Base, add_device: Callable[..., str]) -> None:
    flower, members, now_s = Flower(), HubMembers(vault.database, line_id=base.line_id), 0.0
    registrar = Registrar(flower, members, clock=lambda: now_s)
    good, bad, goes = add_device(), add_device(), add_device()
    flower.refuses.add(bad)
    await registrar.settle()
    assert {name for name, _ in flower.keys.values()} == {good, goes}, "one that Flower refuses holds up no other"
    members.devices.revoke(goes)
    await registrar.settle()
    assert {name for name, _ in flower.keys.values()} == {good}
    tries = flower.tries
    await registrar.settle()
    assert flower.tries == tries, "and is not tried again at once"
    flower.refuses.clear()
    now_s = 31.0
    await registrar.settle()
    assert {name for name, _ in flower.keys.values()} == {good, bad}
    assert members.registered_in_vain() == members.unregistered() == []


async def test_after_a_rotation_flower_has_the_new_key_alone(
    vault: Vault, base: Base, add_device: Callable[..., str]
) -> None:
    flower, members = Flower(), HubMembers(vault.database, line_id=base.line_id)
    registrar, device = Registrar(flower, members), add_device()
    await registrar.settle()
    old = members.devices.get(device)
    members.devices.replace_keys(device, device_key=b"n" * 32, node_key_pem="new PEM")
    # The hub was killed here: nothing was registered. Its next look finishes it.
    await registrar.settle()
    assert list(flower.keys) == ["new PEM"]
    assert old.node_id is not None
    assert members.device_of(old.node_id) is None
    found = members.devices.get(device)
    assert found.node_id is not None
    assert members.device_of(found.node_id) == device


def item(step: Step, item_id: str) -> UploadItem:
    return UploadItem(item_id=item_id, receipt_id="r", kind="steps", body=wire.encode(StepBatch([step], [])))


def test_an_item_under_the_id_of_anothers_is_ones_own(
    vault: Vault, add_device: Callable[..., str], make_step: Callable[..., Step]
) -> None:
    owner, thief, step = add_device(), add_device(), make_step(run_id="run")
    vault.receive(owner, [item(step, "the same")])
    for _ in range(2):
        (said,) = vault.receive(thief, [item(make_step(step_id=step.step_id, response_ids=[7]), "the same")])
        assert said.device_id == thief
    assert vault.stats().steps == 2
    vault.delete_device(thief)
    assert vault.stats().steps == 1, "and what becomes of it is the owner's no matter"


@pytest.mark.parametrize("end", ["waits", "leave", "reject"])
def test_nothing_is_taken_of_who_waits_left_or_was_rejected(
    vault: Vault, invitations: Invitations, members: HubMembers, base: Base, make_step: Callable[..., Step], end: str
) -> None:
    device = join(members, invitations, base).device_id
    if end != "waits":
        getattr(members.devices, end)(device)
    with pytest.raises(DeviceError, match=members.devices.get(device).state):
        vault.receive(device, [item(make_step(), "item")])
    assert vault.stats().steps == 0

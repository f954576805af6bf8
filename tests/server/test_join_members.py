"""What members ask of the hub: each for itself alone, freshly signed, once; asked again, answered the same."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_server.errors import FleetError
from clawloop_server.hub.desk import DeskAnswer
from clawloop_server.hub.devices import Devices, DeviceState
from clawloop_server.hub.membership import SKEW_MS, MemberDesk
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.store import Vault
from clawloop_shared import signing, wire
from clawloop_shared.membership import (
    LEAVE_DOMAIN,
    LEFT_DOMAIN,
    RELEASE,
    ROTATED_DOMAIN,
    STANDING_ANSWER_DOMAIN,
    STANDING_DOMAIN,
    LeaveReceipt,
    LeaveRequest,
    RotateReceipt,
    RotateRequest,
    SignedRotation,
    Stand,
    Standing,
    StandingRequest,
    open_answer,
    open_statement,
    sign_request,
    sign_rotation,
)
from clawloop_shared.messages import SignedAnswer

T = TypeVar("T", bound=msgspec.Struct)
ONE, TWO = "1" * 16, "2" * 16


def node_pem() -> str:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


class World:
    """One device, its desk, and a Flower that may be away."""

    def __init__(self, vault: Vault, keys: ServerKeys, add_device: Callable[..., str]) -> None:
        self.now_ms, self.flower_up = 1_000_000_000, True
        self.devices, self.keys = Devices(vault.database), keys
        self.key = signing.new_key()
        self.device = add_device(self.key)
        self.registered: list[str] = []
        self.desk = MemberDesk(
            self.devices,
            register=self.register,
            release_key=keys.release,
            statement=lambda: keys.release_statement(now_ms=self.now_ms),
            clock=lambda: self.now_ms / 1000,
            now_ms=lambda: self.now_ms,
        )

    async def register(self, device_id: str) -> int:
        if not self.flower_up:
            raise FleetError("away")
        self.registered.append(self.devices.get(device_id).node_key_pem)
        self.devices.set_node(device_id, 7)
        return 7

    def rotation(self, new_key: bytes, pem: str, *, old_key: bytes = b"", device: str = "", ago_ms: int = 0) -> bytes:
        request = RotateRequest(
            request_id="r1",
            device_id=device or self.device,
            at_ms=self.now_ms - ago_ms,
            device_key=signing.public_key(new_key),
            node_key_pem=pem,
        )
        return wire.encode(sign_rotation(request, old_key=old_key or self.key, new_key=new_key))

    def goodbye(self, *, key: bytes = b"", device: str = "", ago_ms: int = 0) -> bytes:
        request = LeaveRequest(request_id="l1", device_id=device or self.device, at_ms=self.now_ms - ago_ms)
        return wire.encode(sign_request(request, LEAVE_DOMAIN, private_key=key or self.key))

    async def stands(self, instance: str, *, takes: bool = False, ago_ms: int = 0, key: bytes = b"") -> Standing:
        request = StandingRequest(device_id=self.device, at_ms=self.now_ms - ago_ms, instance=instance, takes=takes)
        body = wire.encode(sign_request(request, STANDING_DOMAIN, private_key=key or self.key))
        return self.opened(await self.desk.standing(body), STANDING_ANSWER_DOMAIN, Standing)

    def opened(self, answer: DeskAnswer, domain: str, kind: type[T]) -> T:
        assert answer.status == 200, answer.message
        signed = wire.decode(answer.body, SignedAnswer)
        return open_answer(signed, domain, kind=kind, public_key=self.keys.release_public)

    @property
    def events(self) -> list[str]:
        return [event.what for event in self.devices.events(self.device)]


@pytest.fixture
def world(vault: Vault, keys: ServerKeys, add_device: Callable[..., str]) -> World:
    return World(vault, keys, add_device)


async def test_both_keys_are_replaced_at_once_and_the_old_one_is_refused_after(world: World) -> None:
    new, pem = signing.new_key(), node_pem()
    answer = await world.desk.rotate(world.rotation(new, pem))
    receipt = world.opened(answer, ROTATED_DOMAIN, RotateReceipt)
    assert (receipt.device_id, receipt.device_key, receipt.node_id) == (world.device, signing.public_key(new), 7)
    found = world.devices.get(world.device)
    assert (found.device_key, found.node_key_pem) == (signing.public_key(new), pem)
    assert world.registered == [pem]
    assert (await world.desk.leave(world.goodbye())).status == 403, "signed by the old key"
    assert world.devices.get(world.device).state is DeviceState.JOINED
    assert world.events == ["joined", "keys rotated"]


async def test_a_lost_answer_is_given_again_and_changes_nothing_twice(world: World) -> None:
    new, pem = signing.new_key(), node_pem()
    asked = world.rotation(new, pem)
    first = world.opened(await world.desk.rotate(asked), ROTATED_DOMAIN, RotateReceipt)
    again = world.opened(await world.desk.rotate(asked), ROTATED_DOMAIN, RotateReceipt)
    assert first == again
    assert world.events == ["joined", "keys rotated"]


async def test_an_older_rotation_cannot_be_played_again(world: World) -> None:
    first_key, second_key, second_pem = signing.new_key(), signing.new_key(), node_pem()
    first = world.rotation(first_key, node_pem())
    await world.desk.rotate(first)
    second = await world.desk.rotate(world.rotation(second_key, second_pem, old_key=first_key))
    assert second.status == 200
    assert (await world.desk.rotate(first)).status == 403
    assert world.devices.get(world.device).node_key_pem == second_pem


async def test_a_rotation_needs_both_signatures_and_is_of_its_own_device(
    world: World, add_device: Callable[..., str]
) -> None:
    thief, other = signing.new_key(), add_device(signing.new_key())
    before = world.devices.get(world.device)
    assert (await world.desk.rotate(world.rotation(thief, node_pem(), old_key=thief))).status == 403
    assert (await world.desk.rotate(world.rotation(signing.new_key(), node_pem(), device=other))).status == 403
    good = wire.decode(world.rotation(signing.new_key(), node_pem()), SignedRotation)
    for broken in (
        msgspec.structs.replace(good, new_signature=good.signature),
        msgspec.structs.replace(good, signature=good.new_signature),
        msgspec.structs.replace(good, payload=good.payload.replace(b'"r1"', b'"r2"')),
    ):
        assert (await world.desk.rotate(wire.encode(broken))).status == 403
    assert world.devices.get(world.device) == before


async def test_keys_of_another_device_half_a_rotation_and_odd_keys_are_refused(
    world: World, add_device: Callable[..., str]
) -> None:
    other_key = signing.new_key()
    add_device(other_key)
    before = world.devices.get(world.device)
    taken = await world.desk.rotate(world.rotation(other_key, node_pem()))
    half = await world.desk.rotate(world.rotation(world.key, node_pem()))
    odd = await world.desk.rotate(world.rotation(signing.new_key(), "no key"))
    assert (taken.status, half.status, odd.status) == (409, 409, 400)
    assert world.devices.get(world.device) == before


async def test_a_rotation_while_flower_is_away_holds_and_is_registered_later(world: World) -> None:
    world.flower_up = False
    world.devices.set_node(world.device, 3)
    answer = await world.desk.rotate(world.rotation(signing.new_key(), node_pem()))
    assert world.opened(answer, ROTATED_DOMAIN, RotateReceipt).node_id == 0
    assert world.devices.get(world.device).node_id is None, "so the hub's next look registers it"
    assert world.devices.by_node(3) is None, "and the old node's answers count for nobody"


async def test_who_left_is_out_and_may_say_so_again(world: World) -> None:
    for _ in range(2):
        receipt = world.opened(await world.desk.leave(world.goodbye()), LEFT_DOMAIN, LeaveReceipt)
        assert (receipt.request_id, receipt.device_id) == ("l1", world.device)
    assert world.devices.get(world.device).state is DeviceState.LEFT
    assert world.events == ["joined", "left"]
    assert (await world.stands(ONE)).state is Stand.LEFT
    assert (await world.desk.rotate(world.rotation(signing.new_key(), node_pem()))).status == 403


async def test_nobody_leaves_for_another(world: World, add_device: Callable[..., str]) -> None:
    other = add_device(signing.new_key())
    assert (await world.desk.leave(world.goodbye(device=other))).status == 403
    assert (await world.desk.leave(world.goodbye(key=signing.new_key()))).status == 403
    assert (await world.desk.leave(world.goodbye(device="nobody"))).status == 403
    assert {device.state for device in world.devices.all()} == {DeviceState.JOINED}


async def test_a_revoked_device_that_leaves_stays_revoked_and_a_deleted_one_is_a_stranger(world: World) -> None:
    world.devices.revoke(world.device)
    assert (await world.stands(ONE)).state is Stand.REVOKED
    assert (await world.desk.leave(world.goodbye())).status == 200
    assert world.devices.get(world.device).state is DeviceState.REVOKED
    world.devices.bury(world.device)
    assert (await world.desk.leave(world.goodbye())).status == 403
    assert world.events == ["deleted"]


@pytest.mark.parametrize("ago_ms", [SKEW_MS + 1, -SKEW_MS - 1, 86_400_000])
async def test_what_changes_something_must_be_fresh(world: World, ago_ms: int) -> None:
    before = world.devices.get(world.device)
    for answer in (
        await world.desk.leave(world.goodbye(ago_ms=ago_ms)),
        await world.desk.rotate(world.rotation(signing.new_key(), node_pem(), ago_ms=ago_ms)),
    ):
        assert answer.status == 400
        assert "set the clock" in answer.message
    assert world.devices.get(world.device) == before


async def test_a_signature_for_one_purpose_is_none_for_another(world: World) -> None:
    assert (await world.desk.standing(world.goodbye())).status == 403
    request = StandingRequest(device_id=world.device, at_ms=world.now_ms, instance=ONE)
    body = wire.encode(sign_request(request, STANDING_DOMAIN, private_key=world.key))
    assert (await world.desk.leave(body)).status == 403
    for bad in (b"", b"rubbish", wire.encode(SignedAnswer(b"{}", b""))):
        assert (await world.desk.standing(bad)).status == 400
        assert (await world.desk.rotate(bad)).status == 400
        assert (await world.desk.leave(bad)).status == 400


async def test_standing_is_told_to_a_wrong_clock_too_and_vouches_for_the_release_key(world: World) -> None:
    told = await world.stands(ONE, takes=True, ago_ms=86_400_000)
    assert (told.state, told.at_ms, told.holds) == (Stand.JOINED, world.now_ms, False), "but it takes nothing"
    assert told.statement is not None
    root = world.keys.root_public
    said = open_statement(told.statement, root, purpose=RELEASE, now_ms=world.now_ms)
    assert said.key == world.keys.release_public


async def test_of_two_edges_with_one_key_the_one_that_came_last_serves_and_both_are_told(world: World) -> None:
    assert (await world.stands(ONE, takes=True)).holds
    world.now_ms += 1000
    assert (await world.stands(ONE)).holds
    assert (await world.stands(TWO, takes=True)).holds
    world.now_ms += 1000
    old = await world.stands(ONE)
    assert (old.holds, old.held_ms) == (False, world.now_ms - 1000)
    new = await world.stands(TWO)
    assert (new.holds, new.rival_ms) == (True, world.now_ms)
    assert world.events == ["joined", "two edges"]
    assert world.devices.get(world.device).doubled(now_ms=world.now_ms)
    assert not world.devices.get(world.device).doubled(now_ms=world.now_ms + 3_600_000)


async def test_an_edge_that_is_started_again_is_no_second_edge(world: World) -> None:
    for number in range(5):
        world.now_ms += 1000
        assert (await world.stands(f"{number:016x}", takes=True)).holds
    assert world.events == ["joined"]


async def test_an_older_word_takes_nothing_back(world: World) -> None:
    await world.stands(TWO, takes=True)
    assert not (await world.stands(ONE, takes=True, ago_ms=10)).holds, "a request that was played again"


async def test_a_device_may_not_ask_without_end(world: World) -> None:
    request = StandingRequest(device_id=world.device, at_ms=world.now_ms, instance=ONE)
    body = wire.encode(sign_request(request, STANDING_DOMAIN, private_key=world.key))
    answers = [await world.desk.standing(body) for _ in range(32)]
    assert [answer.status for answer in answers] == [200] * 30 + [429] * 2
    assert answers[-1].retry_after_s > 0
    world.now_ms += 61_000
    assert (await world.desk.standing(body)).status == 200


async def test_a_wrong_clock_is_no_second_edge(world: World) -> None:
    assert (await world.stands(ONE, takes=True)).holds
    for instance in (ONE, TWO):
        assert not (await world.stands(instance, takes=True, ago_ms=86_400_000)).holds
    assert world.events == ["joined"]
    assert (await world.stands(ONE)).holds

"""The join desk lets in who has a code and the key that it names, tells others why not, and pauses after too many wrong
codes of one address, or of all."""

import asyncio
from dataclasses import dataclass

import pytest

from clawloop_server.errors import DeviceError, FleetError, InvitationError
from clawloop_server.hub.join import JoinDesk
from clawloop_shared import signing, wire
from clawloop_shared.errors import StorageError
from clawloop_shared.membership import RELEASE, KeyStatement, open_statement, prove_join, sign_statement
from clawloop_shared.messages import JoinReply, JoinRequest, SignedAnswer
from clawloop_shared.model_line import ModelLine

LINE = ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c")


KEY, ROOT, RELEASE_KEY = signing.new_key(), signing.new_key(), b"r" * 32


@dataclass
class Device:
    device_id: str
    waiting: bool = False


class Admission:
    """One good code, in memory."""

    def __init__(self) -> None:
        self.nodes: dict[str, int] = {}
        self.broken: Exception | None = None
        self.waiting = False

    def redeem(self, request: JoinRequest) -> Device:
        if self.broken:
            raise self.broken
        if request.code != "good":
            raise InvitationError("this invitation is not known here")
        return Device("device-1", self.waiting)

    def set_node(self, device_id: str, node_id: int) -> None:
        self.nodes[device_id] = node_id


class World:
    def __init__(self) -> None:
        self.now_s, self.superlink_up = 1000.0, True
        self.admission = Admission()
        self.desk = JoinDesk(
            self.admission,
            register=self.register,
            line=LINE,
            release_key=RELEASE_KEY,
            statement=statement,
            wrong_per_minute_total=12,
            wrong_per_minute=5,
            clock=lambda: self.now_s,
        )

    async def register(self, key_pem: str, name: str) -> int:
        if not self.superlink_up:
            raise FleetError("away")
        return 2**63 + 1


@pytest.fixture
def world() -> World:
    return World()


def statement() -> SignedAnswer:
    said = KeyStatement(key=RELEASE_KEY, purpose=RELEASE, not_before_ms=0, expires_ms=1 << 53)
    return sign_statement(said, ROOT)


def request(code: str = "good", *, key: bytes = KEY) -> bytes:
    asked = JoinRequest(code=code, device_key=signing.public_key(KEY), node_key_pem="pem", line=LINE)
    return wire.encode(prove_join(asked, key))


async def test_a_good_code_lets_the_device_in(world: World) -> None:
    answer = await world.desk.answer(request())
    assert answer.status == 200
    reply = wire.decode(answer.body, JoinReply)
    assert (reply.device_id, reply.node_id, reply.release_key) == ("device-1", 2**63 + 1, b"r" * 32)
    assert world.admission.nodes == {"device-1": 2**63 + 1}
    vouched = open_statement(reply.statement, signing.public_key(ROOT), purpose=RELEASE, now_ms=1)
    assert vouched.key == reply.release_key


async def test_nobody_joins_with_the_key_of_another(world: World) -> None:
    answer = await world.desk.answer(request(key=signing.new_key()))
    assert (answer.status, world.admission.nodes) == (403, {})


async def test_a_device_that_waits_is_not_registered_in_flower(world: World) -> None:
    world.admission.waiting = True
    reply = wire.decode((await world.desk.answer(request())).body, JoinReply)
    assert (reply.waiting, reply.node_id, world.admission.nodes) == (True, 0, {})


async def test_too_many_wrong_codes_pause_joining_for_a_while(world: World) -> None:
    statuses = [(await world.desk.answer(request("bad"))).status for _ in range(7)]
    assert statuses == [403] * 5 + [429] * 2
    paused = await world.desk.answer(request())
    assert paused.status == 429
    assert 0 < paused.retry_after_s <= 61
    world.now_s += 61
    assert (await world.desk.answer(request())).status == 200


async def test_wrong_codes_of_one_address_do_not_keep_out_another(world: World) -> None:
    for _ in range(7):
        await world.desk.answer(request("bad"), peer="10.0.0.1")
    assert (await world.desk.answer(request(), peer="10.0.0.1")).status == 429
    assert (await world.desk.answer(request(), peer="10.0.0.2")).status == 200


async def test_an_ipv6_caller_is_its_network(world: World) -> None:
    statuses = [(await world.desk.answer(request("bad"), peer=f"2001:db8::{i:x}")).status for i in range(6)]
    assert statuses == [403] * 5 + [429]
    assert (await world.desk.answer(request(), peer="2001:db8:0:1::1")).status == 200


async def test_wrong_codes_of_many_addresses_pause_joining_for_all(world: World) -> None:
    statuses = [(await world.desk.answer(request("bad"), peer=f"10.0.0.{i}")).status for i in range(14)]
    assert statuses == [403] * 12 + [429] * 2
    assert (await world.desk.answer(request(), peer="10.0.1.1")).status == 429


async def test_good_codes_are_not_counted_however_many_come_at_once(world: World) -> None:
    answers = await asyncio.gather(*(world.desk.answer(request(), peer="10.0.0.1") for _ in range(20)))
    assert [answer.status for answer in answers] == [200] * 20


async def test_what_is_no_join_request_is_bad_input(world: World) -> None:
    assert (await world.desk.answer(b"rubbish")).status == 400


@pytest.mark.parametrize(
    ("error", "status"), [(DeviceError("its keys are another's"), 409), (StorageError("disk full"), 503)]
)
async def test_each_failure_has_its_own_status(world: World, error: Exception, status: int) -> None:
    world.admission.broken = error
    assert (await world.desk.answer(request())).status == status


async def test_a_superlink_that_is_away_asks_the_device_to_try_again(world: World) -> None:
    world.superlink_up = False
    answer = await world.desk.answer(request())
    assert (answer.status, answer.retry_after_s > 0) == (503, True)
    world.superlink_up = True
    assert (await world.desk.answer(request())).status == 200

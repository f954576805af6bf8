"""Servers and members of a secure sum that lie: refused, named, and no harm to the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest

from clawloop_edge.learn import sums
from clawloop_edge.learn.sums import SumMember, SumRules
from clawloop_server.aggregate.secure import Status
from clawloop_shared import masking, secure, signing, wire
from clawloop_shared.deltas import LoraDelta, Method
from clawloop_shared.errors import ClawloopError, StorageError, SumError
from clawloop_shared.flat import unflatten
from clawloop_shared.levels import Level
from clawloop_shared.messages import SecureReply, SecureRequest
from clawloop_shared.secure import Phase

from .secure_fleet import SIZES, TERMS, VALUES, Play

T = TypeVar("T", bound=msgspec.Struct)


def swapped(reply: SecureReply, kind: type[T], **changes: object) -> SecureReply:
    body = msgspec.structs.replace(wire.decode(reply.body, kind), **changes)
    return msgspec.structs.replace(reply, body=wire.encode(body))


# servers that lie


def asked(play: Play, name: str, phase: Phase, body: msgspec.Struct, sum_id: str = "sum") -> SecureReply:
    return play.devices[name].member.asked(SecureRequest(sum_id, phase, wire.encode(body)))


def last_request(play: Play, name: str, kind: type[T]) -> T:
    tag = kind.__struct_config__.tag
    assert isinstance(tag, str)
    found = [r for n, r in play.requests if n == name and r.body[5:].startswith(tag.encode())]
    return wire.decode(found[-1].body, kind)


def test_a_server_that_asks_for_both_secrets_gets_neither() -> None:
    """Told that d01 is gone by half of the members' shares, and that it stayed by the others': each device signs one
    list of survivors alone, and gives shares for that one alone."""
    play = Play(7)
    play.until(Phase.CONFIRM)
    digest = play.sum._roster().digest
    everybody = play.sum.state.survivors
    fewer = everybody[:-1]
    assert asked(play, name_at(play, 1), Phase.CONFIRM, secure.Survivors(roster=digest, places=everybody)).body
    refused = asked(play, name_at(play, 1), Phase.CONFIRM, secure.Survivors(roster=digest, places=fewer))
    assert refused.refused == sums.ONCE
    for place in everybody:
        again = secure.Confirmations(roster=digest, places=fewer, signatures={})
        assert asked(play, name_at(play, place), Phase.UNMASK, again).refused
    answers = [play.devices[name_at(play, place)].member for place in everybody]
    assert all(member.asked(SecureRequest("sum", Phase.UNMASK, b"")).refused for member in answers)


def test_survivors_that_differ_get_no_unmasking() -> None:
    play = Play(7)
    play.until(Phase.UNMASK)
    digest, everybody = play.sum._roster().digest, play.sum.state.survivors
    signatures = dict(play.sum.state.signatures)
    for body in (
        secure.Confirmations(roster=digest, places=everybody[1:], signatures=signatures),
        secure.Confirmations(roster=digest, places=everybody, signatures=dict(list(signatures.items())[:4])),
        secure.Confirmations(roster=digest, places=everybody, signatures=signatures | {1: bytes(64)}),
        secure.Confirmations(roster=bytes(32), places=everybody, signatures=signatures),
    ):
        name = name_at(play, everybody.pop())
        reply = asked(play, name, Phase.UNMASK, body)
        assert reply.refused
        assert not reply.body
        good = secure.Confirmations(roster=digest, places=play.sum.state.survivors, signatures=signatures)
        assert asked(play, name, Phase.UNMASK, good).refused, "its part is over"


def name_at(play: Play, place: int) -> str:
    return play.sum._ids()[place]


def test_invented_members_need_signatures_and_new_ones_a_minority(caplog: pytest.LogCaptureFixture) -> None:
    play = Play(6)
    play.run()
    known = play.devices["d00"].seen
    assert len(known) == 5
    forged = Play(6)
    forged.devices["d00"].seen = set(known)
    forged.until(Phase.SHARE)
    body = wire.decode(forged.sum._body("d00"), secure.Roster)
    ghosts = sorted(
        [advert for advert in body.adverts if advert.device_key == signing.public_key(forged.devices["d00"].key)]
        + [invented(number) for number in range(6)],
        key=lambda advert: advert.device_key,
    )
    reply = asked(forged, "d00", Phase.SHARE, msgspec.structs.replace(body, adverts=ghosts))
    assert reply.refused == sums.MEMBERS
    assert "6 of 6 other members were never in a sum with this device" in caplog.text


def invented(number: int, terms: secure.Terms = TERMS) -> secure.SignedAdvert:
    """What a server can make itself: a device that nobody has."""
    advert = secure.Advert(
        terms=terms.digest,
        mask_key=masking.public_of(masking.new_secret()),
        share_key=masking.public_of(masking.new_secret()),
        commitment=bytes(32),
        sigma=0.5,
    )
    return secure.sign_advert(advert, hashlib.sha256(b"ghost %d" % number).digest())


def rosters(play: Play) -> dict[str, secure.Roster]:
    good = wire.decode(play.sum._body("d00"), secure.Roster)
    mine = signing.public_key(play.devices["d00"].key)
    others = [advert for advert in good.adverts if advert.device_key != mine]
    other = next(i for i, advert in enumerate(good.adverts) if advert.device_key != mine)

    def with_other(advert: secure.SignedAdvert) -> secure.Roster:
        adverts = [*good.adverts]
        adverts[other] = advert
        return msgspec.structs.replace(good, adverts=adverts)

    foreign = msgspec.structs.replace(TERMS, sum_id="another")
    ours = next(advert for advert in good.adverts if advert.device_key == mine)
    theirs = good.adverts[other]
    return {
        "was not made by key": with_other(msgspec.structs.replace(theirs, signature=bytes(64))),
        "this device signed": msgspec.structs.replace(good, adverts=others),
        "the roster has 4 members": msgspec.structs.replace(good, adverts=good.adverts[:4]),
        "in the order of its device keys": msgspec.structs.replace(good, adverts=good.adverts[::-1]),
        "or has one twice": with_other(good.adverts[other + 1 if other + 1 < len(good.adverts) else other - 1]),
        "of another sum": msgspec.structs.replace(good, terms=bytes(32)),
        "signed for another sum": with_other(
            msgspec.structs.replace(secure_of(play, theirs, foreign), device_key=theirs.device_key)
        ),
        "what this device signed": msgspec.structs.replace(
            good, adverts=[replaced_keys(play) if advert is ours else advert for advert in good.adverts]
        ),
    }


def secure_of(play: Play, advert: secure.SignedAdvert, terms: secure.Terms) -> secure.SignedAdvert:
    """The same device's advert for other terms."""
    device = next(d for d in play.devices.values() if signing.public_key(d.key) == advert.device_key)
    opened = msgspec.msgpack.decode(advert.payload, type=secure.Advert)
    return secure.sign_advert(msgspec.structs.replace(opened, terms=terms.digest), device.key)


def replaced_keys(play: Play) -> secure.SignedAdvert:
    """Other keys than those that d00 made, signed by d00 (at another time, say)."""
    opened = msgspec.msgpack.decode(invented(0).payload, type=secure.Advert)
    return secure.sign_advert(opened, play.devices["d00"].key)


@pytest.mark.parametrize(
    "reason",
    [
        "was not made by key",
        "this device signed",
        "the roster has 4 members",
        "in the order of its device keys",
        "or has one twice",
        "of another sum",
        "signed for another sum",
        "what this device signed",
    ],
)
def test_a_roster_that_breaks_a_rule_ends_the_part(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    play = Play(6)
    play.until(Phase.SHARE)
    reply = asked(play, "d00", Phase.SHARE, rosters(play)[reason])
    assert reply.refused in (sums.BROKEN, sums.MEMBERS)
    assert reason in caplog.text
    assert asked(play, "d00", Phase.SHARE, wire.decode(play.sum._body("d00"), secure.Roster)).refused
    assert not play.devices["d00"].left


def test_swapped_keys_and_two_rosters_open_nothing() -> None:
    """The server shows d00 another roster than the others: shares that were sealed for one do not open in the other."""
    play = Play(7)
    play.until(Phase.SHARE)
    good = wire.decode(play.sum._body("d00"), secure.Roster)
    fewer = msgspec.structs.replace(
        good, adverts=[a for a in good.adverts if a.device_key != signing.public_key(play.devices["d06"].key)]
    )
    assert asked(play, "d00", Phase.SHARE, fewer).body
    done = play.run()
    assert done.state.status is Status.DONE, "d00 alone dropped out, the others do not care"
    assert "d00" not in done.members
    assert not play.devices["d00"].left
    assert not play.devices["d00"].seen, "a sum that came to nothing makes nobody known"
    play.is_right()


def test_the_same_question_gets_the_same_answer_and_another_none() -> None:
    play = Play(6)
    for phase in Phase:
        play.until(phase)
        request = play.sum.due("d00", now_ms=play.now_ms)
        assert request is not None
        first, second = (play.devices["d00"].member.asked(request) for _ in range(2))
        assert first == second
        assert first.body
    assert len(play.devices["d00"].left) == 1
    late = last_request(play, "d00", secure.Delivery)
    reply = asked(play, "d00", Phase.MASKED, late)
    assert reply.refused == sums.OVER
    play.run()
    play.is_right()


def test_a_second_masked_vector_is_refused() -> None:
    play = Play(7)
    play.until(Phase.MASKED)
    delivery = wire.decode(play.sum._body("d00"), secure.Delivery)
    assert asked(play, "d00", Phase.MASKED, delivery).body
    mine = play.sum._place("d00")
    without = next(place for place in delivery.places if place != mine)
    at = delivery.places.index(without)
    fewer = secure.Delivery(
        roster=delivery.roster,
        places=[place for place in delivery.places if place != without],
        sealed=delivery.sealed[:at] + delivery.sealed[at + 1 :],
        hashes=delivery.hashes[:at] + delivery.hashes[at + 1 :],
    )
    assert asked(play, "d00", Phase.MASKED, fewer).refused == sums.ONCE
    assert len(play.devices["d00"].left) == 1


def test_what_was_given_to_one_sum_is_not_given_to_another() -> None:
    play = Play(6)
    play.run()
    other = asked(play, "d00", Phase.ADVERTISE, msgspec.structs.replace(TERMS, sum_id="next"), sum_id="next")
    assert other.refused == sums.NOTHING


def test_phases_out_of_turn_and_unknown_sums_are_refused() -> None:
    play = Play(5)
    assert asked(play, "d00", Phase.SHARE, TERMS).refused == sums.UNKNOWN
    asked(play, "d01", Phase.ADVERTISE, TERMS)
    assert asked(play, "d01", Phase.UNMASK, TERMS).refused == sums.ONCE
    asked(play, "d03", Phase.ADVERTISE, TERMS)
    assert play.devices["d03"].member.asked(SecureRequest("sum", "steal", b"")).refused == sums.BROKEN


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task_id": "other"}, "task_id"),
        ({"base_version": 3}, "base_version"),
        ({"clip": 0.5}, "clip"),
        ({"rank": 4}, "rank"),
        ({"method": Method.ROLORA_B}, "method"),
        ({"values": VALUES + 1}, "values"),
        ({"min_members": 3}, "secure_min_members"),
        ({"sum_id": "else"}, "the terms are of sum else"),
    ],
)
def test_other_terms_than_the_tasks_are_refused(
    change: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    play = Play(5)
    reply = asked(play, "d00", Phase.ADVERTISE, msgspec.structs.replace(TERMS, **change))
    assert reply.refused in (sums.NOT_OURS, sums.MEMBERS)
    assert reason in caplog.text
    assert not reply.body


def test_a_delta_that_is_not_noised_enters_no_sum() -> None:
    for change in ({"level": Level.DELTAS}, {"sigma": 0.0}, {"clip": 3.0}):
        play = Play(5)
        device = play.devices["d00"]
        device.delta = msgspec.structs.replace(device.delta, **change)
        assert asked(play, "d00", Phase.ADVERTISE, TERMS).refused == sums.NOT_OURS


@pytest.mark.parametrize("error", [StorageError, SumError])
def test_what_goes_on_in_a_device_is_told_to_its_log_alone(
    error: type[ClawloopError], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    play = Play(6)
    play.until(Phase.MASKED)
    delivery = wire.decode(play.sum._body("d00"), secure.Delivery)

    def leaving(item_id: str, body: bytes) -> None:
        raise error("/Users/somebody/pool.sqlite: item took back 3 of 8 sessions")

    monkeypatch.setattr(play.devices["d00"], "leaving", leaving)
    assert asked(play, "d00", Phase.MASKED, delivery).refused == sums.NOTHING
    assert "/Users/somebody" in caplog.text
    monkeypatch.setattr(play.devices["d01"], "keep", lambda _: leaving("", b""))
    play.until(Phase.CONFIRM)
    request = play.sum.due("d01", now_ms=play.now_ms)
    assert request is not None
    reply = play.devices["d01"].member.asked(request)
    assert reply.refused == (sums.HERE if error is StorageError else sums.BROKEN)


def test_who_fell_out_of_a_sum_is_not_known_by_it() -> None:
    play = Play(8)
    play.until(Phase.MASKED)
    play.gone.add("d07")
    play.run()
    play.is_right()
    assert "d07" not in play.sum.members
    fell_out = signing.public_key(play.devices["d07"].key)
    assert all(fell_out not in play.devices[name].seen for name in play.sum.members)
    assert all(len(play.devices[name].seen) == 6 for name in play.sum.members)


def test_what_was_learned_is_out_of_memory_once_it_is_masked_or_something_was_forgotten() -> None:
    play = Play(7)
    play.until(Phase.MASKED)
    forgetful, other = play.devices["d06"].member, play.devices["d00"].member
    play.ask("d00")
    held = other._parts["sum"]
    assert isinstance(held, sums._Part)
    assert not held.holds_values
    assert not any(isinstance(value, LoraDelta | sums.Summand) for value in vars(held).values())
    for member in (forgetful, other):
        member.drop_values()
    assert forgetful._parts["sum"] == sums.NOTHING
    assert other._parts["sum"] is held
    play.run()
    play.is_right()
    assert "d06" not in play.sum.members
    assert not play.devices["d06"].left


# members that lie


def test_a_forged_signature_takes_its_device_out() -> None:
    def forge(request: SecureRequest, reply: SecureReply) -> SecureReply:
        return swapped(reply, secure.SignedAdvert, signature=bytes(64)) if request.phase == Phase.ADVERTISE else reply

    play = Play(6)
    play.devices["d02"].tamper = forge
    play.run()
    play.is_right()
    assert "d02" not in play.sum.members
    assert "was not made by key" in play.errors[0]


def test_a_device_that_signs_with_anothers_key_is_not_that_device() -> None:
    play = Play(6)
    strange, key = play.devices["d03"], play.devices["d01"].key
    stranger = SumMember(strange, strange, device_key=lambda: key, rules=SumRules())
    play.devices["d03"].member = stranger
    play.run()
    play.is_right()
    assert "d03" not in play.sum.members
    assert "not with its own" in play.errors[0]


def garbage(phase: Phase, **changes: object) -> Callable[[SecureRequest, SecureReply], SecureReply]:
    kinds: dict[Phase, type[msgspec.Struct]] = {
        Phase.SHARE: secure.Shares,
        Phase.MASKED: secure.Masked,
        Phase.CONFIRM: secure.Confirmed,
        Phase.UNMASK: secure.Unmasking,
    }
    return lambda request, reply: swapped(reply, kinds[phase], **changes) if request.phase == phase else reply


@pytest.mark.parametrize("phase", list(Phase))
def test_bytes_that_are_no_answer_take_their_device_out(phase: Phase) -> None:
    play = Play(6)
    play.devices["d01"].tamper = lambda request, reply: (
        msgspec.structs.replace(reply, body=b"garbage") if request.phase == phase else reply
    )
    play.run()
    play.is_right()
    assert len(play.errors) == 1
    late = phase in (Phase.CONFIRM, Phase.UNMASK)
    assert ("d01" in play.sum.members) is late


@pytest.mark.parametrize(
    ("tamper", "members"),
    [
        (garbage(Phase.SHARE, sealed=[b"x"] * 6), 5),
        (garbage(Phase.SHARE, hashes=[]), 5),
        (garbage(Phase.MASKED, values=b"1234"), 5),
        (garbage(Phase.MASKED, roster=bytes(32)), 5),
        (garbage(Phase.CONFIRM, signature=bytes(64)), 6),
        (garbage(Phase.UNMASK, own={}), 6),
    ],
)
def test_wrong_parts_take_their_device_out(tamper: Callable[..., SecureReply], members: int) -> None:
    play = Play(6)
    play.devices["d04"].tamper = tamper
    play.run()
    play.is_right()
    assert len(play.sum.members) == members


def test_a_wrong_share_at_the_end_is_seen_and_done_without() -> None:
    def lie(request: SecureRequest, reply: SecureReply) -> SecureReply:
        if request.phase != Phase.UNMASK:
            return reply
        own = wire.decode(reply.body, secure.Unmasking).own
        return swapped(reply, secure.Unmasking, own={place: bytes(33) for place in own})

    play = Play(6)
    play.devices["d00"].tamper = lie
    play.run()
    play.is_right()
    assert "its share of member" in play.sum.state.out["d00"]


def test_shares_that_nobody_can_open_end_the_sum_with_their_senders_name() -> None:
    play = Play(7)
    sealed = 12 + 66 + 16

    def scramble(request: SecureRequest, reply: SecureReply) -> SecureReply:
        if request.phase != Phase.SHARE:
            return reply
        body = wire.decode(reply.body, secure.Shares)
        return swapped(reply, secure.Shares, sealed=[b"\1" * sealed if part else b"" for part in body.sealed])

    play.devices["d05"].tamper = scramble
    done = play.run()
    assert done.state.status is Status.FAILED
    assert "device d05's shares: sealed shares do not open" in done.state.reason
    assert done.culprits == ["d05"]
    assert all(not device.left for name, device in play.devices.items() if name != "d05"), (
        "they may go into another sum"
    )


def test_one_that_accuses_falsely_is_out_alone() -> None:
    play = Play(7)
    play.devices["d01"].tamper = lambda request, reply: (
        SecureReply("sum", Phase.MASKED, refused=secure.accusation(3, "bad"))
        if request.phase == Phase.MASKED
        else reply
    )
    done = play.run()
    play.is_right()
    assert not done.culprits
    assert "d01" not in done.members


def test_shares_of_another_secret_end_the_sum_with_the_name() -> None:
    """The shares open and fit their hashes, but are not of what was signed for: the sum cannot be unmasked."""
    play = Play(6)
    cheat = play.devices["d02"]
    play.until(Phase.SHARE)
    part = cheat.member._parts["sum"]
    assert not isinstance(part, str)
    kept, part._seed = part._seed, bytes(32)
    play.ask("d02")
    part._seed = kept
    done = play.run()
    assert done.state.status is Status.FAILED
    assert "device d02 shared another secret than the one that it had signed for" in done.state.reason


@pytest.mark.parametrize(("scale", "reason"), [(1e3, "norm"), (0.0, "trajectories")])
def test_values_that_no_clip_allows_are_seen_in_the_sum(scale: float, reason: str) -> None:
    play = Play(6)
    cheat = play.devices["d02"]
    if scale:
        cheat.delta = msgspec.structs.replace(cheat.delta, weights=unflatten(cheat.values * scale, SIZES))
    else:
        cheat.delta = msgspec.structs.replace(cheat.delta, trajectories=1 << 30)
    done = play.run()
    assert done.state.status is Status.FAILED
    assert reason in done.state.reason
    assert "one sent something else" in done.state.reason

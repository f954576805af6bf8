"""A secure sum as its server runs it: which member is asked what next, and what their answers add up to.

A state machine: answers and times go in, requests come out; its state is values alone, so that it can be kept and gone
on with. It gets of each member a masked vector, and shares that open the sum of those that stayed; a member that breaks
a rule is left out, or ends the sum and is named. Knows no database, clock or network. docs/formats/secure.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from statistics import median_low

import msgspec
import numpy as np

from clawloop_server.aggregate.secure_unmasking import Total, unmask
from clawloop_shared import secure, signing, wire
from clawloop_shared.errors import InvalidError, SumError
from clawloop_shared.fixed_point import Ring
from clawloop_shared.messages import SecureReply, SecureRequest
from clawloop_shared.secure import Phase
from clawloop_shared.shamir import SHARE_BYTES

AGAIN_MS = 60_000
"""after a device said that it has nothing yet, until it is asked again"""
MOST_SIGMA = 16.0
"""how many times the usual noise a member may say that its values have: what a sum may come to grows with it"""
_SEALED_BYTES = 12 + 2 * SHARE_BYTES + 16
_HASHES_BYTES = 64
_NAMED = 5


class Status(StrEnum):
    """What became of a sum."""

    RUNNING = "running"
    """its members are being asked"""
    DONE = "done"
    """there is a sum"""
    FAILED = "failed"
    """there is none, and never will be"""


class SumState(msgspec.Struct, kw_only=True):
    """All that a sum is, but for the total of the masked values. `devices` are those that were asked in, with their
    enrolled keys; `out` those that take no part any more, and why."""

    terms: secure.Terms
    devices: dict[str, bytes]
    cohort: str = ""
    sigma: float = 0.0
    """that of the task"""
    phase: Phase = Phase.ADVERTISE
    status: Status = Status.RUNNING
    reason: str = ""
    deadline_ms: int
    out: dict[str, str] = {}
    again_ms: dict[str, int] = {}
    adverts: dict[str, secure.SignedAdvert] = {}
    advert_ms: dict[str, int] = {}
    gathered: bool = False
    """whether there were enough adverts at one time"""
    roster: secure.Roster | None = None
    shares: dict[int, secure.Shares] = {}
    masked: list[int] = []
    items: dict[int, str] = {}
    """by place: the name that a member gave to its masked values"""
    survivors: list[int] = []
    signatures: dict[int, bytes] = {}
    unmaskings: dict[int, secure.Unmasking] = {}
    accused: dict[int, list[int]] = {}
    """by place: the places of those that could not open its shares"""
    loud: list[str] = []
    """those that said that they have far more noise than the others"""


class SecureSum:
    """One sum. Members are known by the device ids of this server."""

    def __init__(self, state: SumState, *, phase_ms: int, total: Ring | None = None) -> None:
        """`phase_ms`: how long a phase waits for who has not answered; `total`: as it was kept with the state."""
        self.state, self._phase_ms = state, phase_ms
        self.total = np.zeros(state.terms.values + 1, np.uint32) if total is None else total
        self.result: Total | None = None
        self._members = secure.check_roster(state.roster, state.terms) if state.roster else None
        self._bodies: dict[str, bytes] = {}

    @classmethod
    def begin(
        cls,
        terms: secure.Terms,
        devices: Mapping[str, bytes],
        *,
        now_ms: int,
        phase_ms: int,
        patience_ms: int,
        cohort: str = "",
        sigma: float = 0.0,
    ) -> SecureSum:
        """Ask these devices (of one cohort) in; for `patience_ms` at most, if there are too few for so long. `sigma`:
        the noise that the task asks for."""
        state = SumState(
            terms=terms, devices=dict(devices), cohort=cohort, sigma=sigma, deadline_ms=now_ms + patience_ms
        )
        return cls(state, phase_ms=phase_ms)

    def add(self, device_id: str, device_key: bytes) -> None:
        """Ask another device in, if it is not too late."""
        if self.state.phase is Phase.ADVERTISE and len(self.state.devices) < secure.MAX_MEMBERS:
            self.state.devices.setdefault(device_id, device_key)

    @property
    def members(self) -> list[str]:
        """The devices whose values are in the sum, or would be now."""
        ids = self._ids()
        return [ids[place] for place in self.state.masked]

    @property
    def items(self) -> dict[str, str]:
        """What those devices call their masked values."""
        ids = self._ids()
        return {ids[place]: item_id for place, item_id in self.state.items.items()}

    @property
    def culprits(self) -> list[str]:
        """Devices that so many others accuse of wrong shares that there can be no sum with them, and those that said
        that they have far too much noise."""
        loud = list(self.state.loud)
        if self._members is None:
            return loud
        ids, spare = self._ids(), len(self.state.shares) - self._members.threshold
        return loud + [ids[place] for place, accusers in sorted(self.state.accused.items()) if len(accusers) > spare]

    def due(self, device_id: str, *, now_ms: int) -> SecureRequest | None:
        """What that device is to be asked; None: nothing now."""
        state = self.state
        if state.status is not Status.RUNNING or device_id in state.out or not self._is_asked(device_id):
            return None
        if state.phase is Phase.ADVERTISE and now_ms < state.again_ms.get(device_id, 0):
            return None
        return SecureRequest(state.terms.sum_id, state.phase, self._body(device_id))

    def answered(self, device_id: str, reply: SecureReply, *, now_ms: int) -> None:
        """Take a device's part of the phase; what comes late, twice or unasked changes nothing.

        Raises:
            SumError, SignatureInvalid, WireError: it is none, and the device takes no part any more.
        """
        state = self.state
        if state.status is not Status.RUNNING or reply.phase != state.phase or reply.sum_id != state.terms.sum_id:
            return
        if device_id in state.out or not self._is_asked(device_id):
            return
        try:
            if reply.refused:
                self._refused(device_id, reply.refused)
            elif state.phase is Phase.ADVERTISE and not reply.body:
                state.again_ms[device_id] = now_ms + AGAIN_MS
            else:
                self._take(device_id, reply.body, now_ms=now_ms)
        except InvalidError as error:
            state.out[device_id] = str(error)[:300]
            raise
        finally:
            self._go_on(now_ms)

    def tick(self, now_ms: int) -> None:
        """Go on without those who have not answered, if it is time."""
        if self.state.status is Status.RUNNING:
            self._go_on(now_ms)

    def leave(self, device_id: str, reason: str, *, now_ms: int) -> None:
        """Ask that device nothing more: it may not sync any more."""
        if device_id in self.state.devices and self.state.status is Status.RUNNING:
            self.state.out.setdefault(device_id, reason)
            self._go_on(now_ms)

    def fail(self, reason: str) -> None:
        """End it."""
        self.state.status, self.state.reason = Status.FAILED, reason

    # who is asked what

    def _ids(self) -> dict[int, str]:
        if self._members is None:
            return {}
        by_key = {key: device_id for device_id, key in self.state.devices.items()}
        return {member.place: by_key[member.device_key] for member in self._members.members}

    def _place(self, device_id: str) -> int:
        place = self._roster().place_of(self.state.devices[device_id])
        assert place is not None, "only members are asked"
        return place

    def _roster(self) -> secure.Members:
        assert self._members is not None, "there is a roster after the first phase"
        return self._members

    def _asked(self) -> list[str]:
        """The devices that this phase is for."""
        state, ids = self.state, self._ids()
        among = {
            Phase.ADVERTISE: list(state.devices),
            Phase.SHARE: list(ids.values()),
            Phase.MASKED: [ids[place] for place in state.shares],
            Phase.CONFIRM: [ids[place] for place in state.survivors],
            Phase.UNMASK: [ids[place] for place in state.signatures],
        }
        return among[state.phase]

    def _has_answered(self, device_id: str) -> bool:
        state = self.state
        if state.phase is Phase.ADVERTISE:
            return device_id in state.adverts
        given = {
            Phase.SHARE: state.shares,
            Phase.MASKED: state.masked,
            Phase.CONFIRM: state.signatures,
            Phase.UNMASK: state.unmaskings,
        }
        return self._place(device_id) in given[state.phase]

    def _is_asked(self, device_id: str) -> bool:
        return device_id in self._asked() and not self._has_answered(device_id)

    def _body(self, device_id: str) -> bytes:
        """The body of the phase's request; but for a delivery the same for all."""
        state = self.state
        if state.phase is Phase.MASKED:
            return wire.encode(self._delivery(self._place(device_id)))
        if state.phase not in self._bodies:
            self._bodies = {state.phase: wire.encode(self._request())}
        return self._bodies[state.phase]

    def _request(self) -> msgspec.Struct:
        state = self.state
        if state.phase is Phase.ADVERTISE:
            return state.terms
        if state.phase is Phase.SHARE and state.roster is not None:
            return state.roster
        digest = self._roster().digest
        if state.phase is Phase.CONFIRM:
            return secure.Survivors(roster=digest, places=state.survivors)
        return secure.Confirmations(roster=digest, places=state.survivors, signatures=state.signatures)

    def _delivery(self, receiver: int) -> secure.Delivery:
        given = sorted(self.state.shares.items())
        return secure.Delivery(
            roster=self._roster().digest,
            places=[place for place, _ in given],
            sealed=[shares.sealed[receiver - 1] for _, shares in given],
            hashes=[shares.hashes[receiver - 1] for _, shares in given],
        )

    # what they answer

    def _refused(self, device_id: str, why: str) -> None:
        self.state.out[device_id] = "".join(letter if letter.isprintable() else "?" for letter in why)
        accused = secure.accused(why)
        if self.state.phase is Phase.MASKED and accused in self.state.shares:
            self.state.accused.setdefault(accused, []).append(self._place(device_id))

    def _take(self, device_id: str, body: bytes, *, now_ms: int) -> None:
        takers = {
            Phase.ADVERTISE: self._take_advert,
            Phase.SHARE: self._take_shares,
            Phase.MASKED: self._take_masked,
            Phase.CONFIRM: self._take_signature,
            Phase.UNMASK: self._take_unmasking,
        }
        takers[self.state.phase](device_id, body)
        if self.state.phase is Phase.ADVERTISE and not self.state.gathered:
            self.state.advert_ms[device_id] = now_ms
            self._gather(now_ms)

    def _gather(self, now_ms: int) -> None:
        """With enough adverts the phase nears its end. Until then days may have passed, and a device that started anew
        has forgotten its keys: who advertised long ago is asked again first."""
        state = self.state
        if len(state.adverts) < state.terms.min_members:
            return
        for device_id in [d for d in state.adverts if now_ms - state.advert_ms[d] > self._phase_ms]:
            del state.adverts[device_id]
        if len(state.adverts) >= state.terms.min_members:
            state.gathered = True
            state.deadline_ms = min(state.deadline_ms, now_ms + self._phase_ms)

    def _take_advert(self, device_id: str, body: bytes) -> None:
        advert = wire.decode(body, secure.SignedAdvert)
        if advert.device_key != self.state.devices[device_id]:
            raise SumError(f"device {device_id} signed with key {signing.key_id(advert.device_key)}, not with its own")
        secure.open_advert(advert, self.state.terms)
        self.state.adverts[device_id] = advert
        self._leave_loud()
        if device_id not in self.state.adverts:
            raise SumError(self.state.out[device_id])

    def _leave_loud(self) -> None:
        """Leave out who says that it has over `MOST_SIGMA` times the noise of the task and of half of the others. Its
        word cannot be checked, and what the sum may come to grows with it. Judged once there are enough to compare."""
        state = self.state
        if len(state.adverts) < state.terms.min_members:
            return
        sigmas = {name: secure.open_advert(advert, state.terms).sigma for name, advert in state.adverts.items()}
        usual = max(state.sigma, median_low(sigmas.values()))
        for name, sigma in sigmas.items():
            if sigma > MOST_SIGMA * usual:
                del state.adverts[name]
                state.loud.append(name)
                state.out[name] = f"its sigma {sigma:g} is over {MOST_SIGMA:g} times the usual {usual:g}"

    def _take_shares(self, device_id: str, body: bytes) -> None:
        shares, members, place = wire.decode(body, secure.Shares), self._roster(), self._place(device_id)
        sizes = [0 if member.place == place else _SEALED_BYTES for member in members.members]
        if shares.roster != members.digest or [len(sealed) for sealed in shares.sealed] != sizes:
            raise SumError(f"device {device_id} did not share its secrets among the members of this roster")
        if [len(hashes) for hashes in shares.hashes] != [_HASHES_BYTES] * len(sizes):
            raise SumError(f"device {device_id} did not tell the hashes of its shares")
        self.state.shares[place] = shares

    def _take_masked(self, device_id: str, body: bytes) -> None:
        masked = wire.decode(body, secure.Masked)
        if (masked.sum_id, masked.roster) != (self.state.terms.sum_id, self._roster().digest):
            raise SumError(f"device {device_id} masked its values for another sum or roster")
        if len(masked.values) != 4 * len(self.total):
            raise SumError(f"device {device_id} sent {len(masked.values)} bytes of values, not {4 * len(self.total)}")
        self.total = self.total + np.frombuffer(masked.values, "<u4")
        self.state.masked = sorted([*self.state.masked, self._place(device_id)])
        self.state.items[self._place(device_id)] = masked.item_id

    def _take_signature(self, device_id: str, body: bytes) -> None:
        signature, place = wire.decode(body, secure.Confirmed).signature, self._place(device_id)
        secure.check_survivors(self._roster(), self.state.survivors, signer=place, signature=signature)
        self.state.signatures[place] = signature

    def _take_unmasking(self, device_id: str, body: bytes) -> None:
        state, place = self.state, self._place(device_id)
        found = wire.decode(body, secure.Unmasking)
        gone = state.shares.keys() - set(state.survivors)
        if found.own.keys() != set(state.survivors) or found.keys.keys() != gone:
            raise SumError(f"device {device_id} gave shares of other members than was asked for")
        for sender in state.shares:
            kept = state.shares[sender].hashes[place - 1]
            given = found.own.get(sender, b""), found.keys.get(sender, b"")
            hashes = secure.share_hashes(self._roster(), *given, sender=sender, receiver=place)
            half = slice(0, 32) if sender in found.own else slice(32, 64)
            if hashes[half] != kept[half]:
                state.out[device_id] = f"its share of member {sender} is not the one that it was given"
                return
        state.unmaskings[place] = found

    # going on

    def _go_on(self, now_ms: int) -> None:
        """Into the next phase, once everybody has answered, or enough have and it is time."""
        state = self.state
        open_ = [d for d in self._asked() if d not in state.out and not self._has_answered(d)]
        given = [d for d in self._asked() if self._has_answered(d)]
        need = self._needed()
        if len(given) + len(open_) < need:
            self._too_few(given, need=need)
        elif state.phase is Phase.UNMASK and len(given) >= need:
            self._unmask()
        elif open_ and now_ms < state.deadline_ms:
            return
        elif len(given) < need:
            self._too_few(given, need=need)
        else:
            self._next(now_ms)

    def _needed(self) -> int:
        """How many must answer this phase."""
        if self.state.phase is Phase.ADVERTISE:
            return self.state.terms.min_members
        if self.state.phase in (Phase.CONFIRM, Phase.UNMASK):
            return self._roster().threshold
        return max(self._roster().threshold, self.state.terms.min_members)

    def _next(self, now_ms: int) -> None:
        state = self.state
        if state.phase is Phase.ADVERTISE:
            adverts = sorted(state.adverts.values(), key=lambda advert: advert.device_key)
            state.roster = secure.Roster(terms=state.terms.digest, adverts=adverts)
            try:
                self._members = secure.check_roster(state.roster, state.terms)
            except SumError as error:
                self.fail(str(error))
                return
        elif state.phase is Phase.MASKED:
            state.survivors = list(state.masked)
        state.phase = list(Phase)[list(Phase).index(state.phase) + 1]
        state.deadline_ms = now_ms + self._phase_ms

    def _unmask(self) -> None:
        state = self.state
        try:
            self.result = unmask(
                self.total,
                self._roster(),
                state.terms,
                sharing=sorted(state.shares),
                survivors=state.survivors,
                unmaskings=state.unmaskings,
            )
        except SumError as error:
            self.fail(self._named(str(error)))
            return
        state.status = Status.DONE

    def _too_few(self, given: list[str], *, need: int) -> None:
        state = self.state
        asked = self._asked()
        silent = [d for d in asked if d not in given and d not in state.out]
        said = [f"device {d}: {state.out[d]}" for d in asked if d in state.out][:_NAMED]
        told = [f"silent: {', '.join(silent[:_NAMED])}{' and others' * (len(silent) > _NAMED)}"] if silent else []
        words = "; ".join(told + said) or "no more were asked"
        self.fail(
            f"phase {state.phase}: {len(given)} of {len(asked)} devices answered, {need} must; {self._named(words)}"
        )

    def _named(self, words: str) -> str:
        """The same with the ids of the members that it names by their places."""
        ids = self._ids()
        for place in sorted(ids, reverse=True):
            words = words.replace(f"member {place}'s", f"device {ids[place]}'s").replace(
                f"member {place} ", f"device {ids[place]} "
            )
        return words[:1000]

"""This device's part in secure sums: what the server gets of its noised delta is one masked vector, and shares that
unmask nothing but the sum of all.

The server is not trusted: what it says is checked against what was signed, and what breaks a rule ends this device's
part. Secrets are in memory alone: an edge that starts anew has dropped out, which the others survive. Knows no outbox;
rules and messages: docs/formats/secure.md.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import numpy as np

from clawloop_shared import masking, secure, signing, wire
from clawloop_shared.deltas import LoraDelta
from clawloop_shared.errors import ClawloopError, InvalidError, SumError, WireError
from clawloop_shared.fixed_point import to_ring
from clawloop_shared.flat import flatten
from clawloop_shared.messages import SecureReply, SecureRequest
from clawloop_shared.secure import Phase
from clawloop_shared.shamir import SHARE_BYTES, split

_log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)


UNKNOWN = "this device knows nothing of that sum; it was started anew since, or never asked"
NOT_OURS = "not a sum for what was learned here"
NOTHING = "nothing that was learned here leaves in that sum"
MEMBERS = "its members are too few, or too many of them new"
ONCE = "asked out of turn, or asked before, otherwise; each phase is answered once"
OVER = "that phase is over"
BROKEN = "what was asked breaks a rule"
HERE = "this device cannot, for a reason of its own"
"""all that a server is told of why not, but for whose shares were wrong; more is in this device's own log"""
_WRONG = "sealed shares do not open"


class _Refusal(SumError):
    """Why not: as the server is told, and as the log is."""

    def __init__(self, said: str, why: str = "") -> None:
        super().__init__(why or said)
        self.said = said


class _Done(_Refusal):
    """It was answered, and the answer is not here any more: a late copy of a question, which changes nothing."""


_MAX_SUMS = 4
"""that are remembered: a server that begins more drops the oldest itself"""


class Summand(msgspec.Struct, frozen=True, kw_only=True):
    """A clipped and noised delta that its owner lets go into a secure sum, and the outbox item that it is."""

    item_id: str
    delta: LoraDelta


class Summands(Protocol):
    """Where deltas wait for their sums."""

    def summand(self, task_id: str) -> Summand | None:
        """What was learned for that task, if it may leave now; None: not yet.

        Raises:
            ClawloopError: nothing of that task will leave this way.
        """
        ...

    def leaving(self, item_id: str, body: bytes) -> None:
        """Note, on disk, that these bytes are about to leave in place of the delta, which leaves no other way.

        Raises:
            ClawloopError: it may not leave (any more), or has left already.
        """
        ...

    def arrived(self, item_id: str) -> None:
        """The server says that it has them."""
        ...


class KnownMembers(Protocol):
    """The devices that were in sums with this one."""

    def known(self) -> set[bytes]:
        """Their public keys."""
        ...

    def keep(self, keys: set[bytes]) -> None:
        """Remember these too. Waits for the disk."""
        ...


class SumRules(msgspec.Struct, frozen=True, kw_only=True):
    """What this device asks of a sum: so many members, and at most that part of them never seen before (unless none
    was: the first sum is trusted)."""

    min_members: int = 5
    max_new: float = 0.5


class SumMember:
    """The `SumMember` of the node's handlers; safe to use from any thread."""

    def __init__(
        self, summands: Summands, known: KnownMembers, *, device_key: Callable[[], bytes], rules: SumRules
    ) -> None:
        """`device_key`: the private key that this device is enrolled with now."""
        self._summands, self._known = summands, known
        self._device_key, self._rules = device_key, rules
        self._lock = threading.Lock()
        self._parts: OrderedDict[str, _Part | str] = OrderedDict()

    def asked(self, request: SecureRequest) -> SecureReply:
        """This device's part of one phase; without a body and a refusal: ask again later.

        Asked the same again, the answer is the same; asked otherwise, this device takes no further part in that sum.
        """
        with self._lock:
            try:
                body, item_id = self._answer(request)
            except ClawloopError as error:
                _log.warning("secure sum %.64s, %.20s: refused: %s", request.sum_id, request.phase, error)
                if not isinstance(error, _Done):
                    self._remember(request.sum_id, _said(error))
                return SecureReply(request.sum_id, request.phase, refused=_said(error))
        return SecureReply(request.sum_id, request.phase, body, item_id=item_id)

    def drop_values(self) -> None:
        """Take no further part in sums to which nothing was given yet: what was learned may be of what was forgotten.
        It stays in the outbox, if it is there still, for another sum."""
        with self._lock:
            for sum_id, part in self._parts.items():
                if isinstance(part, _Part) and part.holds_values:
                    self._parts[sum_id] = NOTHING

    def _answer(self, request: SecureRequest) -> tuple[bytes, str]:
        """The body, and the item that it is."""
        part = self._parts.get(request.sum_id)
        if isinstance(part, str):
            raise _Refusal(part)
        if part is None:
            part = self._begin(request)
            if part is None:
                return b"", ""
            self._remember(request.sum_id, part)
        return part.answer(request), part.item_id if request.phase == Phase.MASKED else ""

    def _remember(self, sum_id: str, part: _Part | str) -> None:
        """Keep a part, or the reason why there is none; it may not begin anew."""
        self._parts[sum_id] = part
        while len(self._parts) > _MAX_SUMS:
            self._parts.popitem(last=False)

    def _begin(self, request: SecureRequest) -> _Part | None:
        if request.phase != Phase.ADVERTISE:
            raise _Refusal(UNKNOWN)
        terms = _read(request.body, secure.Terms)
        if terms.sum_id != request.sum_id or terms.min_members < self._rules.min_members:
            raise _Refusal(
                MEMBERS,
                f"the terms are of sum {terms.sum_id} with at least {terms.min_members} members; this device asks for"
                f" {self._rules.min_members} ([learn] secure_min_members)",
            )
        try:
            summand = self._summands.summand(terms.task_id)
        except ClawloopError as error:
            raise _Refusal(NOTHING, str(error)) from error
        if summand is None:
            return None
        unfit = secure.terms_fit(terms, summand.delta)
        if unfit:
            raise _Refusal(NOT_OURS, f"{NOT_OURS}: {unfit}")
        return _Part(self, terms, summand)

    # What a part asks of its device

    @property
    def device_key(self) -> bytes:
        """The private key that this device signs with."""
        return self._device_key()

    def least(self, members: secure.Members) -> int:
        """How many members must be left at any moment."""
        return max(members.threshold, self._rules.min_members)

    def new_among(self, members: secure.Members, *, own: bytes) -> set[bytes]:
        """The other devices of a roster that were never in a sum with this one. Raises SumError: they are too many."""
        others = {member.device_key for member in members.members} - {own}
        known = self._known.known()
        new = others - known
        if known and len(new) > self._rules.max_new * len(others):
            raise _Refusal(
                MEMBERS,
                f"{len(new)} of {len(others)} other members were never in a sum with this device; at most"
                f" {self._rules.max_new:.0%} may be new ([learn] secure_new_members)",
            )
        return new

    @property
    def known(self) -> KnownMembers:
        """Those that were."""
        return self._known

    @property
    def summands(self) -> Summands:
        """Where what is summed comes from."""
        return self._summands


class _Part:
    """One sum: the secrets that this device made for it, and what it has answered."""

    def __init__(self, device: SumMember, terms: secure.Terms, summand: Summand) -> None:
        self._device, self._terms, self.item_id = device, terms, summand.item_id
        self._sigma, self._trajectories = summand.delta.sigma, summand.delta.trajectories
        self._values = flatten(summand.delta.weights)
        if len(self._values) != terms.values:
            raise _Refusal(NOT_OURS, f"the sum is of {terms.values} values, what was learned has {len(self._values)}")
        self._key = device.device_key
        self._mask_key, self._share_key, self._seed = (masking.new_secret() for _ in range(3))
        self._advert: secure.SignedAdvert | None = None
        self._members: secure.Members | None = None
        self._place = 0
        self._held: dict[int, tuple[bytes, bytes]] = {}
        """by place: shares of that member's own mask and of its mask key"""
        self._sharing: list[int] = []
        self._new = set[bytes]()
        self._survivors: list[int] = []
        self._answered: dict[Phase, tuple[bytes, bytes]] = {}

    @property
    def holds_values(self) -> bool:
        """Whether what was learned is in memory here, not masked yet."""
        return len(self._values) > 0

    def answer(self, request: SecureRequest) -> bytes:
        """The answer to a phase, each once. Raises ClawloopError."""
        if request.phase not in set(Phase):
            raise SumError(f"unknown phase {request.phase!r:.40}")
        phase, asked = Phase(request.phase), hashlib.sha256(request.body).digest()
        if phase in self._answered:
            known, body = self._answered[phase]
            if known != asked:
                raise _Refusal(ONCE, f"phase {phase} was asked before, otherwise; each is answered once")
            if not body:
                raise _Done(OVER, f"phase {phase} is over")
            return body
        if len(self._answered) != list(Phase).index(phase):
            answered = f"{len(self._answered)} of {len(Phase)} were answered"
            raise _Refusal(ONCE, f"phase {phase} is out of turn: {answered}")
        steps = {
            Phase.ADVERTISE: self._advertise,
            Phase.SHARE: self._share,
            Phase.MASKED: self._mask,
            Phase.CONFIRM: self._confirm,
            Phase.UNMASK: self._unmask,
        }
        body = steps[phase](request.body)
        self._answered[phase] = asked, body
        return body

    def _advertise(self, body: bytes) -> bytes:
        advert = secure.Advert(
            terms=self._terms.digest,
            mask_key=masking.public_of(self._mask_key),
            share_key=masking.public_of(self._share_key),
            commitment=secure.commitment_of(self._seed, self._terms),
            sigma=self._sigma,
        )
        self._advert = secure.sign_advert(advert, self._key)
        return wire.encode(self._advert)

    def _share(self, body: bytes) -> bytes:
        roster = _read(body, secure.Roster)
        members = secure.check_roster(roster, self._terms)
        place = members.place_of(signing.public_key(self._key))
        if place is None or roster.adverts[place - 1] != self._advert:
            raise SumError("the roster does not have what this device signed")
        if len(members.members) < self._device.least(members):
            raise _Refusal(MEMBERS, f"the roster has {len(members.members)} members, too few for this device")
        self._new = self._device.new_among(members, own=signing.public_key(self._key))
        self._members, self._place = members, place
        return wire.encode(self._shares(members))

    def _shares(self, members: secure.Members) -> secure.Shares:
        many = {"threshold": members.threshold, "shares": len(members.members)}
        sealed, hashes = [], []
        for other, own, key in zip(
            members.members, split(self._seed, **many), split(self._mask_key, **many), strict=True
        ):
            pair = {"sender": self._place, "receiver": other.place}
            hashes.append(secure.share_hashes(members, own, key, **pair))
            if other.place == self._place:
                self._held[other.place] = own, key
                sealed.append(b"")
                continue
            under = secure.sealing_key(self._share_key, members, mine=self._place, **pair)
            sealed.append(masking.seal(under, own + key, bound_to=secure.sealed_to(members, hashes[-1], **pair)))
        return secure.Shares(roster=members.digest, sealed=sealed, hashes=hashes)

    def _mask(self, body: bytes) -> bytes:
        delivery, members = _read(body, secure.Delivery), self._roster()
        self._check(delivery.roster, delivery.places, among=[member.place for member in members.members])
        if not len(delivery.places) == len(delivery.sealed) == len(delivery.hashes):
            raise SumError("the delivery has not one pair of shares for each member")
        for sender, sealed, hashes in zip(delivery.places, delivery.sealed, delivery.hashes, strict=True):
            if sender != self._place:
                self._held[sender] = self._opened(sealed, hashes, sender=sender)
        self._sharing = delivery.places
        masked = secure.Masked(
            sum_id=members.sum_id,
            item_id=self.item_id,
            roster=members.digest,
            values=self._masked(members),
        )
        out = wire.encode(masked)
        try:
            self._device.summands.leaving(self.item_id, out)
        except ClawloopError as error:
            raise _Refusal(NOTHING, str(error)) from error
        self._values = np.zeros(0, np.float32)
        return out

    def _opened(self, sealed: bytes, hashes: bytes, *, sender: int) -> tuple[bytes, bytes]:
        members, pair = self._roster(), {"sender": sender, "receiver": self._place}
        under = secure.sealing_key(self._share_key, members, mine=self._place, **pair)
        try:
            plain = masking.unseal(under, sealed, bound_to=secure.sealed_to(members, hashes, **pair))
            own, key = plain[:SHARE_BYTES], plain[SHARE_BYTES:]
            if len(plain) != 2 * SHARE_BYTES or secure.share_hashes(members, own, key, **pair) != hashes:
                raise SumError("they are not what their sender says of them")
        except SumError as error:
            raise _Refusal(secure.accusation(sender, _WRONG), secure.accusation(sender, str(error))) from error
        return own, key

    def _masked(self, members: secure.Members) -> bytes:
        ring = to_ring(self._values, members.bound, members=len(members.members))
        ring = np.append(ring, np.uint32(self._trajectories))
        others = {
            place: secure.pair_key(self._mask_key, members, mine=self._place, other=place)
            for place in self._sharing
            if place != self._place
        }
        plus = [key for place, key in others.items() if place > self._place]
        minus = [key for place, key in others.items() if place < self._place]
        masked = masking.add_masks(ring, plus=[*plus, secure.own_key(self._seed, members)], minus=minus)
        return masked.astype("<u4", copy=False).tobytes()

    def _confirm(self, body: bytes) -> bytes:
        survivors = _read(body, secure.Survivors)
        self._check(survivors.roster, survivors.places, among=self._sharing)
        self._survivors = survivors.places
        # Not before: what comes to nothing makes nobody known, nor does a sum make known who fell out of it.
        members = [member for member in self._roster().members if member.place in survivors.places]
        self._device.known.keep(self._new & {member.device_key for member in members})
        asked, _ = self._answered[Phase.MASKED]
        self._answered[Phase.MASKED] = asked, b""  # the server has it, or it could not say that it came
        self._device.summands.arrived(self.item_id)
        return wire.encode(
            secure.Confirmed(signature=secure.sign_survivors(self._roster(), self._survivors, self._key))
        )

    def _unmask(self, body: bytes) -> bytes:
        said, members = _read(body, secure.Confirmations), self._roster()
        self._check(said.roster, said.places, among=self._sharing)
        if said.places != self._survivors:
            raise SumError("other survivors than this device signed")
        if not set(said.signatures) <= set(self._survivors) or len(said.signatures) < members.threshold:
            raise SumError(f"{len(said.signatures)} members signed the survivors; {members.threshold} of them must")
        for signer, signature in said.signatures.items():
            secure.check_survivors(members, self._survivors, signer=signer, signature=signature)
        gone = set(self._sharing) - set(self._survivors)
        out = secure.Unmasking(
            own={place: self._held[place][0] for place in self._survivors},
            keys={place: self._held[place][1] for place in sorted(gone)},
        )
        self._held, self._mask_key, self._share_key, self._seed = {}, b"", b"", b""
        return wire.encode(out)

    def _check(self, roster: bytes, places: list[int], *, among: list[int]) -> None:
        members = self._roster()
        if roster != members.digest:
            raise SumError("a phase of another roster than the one that this device checked")
        secure.check_places(places, members, least=self._device.least(members))
        if self._place not in places or not set(places) <= set(among):
            raise SumError(f"members {places} are not among {among}, or this device is not among them")

    def _roster(self) -> secure.Members:
        assert self._members is not None, "phases are answered in their order"
        return self._members


def _said(error: ClawloopError) -> str:
    """What the server is told: one of a few phrases, which name nothing of this device."""
    if isinstance(error, _Refusal):
        return error.said
    return BROKEN if isinstance(error, InvalidError) else HERE


def _read(body: bytes, kind: type[T]) -> T:
    """Raises WireError."""
    try:
        return wire.decode(body, kind)
    except RecursionError as error:
        raise WireError("a body nested too deeply") from error

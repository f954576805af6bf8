"""A secure sum as its server and its members say it to each other: bodies, what is signed, and the rules of a roster.

Both sides compute the same hashes from the same values. Who may know what, and what each field is for:
docs/formats/secure.md. Protocol: Bonawitz et al. 2017, figure 4, in the form for a server that may lie.
"""

import hashlib
import math
import re
from enum import StrEnum
from itertools import pairwise
from typing import Annotated

import msgspec
from msgspec import Meta

from clawloop_shared import masking, signing
from clawloop_shared.deltas import LoraDelta, Method
from clawloop_shared.errors import SumError
from clawloop_shared.levels import Level
from clawloop_shared.lora import LINEARS, MAX_RANK

ADVERT_DOMAIN = "secure-advert.v1"
SURVIVORS_DOMAIN = "secure-survivors.v1"
MASKED_KIND = "masked.v1"
"""of an outbox item whose body is a `Masked`, byte for byte as it is sent"""
MAX_MEMBERS = 128
"""of one sum: everybody agrees with everybody; more devices make several sums"""
MAX_VALUES = (63 << 20) // 4 - 1
"""in one sum: a masked vector is one message"""
MAX_SIGMA = 1000.0
SIGMAS = 8
"""a normal number is further from 0 once in 8e14"""

_ACCUSED = re.compile(r"member ([1-9][0-9]{0,2})'s shares: ")

_Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
_Place = Annotated[int, Meta(ge=1, le=MAX_MEMBERS)]
_Places = Annotated[list[_Place], Meta(min_length=1, max_length=MAX_MEMBERS)]
_SumId = Annotated[str, Meta(pattern=r"\A[0-9A-Za-z-]{1,64}\Z")]
_Bytes = Annotated[bytes, Meta(max_length=256)]
_PerMember = Annotated[list[_Bytes], Meta(max_length=MAX_MEMBERS)]


class Phase(StrEnum):
    """Where a sum stands, in this order."""

    ADVERTISE = "advertise"
    """each member shows fresh keys, signed"""
    SHARE = "share"
    """each gets the roster, and shares its secrets among the members"""
    MASKED = "masked"
    """each gets the shares that are for it, and sends its masked values"""
    CONFIRM = "confirm"
    """each signs whose values came"""
    UNMASK = "unmask"
    """each gets those signatures, and gives the shares that unmask the sum"""


class Terms(msgspec.Struct, frozen=True, kw_only=True, tag="secure-terms.v1"):
    """What is summed: `values` numbers, those that the task's method sends, each member's clipped to `clip` and noised;
    body of the request `advertise`. At least `min_members` members are in the sum that comes out."""

    sum_id: _SumId
    task_id: Annotated[str, Meta(min_length=1, max_length=128)]
    line_id: Annotated[str, Meta(min_length=1, max_length=128)]
    base_version: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
    weights_sha256: Annotated[str, Meta(max_length=64)] = ""
    method: Method
    rank: Annotated[int, Meta(ge=1, le=MAX_RANK)]
    alpha: Annotated[float, Meta(gt=0, le=4096)]
    target_modules: Annotated[tuple[str, ...], Meta(min_length=1, max_length=len(LINEARS))]
    values: Annotated[int, Meta(ge=1, le=MAX_VALUES)]
    clip: Annotated[float, Meta(gt=0, le=1e6)]
    min_members: Annotated[int, Meta(ge=3, le=MAX_MEMBERS)]

    @property
    def digest(self) -> bytes:
        """What signatures and the roster name these terms by."""
        return _digest(b"clawloop secure terms v1", msgspec.msgpack.encode(self))


class Advert(msgspec.Struct, frozen=True, kw_only=True):
    """A member's keys for one sum. `commitment` is the hash of the seed of its own mask; `sigma` the noise in its
    values, in units of the clip."""

    terms: _Hash
    mask_key: _Key
    share_key: _Key
    commitment: _Hash
    sigma: Annotated[float, Meta(ge=0, le=MAX_SIGMA)]


class SignedAdvert(msgspec.Struct, frozen=True, kw_only=True, tag="secure-advert.v1"):
    """An `Advert` (msgpack) as the device signed it; body of the reply to `advertise`."""

    device_key: _Key
    payload: Annotated[bytes, Meta(max_length=1024)]
    signature: _Signature


class Roster(msgspec.Struct, frozen=True, kw_only=True, tag="secure-roster.v1"):
    """Everybody's advert, by device key; body of the request `share`. A member's place is 1 for the first."""

    terms: _Hash
    adverts: Annotated[list[SignedAdvert], Meta(min_length=1, max_length=MAX_MEMBERS)]


class Shares(msgspec.Struct, frozen=True, kw_only=True, tag="secure-shares.v1"):
    """Of one member for each, by place: two shares, sealed for it alone (empty: its own), and their two hashes; body of
    the reply to `share`."""

    roster: _Hash
    sealed: _PerMember
    hashes: _PerMember


class Delivery(msgspec.Struct, frozen=True, kw_only=True, tag="secure-delivery.v1"):
    """The members that shared, and what each sealed for the one that gets this; body of the request `masked`."""

    roster: _Hash
    places: _Places
    sealed: _PerMember
    hashes: _PerMember


class Masked(msgspec.Struct, frozen=True, kw_only=True, tag=MASKED_KIND):
    """A member's masked values (little-endian, 32 bits each), one more than the terms say: the last is how many
    trajectories they were learned from. Body of the reply to `masked`, and of the outbox item that shows it: `item_id`
    is the name by which its device can have the sum deleted."""

    sum_id: str
    item_id: Annotated[str, Meta(min_length=1, max_length=128)]
    roster: _Hash
    values: bytes


class Survivors(msgspec.Struct, frozen=True, kw_only=True, tag="secure-survivors.v1"):
    """Whose masked values came; body of the request `confirm`."""

    roster: _Hash
    places: _Places


class Confirmed(msgspec.Struct, frozen=True, kw_only=True, tag="secure-confirmed.v1"):
    """A member's signature of these survivors; body of the reply to `confirm`."""

    signature: _Signature


class Confirmations(msgspec.Struct, frozen=True, kw_only=True, tag="secure-confirmations.v1"):
    """Who signed the same survivors, by place; body of the request `unmask`."""

    roster: _Hash
    places: _Places
    signatures: Annotated[dict[_Place, _Signature], Meta(max_length=MAX_MEMBERS)]


class Unmasking(msgspec.Struct, frozen=True, kw_only=True, tag="secure-unmasking.v1"):
    """Shares that one member holds, by the place of whom they are of: `own` of the own masks of those whose values
    came, `keys` of the mask keys of those that shared and then fell silent. Body of the reply to `unmask`."""

    own: Annotated[dict[_Place, _Bytes], Meta(max_length=MAX_MEMBERS)]
    keys: Annotated[dict[_Place, _Bytes], Meta(max_length=MAX_MEMBERS)]


class Member(msgspec.Struct, frozen=True):
    """A member of a checked roster."""

    place: int
    device_key: bytes
    advert: Advert


class Members(msgspec.Struct, frozen=True, kw_only=True):
    """A roster whose every signature was checked. Secrets are shared so that `threshold` members give them back."""

    sum_id: str
    digest: bytes
    members: tuple[Member, ...]
    bound: float

    @property
    def threshold(self) -> int:
        """Two thirds of the members, rounded up: a third may fall silent."""
        return threshold(len(self.members))

    def at(self, place: int) -> Member:
        """The member of a place. Raises SumError: there is none."""
        if not 1 <= place <= len(self.members):
            raise SumError(f"there is no member {place} among {len(self.members)}")
        return self.members[place - 1]

    def place_of(self, device_key: bytes) -> int | None:
        """The place of a device."""
        return next((member.place for member in self.members if member.device_key == device_key), None)


def threshold(members: int) -> int:
    """How many members must stay to the end."""
    return max(2, math.ceil(2 * members / 3))


def bound_of(clip: float, sigmas: list[float]) -> float:
    """What no value of a member is beyond, but for noise that is cut: the clip and `SIGMAS` deviations of the noise."""
    return clip * (1.0 + SIGMAS * max(sigmas))


def terms_fit(terms: Terms, delta: LoraDelta) -> str:
    """Why these are not the terms of what was learned; empty if they are."""
    for name in ("task_id", "line_id", "base_version", "weights_sha256", "method", "rank", "alpha", "target_modules"):
        learned, summed = getattr(delta, name), getattr(terms, name)
        if learned != summed:
            return f"{name} is {learned!r:.60} in what was learned, and {summed!r:.60} in the sum"
    if not terms.method.is_linear or delta.level is not Level.PRIVATE_DELTAS:
        return f"what was learned by {delta.method} at level {delta.level} is not for a secure sum"
    if delta.clip > terms.clip or not 0 < delta.sigma <= MAX_SIGMA:
        return f"clip {delta.clip} and sigma {delta.sigma} of what was learned do not fit the sum's clip {terms.clip}"
    return ""


def sign_advert(advert: Advert, device_key: bytes) -> SignedAdvert:
    """An advert with its device's signature."""
    payload = msgspec.msgpack.encode(advert)
    return SignedAdvert(
        device_key=signing.public_key(device_key),
        payload=payload,
        signature=signing.sign(device_key, ADVERT_DOMAIN, payload=payload),
    )


def open_advert(signed: SignedAdvert, terms: Terms) -> Advert:
    """What a device signed for these terms.

    Raises:
        SignatureInvalid: it did not sign that.
        SumError: it is for other terms, or is no advert.
    """
    signing.verify(signed.device_key, ADVERT_DOMAIN, payload=signed.payload, signature=signed.signature)
    try:
        advert = msgspec.msgpack.decode(signed.payload, type=Advert)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SumError(f"the advert of device key {signing.key_id(signed.device_key)}: {error}") from error
    if advert.terms != terms.digest:
        raise SumError(f"device key {signing.key_id(signed.device_key)} signed for another sum or other terms")
    return advert


def check_roster(roster: Roster, terms: Terms) -> Members:
    """The members of a roster: each signed for these terms, no device or key occurs twice, and there are enough.

    Raises:
        SignatureInvalid: a device did not sign what the roster says.
        SumError: another rule is broken; the message names it.
    """
    if roster.terms != terms.digest:
        raise SumError("the roster is of another sum, or of other terms than were told before")
    keys = [advert.device_key for advert in roster.adverts]
    if any(one >= other for one, other in pairwise(keys)):
        raise SumError("the roster is not in the order of its device keys, or has one twice")
    if len(keys) < terms.min_members:
        raise SumError(f"the roster has {len(keys)} members; this sum needs {terms.min_members}")
    adverts = [open_advert(signed, terms) for signed in roster.adverts]
    fresh = {key for advert in adverts for key in (advert.mask_key, advert.share_key)}
    if len(fresh) != 2 * len(adverts):
        raise SumError("two members of the roster have one key")
    return Members(
        sum_id=terms.sum_id,
        digest=_digest(b"clawloop secure roster v1", msgspec.msgpack.encode(roster)),
        members=tuple(Member(i + 1, *pair) for i, pair in enumerate(zip(keys, adverts, strict=True))),
        bound=bound_of(terms.clip, [advert.sigma for advert in adverts]),
    )


def commitment_of(seed: bytes, terms: Terms) -> bytes:
    """What a member's advert says of the seed of its own mask."""
    return _digest(b"clawloop secure own mask v1", terms.digest, seed)


def share_hashes(members: Members, own: bytes, key: bytes, *, sender: int, receiver: int) -> bytes:
    """What everybody may know of the two shares of one member for another: 64 bytes that tell nothing of them."""
    pair = bytes((sender, receiver))
    return b"".join(
        _digest(b"clawloop secure share v1", members.digest, pair, kind, share)
        for kind, share in ((b"own", own), (b"key", key))
    )


def pair_key(private: bytes, members: Members, *, mine: int, other: int) -> bytes:
    """The key of the mask that two members share; whoever knows the mask key of one can compute it."""
    first, second = (members.at(place).advert.mask_key for place in sorted((mine, other)))
    agreed = masking.agree(private, members.at(other).advert.mask_key)
    return _derive(agreed, members, "mask of a pair", first, second)


def sealing_key(private: bytes, members: Members, *, mine: int, sender: int, receiver: int) -> bytes:
    """The key that a sender's shares for a receiver are sealed under; both can compute it."""
    other = receiver if mine == sender else sender
    agreed = masking.agree(private, members.at(other).advert.share_key)
    parties = [members.at(place).advert.share_key for place in (sender, receiver)]
    return _derive(agreed, members, "shares for a member", *parties)


def own_key(seed: bytes, members: Members) -> bytes:
    """The key of a member's own mask."""
    return _derive(seed, members, "own mask")


def accusation(place: int, why: str) -> str:
    """The words of a refusal that names the member whose shares are wrong; `accused` reads them."""
    return f"member {place}'s shares: {why}"


def accused(refusal: str) -> int | None:
    """Whom a refusal names."""
    found = _ACCUSED.match(refusal)
    return int(found[1]) if found else None


def sealed_to(members: Members, hashes: bytes, *, sender: int, receiver: int) -> bytes:
    """What sealed shares are bound to."""
    return b"clawloop secure shares v1" + members.digest + bytes((sender, receiver)) + hashes


def check_places(places: list[int], members: Members, *, least: int) -> None:
    """Return if these are places of this roster in their order, at least so many. Raises SumError."""
    if any(one >= other for one, other in pairwise(places)) or places[-1] > len(members.members):
        raise SumError(f"places {places} are not of a roster of {len(members.members)}, in their order")
    if len(places) < least:
        raise SumError(f"only {len(places)} of {len(members.members)} members are left; this sum needs {least}")


def sign_survivors(members: Members, places: list[int], device_key: bytes) -> bytes:
    """A member's word on whose values came."""
    return signing.sign(device_key, SURVIVORS_DOMAIN, payload=_survivors(members, places))


def check_survivors(members: Members, places: list[int], *, signer: int, signature: bytes) -> None:
    """Return if that member signed these survivors. Raises SignatureInvalid, SumError."""
    key = members.at(signer).device_key
    signing.verify(key, SURVIVORS_DOMAIN, payload=_survivors(members, places), signature=signature)


def _survivors(members: Members, places: list[int]) -> bytes:
    return members.digest + bytes(places)


def _derive(secret: bytes, members: Members, purpose: str, *parties: bytes) -> bytes:
    purpose = f"clawloop secure sum v1: {purpose}"
    return masking.derive(secret, purpose=purpose, sum_id=members.sum_id, roster=members.digest, parties=parties)


def _digest(domain: bytes, *parts: bytes) -> bytes:
    """SHA-256 over parts with their lengths before them."""
    found = hashlib.sha256()
    for part in (domain, *parts):
        found.update(len(part).to_bytes(8, "big") + part)
    return found.digest()

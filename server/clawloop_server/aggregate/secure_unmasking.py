"""The last step of a secure sum: putting secrets together, and taking masks off the total. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median_low

import msgspec
import numpy as np
from numpy.typing import NDArray

from clawloop_shared import masking, secure
from clawloop_shared.deltas import MAX_TRAJECTORIES
from clawloop_shared.errors import SumError
from clawloop_shared.fixed_point import Ring, error_of, from_ring
from clawloop_shared.shamir import Combiner

_TAIL = 6.0
"""the norm of d normal numbers is above sqrt(d) + 6 once in 6e7"""


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """A sum: `values` (float64) of `count` members, learned from `trajectories`. `sigma`: standard deviation of the
    noise in the sum, in units of the clip, as the members say; `usual_sigma`: the same if none has more than the median
    of the roster."""

    values: NDArray[np.float64]
    count: int
    trajectories: int
    sigma: float
    usual_sigma: float


def unmask(
    total: Ring,
    members: secure.Members,
    terms: secure.Terms,
    *,
    sharing: Sequence[int],
    survivors: Sequence[int],
    unmaskings: Mapping[int, secure.Unmasking],
) -> Total:
    """The sum of the survivors' values. `total`: of their masked values; `sharing`: the members that they agreed on
    masks with; `unmaskings`: what at least the threshold of members gave, each share as it was once sent.

    Raises:
        SumError: a member's secret is not what it signed (the message names its place), or the sum cannot be one of
            values within the clip.
    """
    holders = sorted(unmaskings)[: members.threshold]
    combiner = Combiner(holders)
    plus: list[bytes] = []
    minus: list[bytes] = []
    for place in survivors:
        seed = _secret(combiner, {holder: unmaskings[holder].own[place] for holder in holders}, place=place)
        if secure.commitment_of(seed, terms) != members.at(place).advert.commitment:
            raise SumError(f"member {place} shared another secret than the one that it had signed for")
        minus.append(secure.own_key(seed, members))
    for place in sorted(set(sharing) - set(survivors)):
        private = _secret(combiner, {holder: unmaskings[holder].keys[place] for holder in holders}, place=place)
        if masking.public_of(private) != members.at(place).advert.mask_key:
            raise SumError(f"member {place} shared another key than the one that it had signed for")
        for other in survivors:
            key = secure.pair_key(private, members, mine=place, other=other)
            (minus if place > other else plus).append(key)
    return _checked(masking.add_masks(total, plus=plus, minus=minus), members, terms, survivors=survivors)


def _secret(combiner: Combiner, shares: Mapping[int, bytes], *, place: int) -> bytes:
    try:
        return combiner.combine(shares)
    except SumError as error:
        raise SumError(f"member {place} shared no secret: {error}") from error


def _checked(ring: Ring, members: secure.Members, terms: secure.Terms, *, survivors: Sequence[int]) -> Total:
    count, all_members = len(survivors), len(members.members)
    values = from_ring(ring[:-1], members.bound, members=all_members)
    trajectories = int(ring[-1])
    if not count <= trajectories <= count * MAX_TRAJECTORIES:
        raise SumError(f"{count} members cannot have learned from {trajectories} trajectories: one sent something else")
    sigmas = [members.at(place).advert.sigma for place in survivors]
    usual = median_low(member.advert.sigma for member in members.members)
    sigma = math.hypot(*sigmas)
    rounding = error_of(count, members.bound, members=all_members) * math.sqrt(len(values))
    most = terms.clip * (count + sigma * (math.sqrt(len(values)) + _TAIL)) + rounding
    norm = float(np.linalg.norm(values))
    if norm > most:
        raise SumError(
            f"the sum has norm {norm:.4g}; {count} members within the clip {terms.clip:g} and their noise make at most"
            f" {most:.4g}: one sent something else"
        )
    usual_sigma = math.hypot(*(min(each, usual) for each in sigmas))
    return Total(values=values, count=count, trajectories=trajectories, sigma=sigma, usual_sigma=usual_sigma)

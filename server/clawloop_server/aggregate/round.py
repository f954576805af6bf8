"""One joined update of what several devices, and the server, learned: who counts, how much, and what came of it.

Pure: no file, no clock, no vault. Looks at one layer after the other, twice, so that updates may be mappings that
read a layer when it is asked for. How it is done, and why: docs/federation.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from clawloop_server.aggregate.account import Account, Share
from clawloop_server.aggregate.gram import layer_inner_products
from clawloop_server.aggregate.layer import JoinedLayer, joined_layer, relative
from clawloop_server.aggregate.methods import FEDAVG, SVD
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.updates import OWN, Contribution, Factors, Update
from clawloop_server.aggregate.weighing import weigh
from clawloop_server.errors import TrainerError

__all__ = ["Account", "JoinRefused", "Joined", "Share", "join"]


class JoinRefused(TrainerError):
    """No contribution counts, or what came of them is no adapter; `account` says of each why."""

    def __init__(self, why: str, account: Account) -> None:
        super().__init__(why)
        self.account = account


@dataclass(frozen=True)
class Joined:
    """The next adapter, and how it came about. Every layer has exactly the rank that was asked for, in float32."""

    factors: Mapping[str, Factors]
    account: Account


def join(
    base: Update | None,
    contributions: Sequence[Contribution],
    *,
    settings: FederateSettings,
    rank: int,
    seed: int = 0,
) -> Joined:
    """`base` + `server_lr` * the mean of what the contributions learned, cut to `rank`.

    The mean is `sum(share.multiplier * update)` over the account's shares. Where the result has less than `rank`, its
    factors are filled up as LoRA starts, from `seed`.

    Raises:
        JoinRefused: no contribution is left that counts, or what came of them is not finite.
    """
    grams, unusable = _compare(base, contributions)
    weighed = weigh(contributions, _total(grams, len(contributions)), unusable, settings=settings)
    counted = [n for n, share in enumerate(weighed.shares) if not share.left_out]
    account = Account(
        method=settings.aggregation,
        robust=settings.robust,
        shares=weighed.shares,
        conflict=weighed.conflict,
        notes=weighed.notes,
        devices=tuple(sorted(frozenset[str]().union(*(_devices(contributions[n]) for n in counted)))),
    )
    if not counted:
        raise JoinRefused(_why_nothing(weighed.shares, weighed.notes), account)
    layers = {}
    for path in sorted({path for n in counted for path in contributions[n].update} | set(base or {})):
        at = [n for n in counted if path in contributions[n].update]
        layers[path] = joined_layer(
            [(weighed.shares[n].multiplier, contributions[n].update[path]) for n in at],
            grams[path][at][:, at] if at else torch.zeros(0, 0),
            base[path] if base and path in base else None,
            aggregation=settings.aggregation,
            server_lr=settings.server_lr,
            rank=rank,
            seed=_seed_of(path, seed),
        )
    account = _measured(account, layers, max_tail=settings.max_tail)
    broken = [path for path, layer in layers.items() if not _finite(layer.factors)]
    if broken:
        raise JoinRefused(f"the joined adapter is not finite at {broken[0]}; bound [federate] max_norm", account)
    return Joined({path: layer.factors for path, layer in layers.items()}, account)


def _compare(base: Update | None, contributions: Sequence[Contribution]) -> tuple[dict[str, Tensor], list[str]]:
    """The updates' inner products by layer, (N, N), and why each update cannot be used (empty: it can).

    Rows and columns of what cannot be used, or has not that layer, are zero.
    """
    unusable = [""] * len(contributions)
    grams: dict[str, Tensor] = {}
    for path in sorted({path for c in contributions for path in c.update}):
        found = {n: c.update[path] for n, c in enumerate(contributions) if path in c.update}
        shape = _shape(base, contributions, found, path)
        for n, factors in found.items():
            unusable[n] = unusable[n] or _unusable(factors, shape, path)
        used = [n for n in found if not unusable[n]]
        grams[path] = torch.zeros(len(contributions), len(contributions), dtype=torch.float64)
        if used:
            grams[path][torch.tensor(used)[:, None], used] = layer_inner_products([found[n] for n in used]).cpu()
    out = torch.tensor([bool(why) for why in unusable], dtype=torch.bool)
    for gram in grams.values():
        gram[out] = 0.0
        gram[:, out] = 0.0
    return grams, unusable


def _total(grams: Mapping[str, Tensor], size: int) -> Tensor:
    return torch.stack([torch.zeros(size, size, dtype=torch.float64), *grams.values()]).sum(dim=0)


def _shape(
    base: Update | None, contributions: Sequence[Contribution], found: Mapping[int, Factors], path: str
) -> tuple[int, int]:
    """(outputs, inputs) of a layer: of the base, of the server's own update, or what most say."""
    if base and path in base:
        return _shape_of(base[path])
    own = [n for n in found if contributions[n].source == OWN]
    return _shape_of(found[own[0]]) if own else Counter(map(_shape_of, found.values())).most_common(1)[0][0]


def _shape_of(factors: Factors) -> tuple[int, int]:
    return int(factors.b.shape[0]), int(factors.a.shape[-1])


def _unusable(factors: Factors, shape: tuple[int, int], path: str) -> str:
    if factors.b.dim() != 2 or factors.a.dim() != 2 or not 0 < factors.b.shape[1] == factors.a.shape[0]:
        return f"the factors of {path} do not fit: {tuple(factors.b.shape)} and {tuple(factors.a.shape)}"
    if _shape_of(factors) != shape:
        return f"{path} is {_shape_of(factors)}, the others' {shape}"
    return "" if _finite(factors) else f"{path} has values that are not finite"


def _finite(factors: Factors) -> bool:
    return bool(torch.isfinite(factors.a).all()) and bool(torch.isfinite(factors.b).all())


def _devices(contribution: Contribution) -> frozenset[str]:
    return (contribution.devices | {contribution.device_id}) - {""}


def _why_nothing(shares: Sequence[Share], notes: Sequence[str]) -> str:
    reasons = [f"{share.source}: {share.left_out}" for share in shares]
    told = "; ".join([*notes, *reasons[:3]]) or "there is none"
    return f"no contribution counts: {told}{f' and {len(reasons) - 3} more' if len(reasons) > 3 else ''}"


def _measured(account: Account, layers: Mapping[str, JoinedLayer], *, max_tail: float) -> Account:
    rho, rho_worst, rho_layer = relative({path: (layer.wrong, layer.mean) for path, layer in layers.items()})
    tail, tail_worst, tail_layer = relative({path: (layer.lost, layer.norm) for path, layer in layers.items()})
    methods = {layer.method for layer in layers.values()} - {""}
    notes = sorted({layer.why_not for layer in layers.values()} - {""})
    if tail > max_tail:
        notes.append(
            f"the cut to the rank lost {tail:.0%} of this update, over max_tail {max_tail:.0%}: raise [train] rank,"
            " or see whether the devices conflict"
        )
    return msgspec.structs.replace(
        account,
        method=next(iter(methods)) if len(methods) == 1 else FEDAVG if FEDAVG in methods else SVD,
        norm=sum(layer.norm**2 for layer in layers.values()) ** 0.5,
        rho=rho,
        rho_worst=rho_worst,
        rho_worst_layer=rho_layer,
        tail=tail,
        tail_worst=tail_worst,
        tail_worst_layer=tail_layer,
        notes=(*account.notes, *notes),
    )


def _seed_of(path: str, seed: int) -> int:
    """Another for each layer, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{path}".encode()).digest()[:7], "big")

"""Twenty devices of which four attack: what each defence makes of it, and what comes of a plain mean; and what comes
of it where those that attack, who need not learn, answer first, and the round takes as many as the server's buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from clawloop_server.aggregate.buffer import buffer_size
from clawloop_server.aggregate.round import JoinRefused, join
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.stack import stacked, truncated
from clawloop_server.aggregate.updates import Contribution, Factors, Update
from federate_check.attacks import ATTACKS, Known
from federate_check.home import Home
from learn_check import world

DEVICES, ATTACKER_SHARE, BATCH, UPDATES, RANK = 20, 0.2, 24, 10, 16
WARM_ROUNDS, WARM_DEVICES = 3, 6
DEFENCES = {
    "gate": FederateSettings(),
    "multi-krum": FederateSettings(robust="multi-krum"),
    "geometric-median": FederateSettings(robust="geometric-median"),
    "none": FederateSettings(robust="mean", max_norm=float("inf"), duplicate_cosine=2.0),
}
DEFAULT = "gate"
PLAIN = "plain mean"
"""not even numbers that are not finite are looked for, and everybody's word on how much it learned from is believed"""
OTHER = [world.Task(task.kind, task.thing, other=True) for task in world.TRAIN]


class Attacked(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out rewards after one cycle: `before` it, without an attack `free` by defence, and by attack and defence; a
    round that was refused has none."""

    seed: int
    before: float
    free: dict[str, float]
    found: dict[str, dict[str, float | None]]
    counted: dict[str, int]
    """by attack, how many of the attackers' updates `gate` let count"""
    free_first: float
    """of the honest devices alone that come in the server's buffer when those that attack answer first"""
    first: dict[str, float | None]
    """by attack, of as many devices with `gate`, those that attack among them and first"""
    few: dict[str, float | None]
    """the same with one honest device beside those that attack"""


def attacked(folder: Path, *, seed: int, attacks: Sequence[str] = tuple(ATTACKS), devices: int = DEVICES) -> Attacked:
    """Run it on the model in `folder`; a fifth of the devices attack."""
    home = Home(folder, batch=BATCH)
    base, old = _warm(home, seed=seed)
    home.serve(base)
    before = home.score(world.HELD_OUT)
    first, attackers = 1000 * (seed + 1), round(ATTACKER_SHARE * devices)
    honest = [
        Contribution(f"delta-{n}", f"device-{n:02}", update, weight=float(BATCH * UPDATES))
        for n in range(devices)
        for update in [home.learn(world.TRAIN, updates=UPDATES, seed=first + n, drawn=first)]
    ]
    harm = [home.learn(OTHER, updates=UPDATES, seed=first + 500 + n, drawn=first) for n in range(attackers)]
    loyal, turned = honest[attackers:], honest[:attackers]
    sent = {name: [*ATTACKS[name](turned, Known(harm, old)), *loyal] for name in attacks}
    taken = {name: buffer_size(DEFENCES[DEFAULT], len(those)) for name, those in sent.items()}
    beside = buffer_size(DEFENCES[DEFAULT], devices) - attackers
    few = {name: len(those) - len(loyal) + 1 for name, those in sent.items()}
    return Attacked(
        seed=seed,
        before=before,
        free={name: _made(home, base, honest, settings) or 0.0 for name, settings in DEFENCES.items()},
        found={
            attack: {name: _made(home, base, those, settings) for name, settings in DEFENCES.items()}
            | {PLAIN: _plain(home, base, those)}
            for attack, those in sent.items()
        },
        counted={attack: _counted(base, those, loyal) for attack, those in sent.items()},
        free_first=_made(home, base, loyal[:beside], DEFENCES[DEFAULT]) or 0.0,
        first={name: _made(home, base, those[: taken[name]], DEFENCES[DEFAULT]) for name, those in sent.items()},
        few={name: _made(home, base, those[: few[name]], DEFENCES[DEFAULT]) for name, those in sent.items()},
    )


def _warm(home: Home, *, seed: int) -> tuple[Update, Update]:
    """An adapter that knows some of it, and what a device learned before there was one."""
    base: Update = {}
    old: Update = {}
    for number in range(WARM_ROUNDS):
        home.serve(base)
        drawn = 1000 * seed + 100 * number
        learned = [home.learn(world.TRAIN, updates=UPDATES, seed=drawn + n, drawn=drawn) for n in range(WARM_DEVICES)]
        old = old or learned[0]
        members = [Contribution(f"warm-{n}", f"device-{n:02}", each, weight=1.0) for n, each in enumerate(learned)]
        base = join(base, members, settings=FederateSettings(), rank=RANK, seed=number).factors
    return base, old


def _made(home: Home, base: Update, sent: Sequence[Contribution], settings: FederateSettings) -> float | None:
    """The held-out reward of what is joined; None where it is refused."""
    try:
        joined = join(base, sent, settings=settings, rank=RANK)
    except JoinRefused:
        return None
    home.serve(joined.factors)
    return home.score(world.HELD_OUT)


def _plain(home: Home, base: Update, sent: Sequence[Contribution]) -> float | None:
    """What a mean gives that looks at nothing; None where it gives no adapter at all."""
    whole, adapter = sum(c.weight for c in sent), dict[str, Factors]()
    for path, before in base.items():
        try:
            stack = stacked([(1.0, before), *((c.weight / whole, c.update[path]) for c in sent)])
            cut = truncated(stack, RANK).factors
        except RuntimeError:  # shapes that do not fit, or an SVD of what is not finite
            return None
        adapter[path] = Factors(cut.b.float(), cut.a.float())
    home.serve(adapter)
    return home.score(world.HELD_OUT)


def _counted(base: Update, sent: Sequence[Contribution], loyal: Sequence[Contribution]) -> int:
    """How many of the attackers' updates count."""
    try:
        account = join(base, sent, settings=DEFENCES[DEFAULT], rank=RANK).account
    except JoinRefused as error:
        account = error.account
    known = {c.source for c in loyal}
    return sum(not share.left_out for share in account.shares if share.source not in known)

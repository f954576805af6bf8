"""Rounds with deltas: which that wait make a round, what they are as updates of the adapter, and what came of joining.

How updates become one is `aggregate`'s; this finds the other factor of each, puts the result into the engine, and has
the vault note what became of every delta. A delta that was forgotten meanwhile is in no adapter.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from clawloop_server.aggregate.buffer import makes_round
from clawloop_server.aggregate.round import Account, Joined, JoinRefused, join
from clawloop_server.aggregate.seeds import task_seed
from clawloop_server.aggregate.settings import FederateSettings
from clawloop_server.aggregate.updates import OWN, Contribution, Factors
from clawloop_server.aggregate.weighing import TOO_FEW
from clawloop_server.errors import ReleaseError, TrainerError
from clawloop_server.release.records import AdapterRecord
from clawloop_server.release.registry import Registry
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.loop import RoundResult
from clawloop_server.trainer.memory import free_bytes
from clawloop_server.trainer.running import LessonsLost
from clawloop_server.vault.deltas import DeltaFacts
from clawloop_server.vault.learners import learners
from clawloop_server.vault.store import Vault
from clawloop_server.vault.sums import devices_in
from clawloop_shared.deltas import A, B, LoraDelta, Method
from clawloop_shared.errors import AdapterInvalid, ClawloopError
from clawloop_shared.files import sha256
from clawloop_shared.frozen_factors import frozen_a
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE, parse_config

_log = logging.getLogger("clawloop.trainer")

MOST_DELTAS = 64
"""of a round without a larger `buffer`; the others wait for the next"""
IN_MEMORY = 4
"""times its size is what a delta takes while it is joined: as it came, in float32, and what is made of it"""

PREFIX = "base_model.model."
"""of the names that PEFT gives to an adapter's tensors"""

Tensors = Mapping[str, Tensor]


class Waiting(NamedTuple):
    """A delta that a round can take, and how many rounds its base is behind."""

    facts: DeltaFacts
    staleness: int


class Joining:
    """The deltas of one line, and how they get into its adapter."""

    def __init__(
        self, *, vault: Vault, registry: Registry, engine: TrainEngine, line_id: str, settings: FederateSettings
    ) -> None:
        self._vault, self._registry, self._engine, self._line_id = vault, registry, engine, line_id
        self._settings = settings
        self._lost_devices: set[str] = set()
        self._tried: set[str] = set()
        self._devices: dict[str, str] = {}
        self._served = cache(self._read_served)
        self._drawn = cache(drawn)

    # which make a round

    def ready(self, newest: Callable[[], AdapterRecord | None], *, cohort: str = "", now_ms: int | None = None) -> bool:
        """Whether enough of a cohort wait for a round without trajectories. `newest`: the adapter that its training
        goes on from."""
        waiting = self._vault.deltas.waiting(self._line_id, cohort=cohort)
        now_ms = now_ms or time.time_ns() // 1_000_000
        if not self._enough(waiting, now_ms, cohort):  # most often nothing waits, and this is asked again and again
            return False
        fresh = [one.facts for one in self.fresh(newest(), cohort=cohort)]
        known = self._tried.issuperset(delta.delta_id for delta in fresh)
        if known and not self._waited(fresh, now_ms):  # the same would come of the same
            return False
        return self._enough(fresh, now_ms, cohort)

    def _enough(self, waiting: Sequence[DeltaFacts], now_ms: int, cohort: str) -> bool:
        waiting = [delta for delta in waiting if delta.device_id not in self._lost_devices]
        if not waiting:
            return False
        oldest_s = (now_ms - min(delta.received_ms for delta in waiting)) / 1000
        sent = self._devices_of(waiting)
        learn = sent | learners(self._vault.database, self._line_id, cohort=cohort)
        return makes_round(self._settings, len(sent), devices=len(learn), oldest_s=oldest_s)

    def _waited(self, deltas: Sequence[DeltaFacts], now_ms: int) -> bool:
        """Whether the oldest of these waited as long as one may."""
        return any(now_ms - delta.received_ms >= 1000 * self._settings.max_wait_s for delta in deltas)

    def _devices_of(self, deltas: Iterable[DeltaFacts]) -> frozenset[str]:
        """The devices that deltas are of, members of secure sums among them."""
        found = (devices_in(self._vault.database, delta.device_id) for delta in deltas)
        return frozenset[str]().union(*found)

    def taken(self, newest: AdapterRecord | None, *, cohort: str = "") -> list[Waiting]:
        """Those of the fresh deltas that one round takes, the longest waiting: as many as it may have, and as fit in
        memory, but `min_devices` in any case. The others wait on."""
        free, taken = free_bytes(torch.device("cpu")), list[Waiting]()
        for one in self.fresh(newest, cohort=cohort)[: max(MOST_DELTAS, self._settings.buffer)]:
            free -= IN_MEMORY * one.facts.size_bytes
            if free < 0 and len(taken) >= self._settings.min_devices:
                _log.warning("%d deltas fill the memory that is free; the others wait for another round", len(taken))
                break
            taken.append(one)
        return taken

    def fresh(self, newest: AdapterRecord | None, *, cohort: str = "") -> list[Waiting]:
        """The deltas of a cohort that wait and are not too old, the longest waiting first; the others are noted as
        stale."""
        waiting = self._vault.deltas.waiting(self._line_id, cohort=cohort)
        if not waiting:
            return []
        line, found = self._ancestors(newest), list[Waiting]()
        for delta in waiting:
            age = self._of_two(delta) or self._age(delta, line)
            if isinstance(age, str):
                self._vault.deltas.outdate(delta.delta_id, age)
                _log.info("delta %s of device %s is stale: %s", delta.delta_id, delta.device_id, age)
            elif delta.device_id not in self._lost_devices:
                found.append(Waiting(delta, age))
        return found

    def _of_two(self, delta: DeltaFacts) -> str:
        """Why it is of no cohort, if it is a sum of devices that learn apart by now."""
        devices = sorted(self._devices_of([delta]))
        if devices == [delta.device_id]:
            return ""
        marks = ", ".join("?" * len(devices))
        sql = f"SELECT count(DISTINCT cohort) FROM devices WHERE device_id IN ({marks})"  # noqa: S608 only marks
        if self._vault.database.count(sql, devices) < 2:
            return ""
        return f"it is the sum of {len(devices)} devices, and these learn in different cohorts by now"

    def _ancestors(self, newest: AdapterRecord | None) -> list[str]:
        """The rounds that the adapter came from, the latest first, as far as a delta may reach back; the line as it is
        has the empty one. A copy of an adapter is of the same round."""
        rounds, record = list[str](), newest
        while record is not None and len(rounds) <= self._settings.max_staleness:
            rounds.append(record.facts.round_id)
            try:
                before = self._registry.round(record.facts.round_id).base_version
                record = self._registry.adapter(before) if before else None
            except ReleaseError:
                return rounds
        return [*rounds, ""] if record is None else rounds

    def _age(self, delta: DeltaFacts, ancestors: Sequence[str]) -> int | str:
        """How many rounds its base is behind, or why it is stale."""
        version, round_id = delta.base_version, ""
        if version:
            record = self._registry.adapter(version)
            round_id = record.facts.round_id
            if (state := self._registry.adapter(record.origin).state).is_gone:
                return f"adapter {version}, beside which it was learned, was {state.replace('_', ' ')}"
        age = ancestors.index(round_id) if round_id in ancestors else None
        if age is None or age > self._settings.max_staleness:
            return f"adapter {version} is over [federate] max_staleness {self._settings.max_staleness} rounds behind"
        return age

    # joining

    def forget_losses(self) -> None:
        """Take deltas of all devices again: a new round begins."""
        self._lost_devices.clear()

    def into(self, result: RoundResult, waiting: Sequence[Waiting], *, before: Tensors, seed: int) -> RoundResult:
        """Join what waits, and what the engine learned itself if it learned from anything, into the engine; the result
        with what became of each delta.

        `before`: the adapter that the round began with. With too few devices nothing changes at all, and what waits
        waits on.
        """
        own_devices = self._vault.devices_of(result.trajectory_ids)
        devices = own_devices | self._devices_of(one.facts for one in waiting)
        if not waiting or len(devices) < self._settings.min_devices:
            return result
        try:
            contributions, left_out, rewards = self._contributions(waiting)
        finally:  # one copy of what several deltas share, and none of it kept
            self._served.cache_clear()
            self._drawn.cache_clear()
        if result.trajectory_ids and contributions:
            own = between(before, self._engine.adapter(), scale=self._scale)
            weight = float(len(result.trajectory_ids))
            contributions.append(Contribution(OWN, "", own, weight, devices=own_devices))
        self._devices = {one.facts.delta_id: one.facts.device_id for one in waiting}
        if not contributions:
            return msgspec.structs.replace(result, deltas=left_out)
        base, rank = update_of(before, scale=self._scale), self._engine.settings.rank
        try:
            joined = join(base, contributions, settings=self._settings, rank=rank, seed=seed)
        except JoinRefused as error:
            _log.warning("no delta is joined: %s", error)
            self._tried.update(one.facts.delta_id for one in waiting)
            waited = self._waited([one.facts for one in waiting], time.time_ns() // 1_000_000)
            fates = _fates(error.account, otherwise=str(error), waited=waited)
            return msgspec.structs.replace(result, deltas=left_out | fates, joined=msgspec.to_builtins(error.account))
        fates = _fates(joined.account)
        if any(not why for why in fates.values()):  # else the round stays what it would be without
            self._put(before, joined)
            self._tried.clear()
        return msgspec.structs.replace(
            result,
            deltas=left_out | fates,
            joined=msgspec.to_builtins(joined.account),
            reward=result.reward if result.trajectory_ids else _mean_reward(rewards, fates),
        )

    def _contributions(
        self, waiting: Sequence[Waiting]
    ) -> tuple[list[Contribution], dict[str, str], dict[str, tuple[float, float]]]:
        """What each delta is, why those cannot be used that cannot, and the rewards that were told with their weights.
        A delta that is gone is passed by."""
        found, left_out, rewards = list[Contribution](), dict[str, str](), dict[str, tuple[float, float]]()
        of_task = self._settings.updates * self._settings.batch_trajectories
        for facts, staleness in waiting:
            try:
                delta = self._vault.deltas.read(facts.delta_id)
                if delta is None:
                    continue
                update = self._update(delta)
            except (ClawloopError, SafetensorError, ValueError) as error:
                _log.error("delta %s of device %s is left out: %s", facts.delta_id, facts.device_id, error)
                left_out[facts.delta_id] = f"cannot be used: {error}"
                continue
            devices = self._devices_of([facts])
            weight = float(min(facts.trajectories, of_task * len(devices)))  # their own word; a task bounds the truth
            device_id = facts.device_id if devices == {facts.device_id} else ""  # a secure sum is of no single one
            found.append(Contribution(facts.delta_id, device_id, update, weight, staleness, devices=devices))
            if delta.reward is not None:
                rewards[facts.delta_id] = (delta.reward, weight)
        return found, left_out, rewards

    def _update(self, delta: LoraDelta) -> dict[str, Factors]:
        """What a delta changes, by layer.

        Raises:
            TrainerError: it changes layers that the adapter has not, or has a number that is none.
            StorageError, ReleaseError: the adapter that it was learned beside cannot be read.
        """
        tensors = {name: tensor.float() for name, tensor in from_safetensors(delta.weights).items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise TrainerError("a number in it is infinite, or none")
        paths = sorted({name.removesuffix(A).removesuffix(B) for name in tensors})
        sizes = {name: tuple(tensor.shape) for name, tensor in self._engine.adapter().items()}
        strange = [path for path in paths if PREFIX + path + A not in sizes]
        if strange:
            raise TrainerError(f"it changes {strange[0]}, which [train] target_modules leaves as it is")
        tensors |= self._other_factors(delta, {path: sizes[PREFIX + path + A][1] for path in paths})
        return {path: Factors(delta.scale * tensors[path + B], tensors[path + A]) for path in paths}

    def _other_factors(self, delta: LoraDelta, inputs: Mapping[str, int]) -> dict[str, Tensor]:
        """The factors that nobody sent, by name."""
        if delta.method is Method.LORA:
            return {}
        if delta.method is Method.FFA or not delta.base_version:
            seed = task_seed(delta.line_id, delta.base_version)
            return {path + A: self._drawn(seed, path, rank=delta.rank, inputs=size) for path, size in inputs.items()}
        served = self._served(delta.base_version)
        part = A if delta.method is Method.ROLORA_B else B
        return {path + part: served[PREFIX + path + part] for path in inputs}

    def _read_served(self, version: int) -> dict[str, Tensor]:
        tensors = from_safetensors(self._registry.files(version)[WEIGHTS_FILE])
        return {name: tensor.float() for name, tensor in tensors.items()}

    @property
    def _scale(self) -> float:
        return self._engine.settings.alpha / self._engine.settings.rank

    def _put(self, before: Tensors, joined: Joined) -> None:
        """Have the engine go on from the joined adapter, with an optimizer that remembers nothing."""
        tensors = {name: tensor.float().cpu() for name, tensor in before.items()}
        for path, factors in joined.factors.items():
            tensors[PREFIX + path + A], tensors[PREFIX + path + B] = factors.a, factors.b / self._scale
        self._engine.start_from(to_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}))

    # what becomes of them

    def check(self, result: RoundResult) -> None:
        """See that every delta that was joined may still be. Part of the transaction that records it.

        Raises:
            LessonsLost: one was forgotten; make the round anew, without its device's deltas.
        """
        lost = self._vault.deltas.lost(result.joined_ids)
        if lost:
            self._lost_devices |= {self._devices[delta_id] for delta_id in lost}
            raise LessonsLost(
                f"{len(lost)} deltas that were joined were forgotten since; the round begins again without"
            )

    def settle(self, round_id: str, result: RoundResult, *, refused: str) -> None:
        """Note what became of the deltas of a round; `refused`: why its adapter was, if so. Part of the transaction
        that records it."""
        if not refused:
            self._vault.deltas.use(round_id, result.deltas)
            return
        self._vault.deltas.use(round_id, {delta_id: why for delta_id, why in result.deltas.items() if why})
        for delta_id in result.joined_ids:
            self._vault.deltas.refuse(delta_id, f"part of a round that was refused: {refused}", round_id=round_id)


def join_seed(seed: int, rounds: int) -> int:
    """The seed of a joined round, 63 bits."""
    return int(sha256(f"{seed} joined round {rounds}".encode())[:16], 16) >> 1


def drawn(seed: int, path: str, *, rank: int, inputs: int) -> Tensor:
    """The factor A that all devices of a task share, (rank, inputs), float32."""
    data = bytearray(frozen_a(seed, path, rank=rank, inputs=inputs))
    return torch.frombuffer(data, dtype=torch.float32).reshape(rank, inputs)


def update_of(adapter: Tensors, *, scale: float) -> dict[str, Factors]:
    """What an adapter does to each layer, those that it leaves as they are left out."""
    paths = sorted(name.removeprefix(PREFIX).removesuffix(A) for name in adapter if name.endswith(A))
    both = {path: (adapter[PREFIX + path + B], adapter[PREFIX + path + A]) for path in paths}
    return {p: Factors(scale * b.float().cpu(), a.float().cpu()) for p, (b, a) in both.items() if bool(b.any())}


def update_in(files: Mapping[str, bytes]) -> dict[str, Factors]:
    """What the files of an adapter do to each layer, scale and all.

    Raises:
        AdapterInvalid: they are no adapter.
    """
    config = parse_config(files[CONFIG_FILE])
    try:
        return update_of(from_safetensors(files[WEIGHTS_FILE]), scale=config.scale)
    except (SafetensorError, KeyError) as error:
        raise AdapterInvalid(f"{WEIGHTS_FILE} holds no LoRA of ours: {error}") from error


def between(before: Tensors, after: Tensors, *, scale: float) -> dict[str, Factors]:
    """What changed from one adapter to another: `s (B1 A1 - B0 A0)` by layer, of twice the rank."""
    old, new = update_of(before, scale=scale), update_of(after, scale=scale)
    found = {}
    for path in sorted(old.keys() | new.keys()):
        parts = [(sign, one[path]) for sign, one in ((1.0, new), (-1.0, old)) if path in one]
        b, a = torch.cat([sign * f.b for sign, f in parts], dim=1), torch.cat([f.a for _, f in parts], dim=0)
        found[path] = Factors(b, a)
    return found


def _fates(account: Account, *, otherwise: str = "", waited: bool = False) -> dict[str, str]:
    """Why each delta is not in the adapter, empty if it is; `otherwise` stands for empty. Those that only lack company
    are not among them: they wait on. Nor are, where too few counted, those that were left out for what they are beside
    the others, unless they have `waited` long enough: then their devices should rather learn anew."""
    deltas = [share for share in account.shares if share.source != OWN]
    lacking = [share for share in deltas if share.left_out.startswith(TOO_FEW)]
    waits = [share for share in deltas if share.by_others] if lacking and not waited else lacking
    told = (share for share in deltas if share not in waits)
    return {share.source: share.left_out or otherwise for share in told}


def _mean_reward(rewards: Mapping[str, tuple[float, float]], fates: Mapping[str, str]) -> float:
    """The mean reward that the devices told of what they learned from; no number where none did."""
    told: Iterable[tuple[float, float]] = [rewards[name] for name, why in fates.items() if not why and name in rewards]
    total = sum(weight for _, weight in told)
    return sum(reward * weight for reward, weight in told) / total if total else float("nan")

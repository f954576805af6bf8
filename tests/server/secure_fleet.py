"""Devices and a clock for a secure sum: the members are those that run on devices, the server is its machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from clawloop_edge.learn.sums import Summand, SumMember, SumRules
from clawloop_server.aggregate.secure import SecureSum, Status
from clawloop_server.aggregate.secure_delivery import terms_of
from clawloop_shared import secure, signing, wire
from clawloop_shared.deltas import LearnTask, LoraDelta, Method, delta_shapes
from clawloop_shared.errors import ClawloopError, SumError
from clawloop_shared.fixed_point import error_of, to_ring
from clawloop_shared.flat import flatten, unflatten
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.messages import SecureReply, SecureRequest
from clawloop_shared.secure import Phase

SHAPE = ModelShape(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=64,
)
TASK = LearnTask(
    task_id="task",
    line_id="line",
    base_version=0,
    method=Method.FFA,
    rank=2,
    alpha=4.0,
    target_modules=("q_proj", "v_proj"),
    clip=1.0,
    sigma=0.5,
    secure=True,
)
SIZES = delta_shapes(TASK.target_modules, SHAPE, rank=TASK.rank, method=TASK.method)
VALUES = 2 * 2 * 16 * 2
TERMS = terms_of(TASK, SHAPE, sum_id="sum", min_members=5)
PHASE_MS = 1000


class Device:
    """One device: its delta, what it has let leave, and whom it knows."""

    def __init__(
        self, number: int, *, task: LearnTask = TASK, rules: SumRules | None = None, sigma: float = 0.5
    ) -> None:
        rng = np.random.default_rng(number)
        learned = rng.normal(size=VALUES)
        self.values = learned / np.linalg.norm(learned) * task.clip + rng.normal(size=VALUES) * sigma * task.clip
        self.ready, self.has_arrived, self.left = True, False, list[bytes]()
        self.key = hashlib.sha256(b"device %d" % number).digest()
        self.delta = LoraDelta(
            task_id=task.task_id,
            line_id=task.line_id,
            base_version=task.base_version,
            method=task.method,
            level=Level.PRIVATE_DELTAS,
            rank=task.rank,
            alpha=task.alpha,
            target_modules=task.target_modules,
            weights=unflatten(self.values, SIZES),
            trajectories=10 + number,
            clip=task.clip,
            sigma=sigma,
        )
        self.seen = set[bytes]()
        self.member = SumMember(self, self, device_key=lambda: self.key, rules=rules or SumRules())
        self.tamper: Callable[[SecureRequest, SecureReply], SecureReply | None] = lambda _, reply: reply

    def summand(self, task_id: str) -> Summand | None:
        if self.left:
            raise SumError("what was learned has left already")
        return Summand(item_id="item", delta=self.delta) if self.ready else None

    def leaving(self, item_id: str, body: bytes) -> None:
        if self.left:
            raise SumError("what was learned has left already")
        self.left.append(body)

    def arrived(self, item_id: str) -> None:
        self.has_arrived = True

    def known(self) -> set[bytes]:
        return self.seen

    def keep(self, keys: set[bytes]) -> None:
        self.seen |= keys


class Play:
    """A sum, its devices, and a clock."""

    def __init__(self, devices: int, *, terms: secure.Terms = TERMS, **kwargs: object) -> None:
        self.devices = {f"d{number:02}": Device(number, **kwargs) for number in range(devices)}  # type: ignore[arg-type]
        keys = {name: signing.public_key(device.key) for name, device in self.devices.items()}
        self.now_ms = 0
        self.sum = SecureSum.begin(terms, keys, now_ms=0, phase_ms=PHASE_MS, patience_ms=200 * PHASE_MS)
        self.gone = set[str]()
        self.errors = list[str]()
        self.requests = list[tuple[str, SecureRequest]]()

    def ask(self, name: str) -> None:
        """Whatever that device is due now."""
        request = self.sum.due(name, now_ms=self.now_ms)
        if request is None or name in self.gone:
            return
        self.requests.append((name, request))
        device = self.devices[name]
        reply = device.tamper(request, device.member.asked(request))
        if reply is None:
            return
        try:
            self.sum.answered(name, wire.decode(wire.encode(reply), SecureReply), now_ms=self.now_ms)
        except ClawloopError as error:
            self.errors.append(str(error))

    def step(self) -> None:
        """Everybody once; then the phase's time is over."""
        phase = self.sum.state.phase
        for name in self.devices:
            if self.sum.state.phase is phase:
                self.ask(name)
        if self.sum.state.phase is phase and self.sum.state.status is Status.RUNNING:
            self.now_ms += PHASE_MS
            self.sum.tick(self.now_ms)

    def until(self, phase: Phase) -> None:
        while self.sum.state.phase is not phase:
            assert self.sum.state.status is Status.RUNNING, self.sum.state.reason
            self.step()

    def run(self) -> SecureSum:
        for _ in range(20):
            if self.sum.state.status is not Status.RUNNING:
                break
            self.step()
        return self.sum

    def plain(self, names: list[str]) -> NDArray[np.float64]:
        """The sum of what the devices learned, as float32."""
        found = [flatten(self.devices[name].delta.weights).astype(np.float64) for name in names]
        return np.asarray(np.sum(found, axis=0), np.float64)

    def is_right(self) -> None:
        """The sum is that of exactly the members that it names."""
        done, n = self.sum, len(self.sum.state.roster.adverts) if self.sum.state.roster else 0
        assert done.state.status is Status.DONE, done.state.reason
        assert done.result is not None
        bound = secure.bound_of(1.0, [0.5])
        ring = np.zeros(VALUES, np.uint32)
        for name in done.members:
            ring += to_ring(flatten(self.devices[name].delta.weights), bound, members=n)
        step = bound / ((2**31 - 1) // n)
        assert np.array_equal(np.rint(done.result.values / step).astype(np.int64), ring.view(np.int32)), "in the ring"
        error = np.abs(done.result.values - self.plain(done.members)).max()
        assert error <= error_of(len(done.members), bound, members=n), "within the rounding bound"
        assert done.result.trajectories == sum(self.devices[name].delta.trajectories for name in done.members)

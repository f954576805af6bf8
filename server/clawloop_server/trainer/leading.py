"""Several processes, one trainer: the first one leads, and what it asks of its engine the others do with theirs.

Engine calls in which all must take part are commands, from a fixed table. The leader tells each to the followers before
it obeys itself; all say how it went, so that none goes on from what another refused. The followers have no database, no
lock and no file but the base. Knows no round: the leader's worker.py runs as it does alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from clawloop_server.bases import base_folder
from clawloop_server.errors import TrainerError
from clawloop_server.home import Home
from clawloop_server.trainer.distributed import Processes
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Reply, Sampling
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.errors import ClawloopError, ConfigError
from clawloop_shared.model_line import read_line
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample
from clawloop_shared.whole_step import Sums

Engine = TypeVar("Engine", bound=TrainEngine)


class Disagreement(ClawloopError):
    """Processes that must do the same did not."""


class Command(msgspec.Struct, frozen=True, tag=True):
    """What all processes do with their engines at the same time."""

    def on(self, engine: TrainEngine) -> Any:
        """Do it."""
        raise NotImplementedError


class ForwardBackward(Command, frozen=True, tag=True):
    """`TrainEngine.forward_backward`."""

    samples: list[Sample]
    settings: LossSettings
    normalizer: float | None

    def on(self, engine: TrainEngine) -> Sums:
        return TrainEngine.forward_backward(engine, self.samples, self.settings, normalizer=self.normalizer)


class OptimStep(Command, frozen=True, tag=True):
    """`TrainEngine.optim_step`."""

    lr: float

    def on(self, engine: TrainEngine) -> float:
        return TrainEngine.optim_step(engine, self.lr)


class TakeGradient(Command, frozen=True, tag=True):
    """`TrainEngine.take_gradient`."""

    def on(self, engine: TrainEngine) -> dict[str, Tensor]:
        return TrainEngine.take_gradient(engine)


class Logprobs(Command, frozen=True, tag=True):
    """`TrainEngine.logprobs`."""

    samples: list[Sample]
    adapter: bool
    in_float32: bool

    def on(self, engine: TrainEngine) -> list[list[float]]:
        return TrainEngine.logprobs(engine, self.samples, adapter=self.adapter, in_float32=self.in_float32)


class Generate(Command, frozen=True, tag=True):
    """`TrainEngine.generate`."""

    prompts: list[list[int]]
    sampling: Sampling

    def on(self, engine: TrainEngine) -> list[Reply]:
        return TrainEngine.generate(engine, self.prompts, sampling=self.sampling)


class ReadAdapter(Command, frozen=True, tag=True):
    """`TrainEngine.adapter`."""

    def on(self, engine: TrainEngine) -> dict[str, Tensor]:
        return TrainEngine.adapter(engine)


class SetAdapter(Command, frozen=True, tag=True):
    """`TrainEngine.set_adapter`; the tensors as safetensors."""

    tensors: bytes

    def on(self, engine: TrainEngine) -> None:
        TrainEngine.set_adapter(engine, from_safetensors(self.tensors))


class ReadState(Command, frozen=True, tag=True):
    """`TrainEngine.state`."""

    def on(self, engine: TrainEngine) -> dict[str, Tensor]:
        return TrainEngine.state(engine)


class SetState(Command, frozen=True, tag=True):
    """`TrainEngine.set_state`; the tensors as safetensors."""

    tensors: bytes

    def on(self, engine: TrainEngine) -> None:
        TrainEngine.set_state(engine, from_safetensors(self.tensors))


class Stop(Command, frozen=True, tag=True):
    """There is nothing more to do."""

    def on(self, engine: TrainEngine) -> None:
        pass


AnyCommand = (
    ForwardBackward
    | OptimStep
    | TakeGradient
    | Logprobs
    | Generate
    | ReadAdapter
    | SetAdapter
    | ReadState
    | SetState
    | Stop
)


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """What a follower must know to begin: which base to train, and how."""

    line_id: str
    settings: TrainSettings


class LeadingEngine(TrainEngine):
    """The leader's engine: it tells the others what it is asked to do. A call within a call is not told again."""

    _leads = False
    _processes: Processes

    def lead(self, processes: Processes) -> LeadingEngine:
        """Tell these processes from now on."""
        self._processes, self._leads = processes, True
        return self

    def _all(self, command: AnyCommand) -> Any:
        if not self._leads:
            return command.on(self)
        self._processes.tell(msgspec.msgpack.encode(command, enc_hook=_as_list))
        self._leads = False
        try:
            return obey(command, self, self._processes)
        finally:
            self._leads = True

    def forward_backward(
        self, samples: Sequence[Sample], settings: LossSettings, *, normalizer: float | None = None
    ) -> Sums:
        found: Sums = self._all(ForwardBackward(list(samples), settings, normalizer))
        return found

    def optim_step(self, lr: float) -> float:
        found: float = self._all(OptimStep(lr))
        return found

    def take_gradient(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._all(TakeGradient())
        return found

    def logprobs(
        self, samples: Sequence[Sample], *, adapter: bool = True, in_float32: bool = False
    ) -> list[list[float]]:
        found: list[list[float]] = self._all(Logprobs(list(samples), adapter, in_float32))
        return found

    def generate(self, prompts: Sequence[Sequence[int]], *, sampling: Sampling) -> list[Reply]:
        found: list[Reply] = self._all(Generate([list(prompt) for prompt in prompts], sampling))
        return found

    def adapter(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._all(ReadAdapter())
        return found

    def set_adapter(self, tensors: dict[str, Tensor]) -> None:
        self._all(SetAdapter(_as_bytes(tensors)))

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self._all(ReadState())
        return found

    def set_state(self, tensors: dict[str, Tensor]) -> None:
        self._all(SetState(_as_bytes(tensors)))

    def stop(self) -> None:
        """Let the followers end."""
        self._all(Stop())


def obey(command: AnyCommand, engine: TrainEngine, processes: Processes) -> Any:
    """Do it, and go on only if all processes could, or none.

    Raises:
        TrainerError: what all of them refused.
        Disagreement: some could and others not, or for other reasons.
    """
    found, refused = None, None
    try:
        found = command.on(engine)
    except TrainerError as error:
        refused = error
    reasons = [reason.decode() for reason in processes.exchange(str(refused or "").encode())]
    if len(set(reasons)) > 1:
        told = "; ".join(f"{rank}: {reason or 'done'}" for rank, reason in enumerate(reasons))
        raise Disagreement(f"the trainer's processes differ on {type(command).__name__} ({told}); it starts again")
    if refused is not None:
        raise refused
    return found


def begin_leading(folder: Path, settings: TrainSettings, processes: Processes) -> LeadingEngine:
    """The leader's engine on the base in `folder`, which is named by its line; the followers open theirs.

    Raises:
        ConfigError: a base is missing or another one, here or with a follower, or the settings are not usable.
    """
    processes.tell(msgspec.msgpack.encode(Begin(line_id=folder.name, settings=settings)))
    return _open_all(LeadingEngine, folder, settings, processes).lead(processes)


def follow(home: Home, processes: Processes) -> None:
    """Do what the leader tells until it stops.

    Raises:
        ConfigError: the base cannot be opened, here or elsewhere.
        Disagreement: this engine did not do what others did.
    """
    begin = msgspec.msgpack.decode(processes.hear(), type=Begin)
    folder = base_folder(home, begin.line_id)
    engine = _open_all(TrainEngine, folder, begin.settings, processes)
    command: AnyCommand | None = None
    while not isinstance(command, Stop):
        command = msgspec.msgpack.decode(processes.hear(), type=AnyCommand)
        try:
            obey(command, engine, processes)
        except TrainerError:
            continue  # the leader's caller decides what comes next


def _open_all(kind: type[Engine], folder: Path, settings: TrainSettings, processes: Processes) -> Engine:
    """The engine, if all processes have the base and a device for it."""
    refused = ""
    try:
        _check_base(folder, processes)
        _claim_device(settings, processes)
    except ConfigError as error:
        refused = str(error)
    reasons = dict.fromkeys(data.decode() for data in processes.exchange(refused.encode()))
    if any(reasons):
        raise ConfigError("; ".join(filter(None, reasons)))
    return kind.open(folder, settings, world=processes)


def _check_base(folder: Path, processes: Processes) -> None:
    """Hash the base of another machine than the leader's, once a machine.

    Raises:
        ConfigError: it is not there, or is another one.
    """
    seat = processes.seat
    if seat.node == 0 or seat.local_rank > 0:
        return
    found = read_line(folder).line_id
    if found != folder.name:
        raise ConfigError(
            f"node {seat.node}: {folder} holds the base of line {found}; copy base/{folder.name} from the first node"
        )


def _claim_device(settings: TrainSettings, processes: Processes) -> None:
    """Make this process's own GPU its current one, where GPUs are what it trains on.

    Raises:
        ConfigError: there are more processes than GPUs.
    """
    if settings.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return
    own, there = processes.seat.local_rank, torch.cuda.device_count()
    if own >= there:
        raise ConfigError(f"process {own} of this machine has no GPU, there are {there}; start {there} processes")
    torch.cuda.set_device(own)


def _as_bytes(tensors: dict[str, Tensor]) -> bytes:
    data: bytes = to_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    return data


def _as_list(value: Any) -> list[int]:
    """For msgspec: ids and indices may be any sequence of integers."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise NotImplementedError(f"{type(value).__name__} cannot be told to other processes")
    return list(value)

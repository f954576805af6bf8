"""The training engine: a model with a LoRA adapter and its optimizer, behind a small API.

    forward_backward   gradients of the loss on samples, added to those that are there
    optim_step         one AdamW step on them
    logprobs           of samples, under the adapter or the bare base
    generate           replies, for evaluation
    save_adapter       in PEFT form, as the edges read it
    save_state         everything that the next step depends on, bit for bit
    load_state         and back

It is algorithm-blind: samples carry their advantages and weights. It knows no reward, round, database or clock.
Out of memory, it makes its rows smaller and does the same work again.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import torch
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from clawloop_server.errors import TrainerError
from clawloop_server.trainer.attention import uses_flex
from clawloop_server.trainer.base import adapted, attach_adapter, load_base
from clawloop_server.trainer.checkpoint import read_checkpoint, write_checkpoint
from clawloop_server.trainer.device import Machine, exact, is_checkpointed, prepare, resolve
from clawloop_server.trainer.generation import Reply, Sampling, generate
from clawloop_server.trainer.losses import LossInputs, policy_loss
from clawloop_server.trainer.memory import (
    DENSE_JOINED,
    estimate,
    free_bytes,
    is_out_of_memory,
    measure,
    release,
    row_budget,
)
from clawloop_server.trainer.packing import PackedRow, pack
from clawloop_server.trainer.scorer import bare, score_row
from clawloop_server.trainer.settings import TrainSettings, check_settings
from clawloop_server.trainer.whole_step import PackedStep
from clawloop_server.trainer.world import Alone, Root, World
from clawloop_shared.files import publish
from clawloop_shared.lora import CONFIG_FILE, WEIGHTS_FILE
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample
from clawloop_shared.whole_step import Sums, cut_log_ratio

NOTHING = Sample(step_id="", trajectory=0, token_ids=[0, 0], trained=[1], logprobs=[0.0], advantages=[0.0], weight=1.0)
"""what a process that has no row of its own goes through with the others"""
_EXP_AVG, _EXP_AVG_SQ, _STEP, _ADAPTER = "exp_avg/", "exp_avg_sq/", "step/", "adapter/"
_RNG, _RNG_CUDA = "rng/cpu", "rng/cuda"
_log = logging.getLogger("clawloop.trainer")


Result = TypeVar("Result")


class UnusableSamples(TrainerError):
    """Samples that cannot be learned from, and `reason`; `trajectories` are their numbers in the update."""

    reason = ""

    def __init__(self, trajectories: list[int]) -> None:
        super().__init__(f"trajectories {trajectories} of this update: {self.reason}; leave them out")
        self.trajectories = trajectories


class PoisonedSamples(UnusableSamples):
    """Samples whose logprobs, or those of the base where the loss asks for them, are not finite."""

    reason = "logprobs under the current policy are not finite"


class OversizedSamples(UnusableSamples):
    """Samples that do not fit the memory, each in a row by itself."""

    reason = "a step does not fit the memory by itself"


class TrainEngine:
    """One model, one adapter, one optimizer, in one process."""

    def __init__(
        self,
        model: Any,
        settings: TrainSettings,
        *,
        world: World | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`model`: a peft model as `attach_adapter` makes it; `world`: the processes that train it, by default this one
        alone; `device`: where to, by default where the model is."""
        self.model = model
        self._world = world or Alone()
        self._root = Root(model)
        self._world.place(self._root, device or next(model.parameters()).device)
        self.settings = check_settings(settings)
        self._parameters: dict[str, Tensor] = {
            name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad
        }
        self.settings = msgspec.structs.replace(
            settings, target_modules=adapted(settings.target_modules, self._parameters)
        )
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self._row: PackedRow | None = None
        self._row_tokens = settings.row_tokens or self._fitting_tokens()

    @classmethod
    def open(cls, folder: Path, settings: TrainSettings, *, world: World | None = None) -> Self:
        """The base in `folder` with a fresh adapter. Sets torch's thread count for the whole process.

        Raises:
            ConfigError: the settings or the folder are not usable.
        """
        check_settings(settings)
        torch.set_num_threads(settings.threads)
        placement = resolve(settings, Machine.here())
        model = attach_adapter(
            load_base(folder, dtype=placement.dtype),
            rank=settings.rank,
            alpha=settings.alpha,
            target_modules=settings.target_modules,
            seed=settings.seed,
        )
        return cls(prepare(model, placement), settings, world=world, device=placement.device)

    @property
    def row_tokens(self) -> int:
        """The most nodes of a packed row; less after memory ran out. Who goes on from a checkpoint sets it to what it
        was then, since where rows are cut changes the last bits."""
        return self._row_tokens

    @row_tokens.setter
    def row_tokens(self, row_tokens: int) -> None:
        self._row_tokens = max(1, row_tokens)

    def _fitting_tokens(self) -> int:
        """A row budget from the memory that is free now."""
        base, device = bare(self.model), self._device
        need = estimate(base, checkpointing=is_checkpointed(base), flex=uses_flex(base))
        if device.type == "cuda" and self._world.size == 1:  # out of memory in one process, the others would wait
            need = measure(self._trial, device, estimated=need)
        return row_budget(need, free_bytes=free_bytes(device))

    def _trial(self, nodes: int) -> None:
        """Go through a row of `nodes` nodes that teaches nothing."""
        trained = range(1, nodes)
        sample = replace(NOTHING, token_ids=[0] * nodes, trained=trained, logprobs=[0.0] * len(trained))
        (row,) = pack([replace(sample, advantages=sample.logprobs)], row_tokens=nodes)
        torch.autograd.backward(0.0 * self._root(score_row, row.to(self._device), entropy=True)[0].sum())
        self._optimizer.zero_grad()

    def forward_backward(
        self, samples: Sequence[Sample], settings: LossSettings, *, normalizer: float | None = None
    ) -> Sums:
        """Add the gradient of the loss on `samples`, row by row. `normalizer`: the trained tokens of the whole step, if
        they are a part of one; shares are capped among `samples` alone.

        Raises:
            PoisonedSamples: logprobs that are not finite; the gradients that were there are gone, too.
            OversizedSamples: what does not fit the memory alone; the gradients are as they were before.
        """
        before = {p: None if p.grad is None else p.grad.clone() for p in self._parameters.values()}

        def undo() -> None:
            for parameter, gradient in before.items():
                if parameter.grad is None or gradient is None:
                    parameter.grad = None if gradient is None else gradient.clone()
                else:
                    parameter.grad.copy_(gradient)

        return self._in_rows(lambda: self._add_gradients(samples, settings, normalizer=normalizer), undo=undo)

    def _in_rows(self, work: Callable[[], Result], *, undo: Callable[[], None] = lambda: None) -> Result:
        """What `work` gives. Where it runs out of memory, `undo` it and try again with smaller rows; a sample that did
        so twice by itself is named. Several processes end instead, since the others wait where one gave up; what is
        tried then is for running.py."""
        alone = set[int]()
        while True:
            self._row = None
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if self._row is None or self._world.size > 1 or not is_out_of_memory(error):
                    raise
            release()
            undo()
            self._make_smaller(self._row, alone)

    def _make_smaller(self, row: PackedRow, alone: set[int]) -> None:
        """Lower the budget below a row that did not fit. `alone`: samples that did not, in a row of their own."""
        nodes = len(row.token_ids_T)
        self.row_tokens = min(self.row_tokens, nodes // 2)
        _log.warning("out of memory in a row of %d tokens; rows have at most %d now", nodes, self.row_tokens)
        if len(row.members_S) == 1:
            if row.members_S[0] in alone:
                raise OversizedSamples(row.trajectory_U.tolist())
            alone.add(row.members_S[0])

    def _add_gradients(self, samples: Sequence[Sample], settings: LossSettings, *, normalizer: float | None) -> Sums:
        packed = self._pack(samples)
        split = self._distances(samples, packed) if settings.judges_trajectories else {}
        step = PackedStep.of(samples, settings, normalizer=normalizer, split=split)
        sums, broken = Sums(), list[int]()
        for row in self._mine(packed):
            if row is None:
                self._take_part(settings)
                continue
            loss, found, poisoned = self._row_loss(row, settings, step=step)
            torch.autograd.backward(loss * self._world.size)  # FSDP takes the mean over processes
            sums, broken = sums + found, broken + poisoned
        if broken := self._world.union(broken):
            broken = self._broken_alone(samples, settings, broken=broken)
            self._optimizer.zero_grad()
            raise PoisonedSamples(broken)
        return self._world.total(sums)

    def _broken_alone(self, samples: Sequence[Sample], settings: LossSettings, *, broken: list[int]) -> list[int]:
        """Which of these trajectories are broken in rows of their own too. In a row with others a hidden state that is
        NaN is one in all of them: its attention weight is 0, and 0 NaN is NaN. All, if none is by itself."""
        found = []
        for trajectory in broken:
            own = [sample for sample in samples if sample.trajectory == trajectory]
            logprobs = self._find_logprobs(own, adapter=True)
            if settings.kl_beta:
                logprobs = logprobs + self._find_logprobs(own, adapter=False)
            if not all(math.isfinite(number) for one in logprobs for number in one):
                found.append(trajectory)
        return found or broken

    def _distances(self, samples: Sequence[Sample], packed: Sequence[PackedRow]) -> dict[int, tuple[float, float]]:
        """Mean and lowest log ratio of each trajectory that is in several rows: none of these can tell it alone."""
        homes = Counter(trajectory for row in packed for trajectory in row.trajectory_U.tolist())
        parts = [sample for sample in samples if homes[sample.trajectory] > 1]
        ratios: dict[int, list[float]] = {}
        logprobs = self._find_logprobs(parts, adapter=True) if parts else []
        for sample, found in zip(parts, logprobs, strict=True):
            drifts = (now - then for now, then in zip(found, sample.logprobs, strict=True))
            ratios.setdefault(sample.trajectory, []).extend(cut_log_ratio(drift) for drift in drifts)
        return {trajectory: (sum(own) / len(own), min(own)) for trajectory, own in ratios.items()}

    def _row_loss(self, row: PackedRow, settings: LossSettings, *, step: PackedStep) -> tuple[Tensor, Sums, list[int]]:
        """The loss of a row, what to log, and the trajectories whose logprobs are not finite."""
        reference_P = self._reference(row) if settings.kl_beta else None
        logprobs_P, entropy_P = self._root(score_row, row, entropy=True)
        inputs = LossInputs(
            logprobs_P=logprobs_P,
            behaviour_P=row.behaviour_P,
            advantage_P=row.advantage_P,
            unit_P=row.unit_P,
            weight_U=row.weight_U,
            gap_U=step.of_units(row, step.gaps.__getitem__),
            cap_U=step.of_units(row, step.caps.__getitem__),
            normalizer=step.normalizer,
            reference_P=reference_P,
            calls=step.calls_of(row),
            whole=step.distance_of(row),
        )
        loss, sums = policy_loss(inputs, settings)
        finite_P = logprobs_P.detach().isfinite()
        if reference_P is not None:
            finite_P &= reference_P.isfinite()
        broken = sorted(set(row.trajectory_U[row.unit_P[~finite_P]].tolist()))
        return loss, sums + Sums(entropy=float(entropy_P.sum()) if entropy_P is not None else 0.0), broken

    @torch.no_grad()
    def _reference(self, row: PackedRow) -> Tensor:
        with self.model.disable_adapter():
            return self._logprobs(row)

    def _logprobs(self, row: PackedRow) -> Tensor:
        logprobs_P: Tensor = self._root(score_row, row)[0]
        return logprobs_P

    def _take_part(self, settings: LossSettings) -> None:
        """Go through a row of two tokens that teaches nothing, because the processes that have one wait for this."""
        (row,) = pack([NOTHING], row_tokens=2)
        row = row.to(self._device)
        if settings.kl_beta:
            self._reference(row)
        torch.autograd.backward(0.0 * self._logprobs(row).sum())

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _pack(self, samples: Sequence[Sample]) -> list[PackedRow]:
        flex = uses_flex(bare(self.model))
        return pack(
            samples,
            row_tokens=self._world.least(self.row_tokens),
            join_tokens=None if flex else DENSE_JOINED,
            fill=flex,
        )

    def _mine(self, packed: Sequence[PackedRow]) -> Iterator[PackedRow | None]:
        for row in self._world.share(packed):
            self._row = row
            yield None if row is None else row.to(self._device)

    def optim_step(self, lr: float) -> float:
        """One AdamW step on the gradients; their norm before clipping. Without finite gradients nothing moves."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        clipped = torch.nn.utils.clip_grad_norm_(self._parameters.values(), self.settings.clip_norm)
        norm = float(self._world.whole(clipped))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def take_gradient(self) -> dict[str, Tensor]:
        """The gradients that are there, under the names of `adapter`; afterwards there are none."""
        found = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self._parameters.items()
        }
        self._optimizer.zero_grad()
        return {name: self._world.whole(gradient) for name, gradient in found.items()}

    def logprobs(
        self, samples: Sequence[Sample], *, adapter: bool = True, in_float32: bool = False
    ) -> list[list[float]]:
        """For each sample the logprobs of its trained tokens at its temperature, under the adapter or the bare base.

        `in_float32`, whatever the base's own numbers are; several processes, each with a part of it, use these.

        Raises:
            OversizedSamples: what does not fit the memory alone.
        """
        with exact(bare(self.model)) if in_float32 and self._world.size == 1 else nullcontext():
            return self._in_rows(lambda: self._find_logprobs(samples, adapter=adapter))

    @torch.no_grad()
    def _find_logprobs(self, samples: Sequence[Sample], *, adapter: bool) -> list[list[float]]:
        found: dict[int, list[float]] = {}
        with nullcontext() if adapter else self.model.disable_adapter():
            for row in self._mine(self._pack(samples)):
                if row is None:
                    self._logprobs(pack([NOTHING], row_tokens=2)[0].to(self._device))
                    continue
                parts = torch.split(self._logprobs(row), list(row.counts_S))
                found |= {member: part.tolist() for member, part in zip(row.members_S, parts, strict=True)}
        found = self._world.together(found)
        return [found[member] for member in range(len(samples))]

    def generate(self, prompts: Sequence[Sequence[int]], *, sampling: Sampling) -> list[Reply]:
        """One sampled reply for each prompt, under the adapter."""
        replies: list[Reply] = self._root(generate, prompts, sampling=sampling, agree=self._world.agree)
        return replies

    def adapter(self) -> dict[str, Tensor]:
        """A copy of the adapter's tensors under their PEFT names."""
        return {name: self._world.whole(parameter.detach()).clone() for name, parameter in self._parameters.items()}

    def set_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Make `tensors` the adapter; the optimizer keeps its state.

        Raises:
            TrainerError: not the names and shapes of this engine's adapter.
        """
        self._put(tensors)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        wanted = {name: tuple(p.shape) for name, p in self._parameters.items()}
        if {name: tuple(t.shape) for name, t in tensors.items()} != wanted:
            raise TrainerError(
                "the adapter has other tensors than [train] rank and target_modules ask for; change the settings back"
            )
        for name, parameter in self._parameters.items():
            parameter.copy_(self._world.part(parameter, tensors[name]))

    @contextmanager
    def with_adapter(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """For the time of a `with`, another adapter."""
        mine = self.adapter()
        self.set_adapter(tensors)
        try:
            yield
        finally:
            self.set_adapter(mine)

    def save_adapter(self, folder: Path) -> None:
        """Publish the adapter in PEFT form (float32) in `folder`, which must exist.

        Raises:
            StorageError: it could not be written.
        """
        for name, data in self.adapter_files().items():
            publish(folder / name, data)

    def adapter_files(self) -> dict[str, bytes]:
        """The adapter's files in PEFT form (float32), by name."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.settings.target_modules),
            "inference_mode": True,
        }
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in self.adapter().items()}
        return {
            CONFIG_FILE: msgspec.json.format(msgspec.json.encode(config), indent=2),
            WEIGHTS_FILE: to_safetensors(tensors, metadata={"format": "pt"}),
        }

    def save_state(self, path: Path, *, text: str) -> None:
        """Publish a checkpoint: adapter, AdamW, torch's random state, and `text` for whatever else the caller keeps.

        Raises:
            StorageError: it could not be written.
        """
        write_checkpoint(path, self.state(), text=text)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, by name: adapter, AdamW, torch's random state."""
        tensors = {_ADAPTER + name: self._world.whole(p.detach()) for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for part, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{part}/{name}"] = self._world.whole(value)
        if self._device.type == "cuda":
            tensors[_RNG_CUDA] = torch.cuda.get_rng_state(self._device)
        return tensors | {_RNG: torch.get_rng_state()}

    def set_state(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a state; what of the optimizer's and the random one is not in it begins anew, or stays.

        Raises:
            TrainerError: it is of another adapter shape; nothing has changed.
        """
        self._put({n.removeprefix(_ADAPTER): t for n, t in tensors.items() if n.startswith(_ADAPTER)})
        self._optimizer.zero_grad()
        self._optimizer.state.clear()
        for name, parameter in self._parameters.items():
            if _STEP + name in tensors:
                self._optimizer.state[parameter] = {
                    "step": tensors[_STEP + name],
                    "exp_avg": self._world.part(parameter, tensors[_EXP_AVG + name]),
                    "exp_avg_sq": self._world.part(parameter, tensors[_EXP_AVG_SQ + name]),
                }
        if _RNG in tensors:
            torch.set_rng_state(tensors[_RNG])
        if _RNG_CUDA in tensors and self._device.type == "cuda":
            torch.cuda.set_rng_state(tensors[_RNG_CUDA], self._device)

    def start_from(self, weights: bytes) -> None:
        """Go on from an adapter's file alone: its tensors, and an optimizer that remembers nothing.

        Raises:
            TrainerError: it is of another adapter shape.
        """
        self.set_state({_ADAPTER + name: tensor for name, tensor in from_safetensors(weights).items()})

    def load_state(self, path: Path) -> str:
        """Go back to a checkpoint; the text that was saved with it.

        Raises:
            StorageError: it cannot be read.
            TrainerError: it is of another adapter shape.
        """
        tensors, text = read_checkpoint(path)
        self.set_state(tensors)
        return text

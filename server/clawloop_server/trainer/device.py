"""Where a model is trained and in which numbers: what "auto" means, decided once, and a model made to be so.

A bfloat16 base has a float32 adapter: its master weights, gradients and AdamW are float32, its products are bfloat16 as
those of the base are (autocast), since in float32 they would cost as much as the base's. Logits are float32 (head.py).
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from clawloop_server.trainer.attention import use_flex, uses_flex, why_not_flex
from clawloop_server.trainer.memory import is_out_of_memory, release
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.errors import ConfigError

_log = logging.getLogger("clawloop.trainer")


@dataclass(frozen=True)
class Machine:
    """What torch finds here."""

    cuda: bool = False
    cuda_bfloat16: bool = False
    mps: bool = False
    mps_bfloat16: bool = False

    @classmethod
    def here(cls) -> "Machine":
        """This machine."""
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        return cls(
            cuda=cuda,
            cuda_bfloat16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
            mps=mps,
            mps_bfloat16=mps and torch.backends.mps.is_macos_or_newer(14, 0),
        )


@dataclass(frozen=True)
class Placement:
    """The settings with nothing left to "auto". `asked_flex`: FlexAttention was asked for by name."""

    device: torch.device
    dtype: torch.dtype
    flex: bool = False
    asked_flex: bool = False
    checkpointing: bool = False


def resolve(settings: TrainSettings, machine: Machine) -> Placement:
    """What the settings mean on this machine.

    Raises:
        ConfigError: a device that is not there, or numbers or an attention that it does not have.
    """
    kind = _device(settings.device, machine)
    return Placement(
        device=torch.device(kind, torch.cuda.current_device())
        if kind == "cuda" and machine.cuda
        else torch.device(kind),
        dtype=_dtype(settings.dtype, kind, machine),
        flex=_flex(settings.attention, kind),
        asked_flex=settings.attention == "flex",
        checkpointing=settings.activation_checkpointing == "on"
        or (settings.activation_checkpointing == "auto" and kind != "cpu"),
    )


def _device(asked: str, machine: Machine) -> str:
    there = {"cuda": machine.cuda, "mps": machine.mps, "cpu": True}
    if asked == "auto":
        return next(kind for kind, found in there.items() if found)
    if not there[asked]:
        found = ", ".join(kind for kind, is_there in there.items() if is_there)
        built = "" if asked != "cuda" or torch.version.cuda else f" (torch {torch.__version__} has no CUDA)"
        raise ConfigError(
            f'[train] device = "{asked}": there is none{built}; found: {found}. Set one of these, or "auto"'
        )
    return asked


def _dtype(asked: str, kind: str, machine: Machine) -> torch.dtype:
    can = {"cuda": machine.cuda_bfloat16, "mps": machine.mps_bfloat16, "cpu": True}[kind]
    if asked == "bfloat16" and not can:
        newer = "macOS 14" if kind == "mps" else "a GPU of compute capability 8.0"
        raise ConfigError(f'[train] dtype = "bfloat16" needs {newer} or newer on {kind}; set "float32"')
    return torch.bfloat16 if asked == "bfloat16" or (asked == "auto" and can and kind != "cpu") else torch.float32


def _flex(asked: str, kind: str) -> bool:
    if asked == "flex" and kind == "mps":
        raise ConfigError('[train] attention = "flex" has no gradients on mps; set "dense"')
    return asked == "flex" or (asked == "auto" and kind == "cuda")


def prepare(model: Any, placement: Placement) -> Any:
    """A peft model made ready to be trained as `placement` says. It is not moved.

    Raises:
        ConfigError: its layers cannot be checkpointed, or FlexAttention was asked for and does not work.
    """
    base = model.get_base_model()
    if placement.dtype != torch.float32:
        for module in model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # autocast does it, where peft would copy to float32 first
    if placement.checkpointing:
        _checkpoint_layers(base)
    if placement.flex:
        _try_flex(base, placement)
    return model


def _checkpoint_layers(base: Any) -> None:
    """What transformers' `activation_checkpointing_enable` does, without its hook for gradients of the embedding."""
    for layer in _layers(base):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
    if not _layers(base):
        raise ConfigError(
            f'{type(base).__name__} cannot checkpoint its layers; set [train] activation_checkpointing = "off"'
        )


def is_checkpointed(base: Any) -> bool:
    """Whether a transformers model's layers (not wrapped) are computed again in the backward pass."""
    return any(layer.gradient_checkpointing for layer in _layers(base))


def _layers(base: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def _try_flex(base: Any, placement: Placement) -> None:
    """FlexAttention if it compiles and agrees with dense attention; else say so, once."""
    reason = why_not_flex(base, device=placement.device, dtype=placement.dtype)
    if not reason:
        use_flex(base)
    elif placement.asked_flex:
        raise ConfigError(f'[train] attention = "flex" does not work here ({reason}); set "dense" or "auto"')
    else:
        _log.warning(
            "FlexAttention does not work here (%s): training goes on with dense masks, whose memory and time grow by "
            'the square of a row; [train] attention = "dense" silences this',
            reason,
        )


@contextlib.contextmanager
def arithmetic(base: Any) -> Iterator[None]:
    """Within it a transformers model (not wrapped) with an adapter computes in its base's numbers, and, where gradients
    are wanted, keeps no more activations than it was prepared to."""
    weight = base.get_input_embeddings().weight
    layers = [m for m in _layers(base) if m.gradient_checkpointing] if torch.is_grad_enabled() else []
    # Layers recompute only in training mode. It is set on them alone: dropout, a layer below, stays off.
    for layer in layers:
        layer.training = True
    try:
        with torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=weight.dtype == torch.bfloat16):
            yield
    finally:
        for layer in layers:
            layer.training = False


@contextlib.contextmanager
def exact(base: Any) -> Iterator[None]:
    """Within it a transformers model (not wrapped) of 16-bit numbers has the same ones in float32, as a device has that
    checks a probe, and attends by dense masks, since FlexAttention was tried in its own numbers alone; afterwards it is
    as it was, bit for bit. Where memory is short for that, it says so and stays."""
    halves = [(p, p.dtype) for p in base.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    was_flex = bool(halves) and uses_flex(base)
    try:
        try:
            for parameter, _ in halves:
                parameter.data = parameter.data.float()
            if was_flex:
                base.set_attn_implementation("sdpa")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("no memory for a float32 copy of the base: the probe has its own, rougher numbers")
            _put_back(halves)
        yield
    finally:
        _put_back(halves)
        if was_flex:
            use_flex(base)


def _put_back(halves: list[tuple[Any, torch.dtype]]) -> None:
    for parameter, dtype in halves:
        parameter.data = parameter.data.to(dtype)
    release()

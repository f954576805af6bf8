"""Loading the base model that the edges serve, and putting a LoRA adapter on its linear layers.

Reads local folders only and never runs code that comes with a model. A folder quantised by MLX is dequantised to the
numbers that MLX computes with (mlx_weights.py); the result is frozen and never quantised again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clawloop_server.trainer.base_config import read_trainable
from clawloop_server.trainer.mlx_weights import read_weights
from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import LINEARS, ModelShape, expected_tensors
from clawloop_shared.lora import LoraConfig as AdapterConfig
from clawloop_shared.model_line import shape_of

ATTENTION = "sdpa"
"""torch's own, whatever a config.json names"""
_SHOWN = 3
"""names of tensors in a message"""


def load_base(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model in `folder`, frozen, in evaluation mode (no dropout), its weights in `dtype`.

    The folder is in the layout of transformers or of mlx-lm, quantised (mode affine) or not.

    Raises:
        ConfigError: no model folder, a quantisation or an architecture that cannot be trained, or not exactly the
            tensors of that architecture.
    """
    config, quantization = read_trainable(folder)
    weights = read_weights(folder, quantization, dtype=dtype)
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind, settings = _architecture(config, folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its report of what is missing is our error
    try:
        model, report = kind.from_pretrained(
            None,
            config=settings,
            state_dict=weights,
            dtype=dtype,
            attn_implementation=ATTENTION,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{folder} could not be loaded: {error!r:.300}") from error
    finally:
        logging.set_verbosity(verbosity)
    _check_complete(report, folder)
    _set_generation(model, folder)
    model.requires_grad_(False)
    return model.eval()


def _architecture(config: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """The class of a causal language model, and its settings, by the `model_type` of config.json."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    known = {name: value for name, value in config.items() if name != "model_type"}
    try:
        settings = AutoConfig.for_model(config.get("model_type"), **known)
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)], settings
    except Exception as error:
        raise ConfigError(
            f"{folder}/config.json is of no causal language model that is known here: {error!s:.300}"
        ) from error


def _check_complete(report: dict[str, Any], folder: Path) -> None:
    """`report`: what transformers says of a load. A random weight in place of a missing one would go unnoticed."""
    words = {"missing_keys": "lacks", "unexpected_keys": "has unknown", "mismatched_keys": "has other sizes of"}
    for what, word in words.items():
        if names := sorted(str(name) for name in report[what]):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ConfigError(f"{folder} {word} {', '.join(names[:_SHOWN])}{more}; export the model again")
    if report["error_msgs"]:
        raise ConfigError(f"{folder} could not be loaded: {report['error_msgs'][0]}")


def _set_generation(model: Any, folder: Path) -> None:
    """What a model says of how it wants to be sampled; its end tokens are of use."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ConfigError(f"{folder}/generation_config.json cannot be used: {error!r:.300}") from error


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer in `folder`, with its chat template.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no usable tokenizer: {error}") from error


def attach_adapter(model: Any, *, rank: int, alpha: float, target_modules: tuple[str, ...], seed: int) -> Any:
    """`model` wrapped by peft with a fresh LoRA: A random from `seed`, B zero, both float32 and trainable.

    Of `target_modules` those are adapted that the model has: in a layer of experts the attention alone.

    Raises:
        ConfigError: it has none of them, or is not built of the linear layers that adapters are made for.
    """
    from peft import LoraConfig, get_peft_model

    shape = shape_of(model.config.to_dict())
    targets = shape.targets(target_modules)
    if not targets:
        raise ConfigError(f"[train] target_modules {target_modules}: this model has only {shape.targets(LINEARS)}")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[path for path in shape.linears() if path.rsplit(".", 1)[1] in targets],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _no_experts(model.config):
        # peft 0.21 asks transformers 5.23 by a name that it deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
        except ValueError as error:
            raise ConfigError(f"no adapter can be put on this {type(model).__name__}: {error}") from error
    _check_adapter(wrapped, AdapterConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), shape)
    return wrapped.eval()


@contextmanager
def _no_experts(config: Any) -> Iterator[None]:
    """Keep peft 0.21 from reading `gate_proj` of a dense layer as that of the experts in others: for model types with
    experts it takes each target that ends so for one of transformers 4, and adapts the experts' stacked weights."""
    kind = config.model_type
    config.model_type = ""
    try:
        yield
    finally:
        config.model_type = kind


def adapted(wanted: tuple[str, ...], names: Iterable[str]) -> tuple[str, ...]:
    """Those of `wanted` that an adapter with parameters of these `names` is on."""
    there = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in names if ".lora_" in name}
    return tuple(name for name in wanted if name in there)


def _check_adapter(wrapped: Any, config: AdapterConfig, shape: ModelShape) -> None:
    """Refuse what an edge would: not exactly the tensors that it expects of this config and this model."""
    made = {n.replace(".default.", "."): tuple(p.shape) for n, p in wrapped.named_parameters() if p.requires_grad}
    odd = sorted(expected_tensors(config, shape).items() ^ made.items())
    if odd:
        raise ConfigError(
            f"this {type(wrapped.get_base_model()).__name__} has not the linear layers that adapters are made for:"
            f" {odd[0][0]} {odd[0][1]}"
        )

"""Loading the base model that the edges serve, and putting a LoRA adapter on its linear layers.

Reads local folders only and never runs code that comes with a model. Quantised folders are refused, not approximated.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from clawloop_shared.errors import ConfigError
from clawloop_shared.model_line import read_config

IGNORED_LAYERS = {"full_attention"}
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""settings of Gemma, Cohere and Granite; the scorer computes the head by itself and would be silently wrong"""


def load_base(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model in `folder`, frozen, in evaluation mode (no dropout).

    Raises:
        ConfigError: no model folder, a quantised one, or an architecture whose attention cannot be packed.
    """
    config = read_config(folder)
    if config.get("quantization") or config.get("quantization_config"):
        raise ConfigError(f"{folder} is quantised, which cannot be trained on yet; import the unquantised model folder")
    limited = sorted(set(config.get("layer_types") or []) - IGNORED_LAYERS)
    if limited or config.get("use_sliding_window"):
        raise ConfigError(
            f"{folder} has layers of type {limited or 'sliding window'}; only full attention is supported"
        )
    scaled = sorted(name for name in LOGIT_CHANGES if config.get(name) not in (None, 1, 1.0))
    if scaled:
        raise ConfigError(f"{folder} changes its logits after the head ({', '.join(scaled)}), which is not supported")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} could not be loaded: {error}") from error
    model.requires_grad_(False)
    return model.eval()


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
    """`model` wrapped by peft with a fresh LoRA: A random from `seed`, B zero, both float32 and trainable."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(target_modules),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that it deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    return wrapped.eval()

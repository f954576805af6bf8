"""A model folder quantised by mlx-lm, as people serve them. Keeps the type of what is not quantised."""

import contextlib
import io
import shutil
from pathlib import Path

GROUP_SIZE = 32
"""of MLX's sizes the one that loses least; rows of the demo's model have 64 values"""


def quantise(source: Path, target: Path, *, bits: int) -> Path:
    """Write `source` with weights of `bits` bits to `target`, with its tokenizer and template; `target`."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    target.mkdir(parents=True)
    for path in (*source.glob("*token*"), *source.glob("*.jinja"), *source.glob("generation_config.json")):
        shutil.copyfile(path, target / path.name)
    model, config = load_model(source)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        model, config = quantize_model(model, config, group_size=GROUP_SIZE, bits=bits)
    save_model(target, model)
    save_config(config, target / "config.json")
    return target

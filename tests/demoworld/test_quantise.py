"""The demo's model in 4 bits: the folder that its edges and its trainer get."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model

from clawloop_server.trainer.base import load_base, load_tokenizer
from clawloop_shared.model_line import read_line
from demoworld.demo import MODEL
from demoworld.quantise import quantise


def test_the_quantised_model_is_a_line_of_its_own_that_both_sides_load_alike(tmp_path: Path) -> None:
    folder = quantise(MODEL, tmp_path / "model", bits=4)
    line, whole = read_line(folder), read_line(MODEL)
    assert '"bits":4' in line.quantization
    assert line.base_sha256 != whole.base_sha256
    assert (line.tokenizer_sha256, line.template_sha256) == (whole.tokenizer_sha256, whole.template_sha256)
    ids = load_tokenizer(folder).encode("Which contact has the harbour office in Minsk?")
    served = np.array(load_model(folder)[0](mx.array([ids])))
    with torch.no_grad():
        trained, full = (load_base(path)(input_ids=torch.tensor([ids])).logits.numpy() for path in (folder, MODEL))
    assert np.abs(served - trained).max() < 1e-4
    assert np.abs(trained - full).max() > 0.1

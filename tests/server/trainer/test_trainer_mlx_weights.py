"""Weights quantised by MLX become in torch what `mx.dequantize` makes of them, to the last bit."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_server.trainer.base_config import BITS, GROUP_SIZES, Affine, Quantization, read_trainable
from clawloop_server.trainer.mlx_weights import Parts, dequantize, read_weights, unpack
from clawloop_shared.errors import ConfigError

from .served import to_torch

DTYPES = {mx.float32: torch.float32, mx.bfloat16: torch.bfloat16, mx.float16: torch.float16}


@settings(deadline=None, max_examples=150)
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUP_SIZES),
    groups=st.integers(1, 5),
    rows=st.integers(1, 9),
    experts=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from(list(DTYPES)),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_dequantised_numbers_are_those_of_mlx_bit_for_bit(
    bits: int, group_size: int, groups: int, rows: int, experts: int, dtype: mx.Dtype, scale: float, seed: int
) -> None:
    shape = (*([experts] if experts else []), rows, groups * group_size)
    weight = (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(dtype)
    words, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
    wanted = to_torch(mx.dequantize(words, scales, biases, group_size=group_size, bits=bits))
    how = Affine(group_size=group_size, bits=bits)
    found = dequantize(Parts(to_torch(words), to_torch(scales), to_torch(biases)), how)
    assert found.dtype == wanted.dtype == DTYPES[dtype]
    assert torch.equal(found, wanted)
    exact = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group_size, bits=bits)
    parts = Parts(to_torch(words), to_torch(scales).float(), to_torch(biases).float())
    assert torch.equal(dequantize(parts, how), to_torch(exact))


@pytest.mark.parametrize("bits", BITS)
def test_any_word_is_unpacked_as_one_stream_of_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(0, 2**32, (3, 3 * bits), generator=generator).to(torch.uint32)
    for row, found in zip(words.tolist(), unpack(words, bits).tolist(), strict=True):
        stream = sum(word << (32 * n) for n, word in enumerate(row))
        assert found == [(stream >> (bits * n)) % 2**bits for n in range(96)]


def test_a_tall_matrix_is_done_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = mx.random.normal((50, 64), key=mx.random.key(1))
    parts = Parts(*(to_torch(part) for part in mx.quantize(weight, group_size=32, bits=3)))
    how = Affine(group_size=32, bits=3)
    whole = dequantize(parts, how)
    monkeypatch.setattr("clawloop_server.trainer.mlx_weights.BLOCK", 200)
    assert torch.equal(dequantize(parts, how), whole)


def test_what_does_not_fit_together_is_refused() -> None:
    words, scales, biases = (to_torch(part) for part in mx.quantize(mx.ones((2, 64)), group_size=32, bits=4))
    for parts, how in (
        ((words, scales, biases), Affine(group_size=64, bits=4)),
        ((words, scales, biases), Affine(group_size=32, bits=8)),
        ((words, scales, biases[:1]), Affine(group_size=32, bits=4)),
        ((words.to(torch.int64), scales, biases), Affine(group_size=32, bits=4)),
        ((words, scales.bfloat16(), biases), Affine(group_size=32, bits=4)),
    ):
        with pytest.raises(ConfigError, match="are not"):
            dequantize(Parts(*parts), how)


@pytest.mark.parametrize(
    ("quantization", "word"),
    [
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mode 'mxfp4'; only affine"),
        ({"group_size": 16, "bits": 4, "mode": "nvfp4"}, "mode 'nvfp4'"),
        ({"group_size": 32, "bits": 8, "mode": "mxfp8"}, "mode 'mxfp8'"),
        ({"group_size": 32, "bits": 4, "mode": "new"}, "mode 'new'"),
        ({"group_size": 48, "bits": 4}, "4 bits in groups of 48"),
        ({"group_size": 64, "bits": 7}, "7 bits"),
        ({"bits": 4}, "groups of None"),
        ({"group_size": 64, "bits": 4, "lm_head": {"bits": 4, "mode": "mxfp4"}}, "quantization.lm_head has mode"),
        ({"group_size": 64, "bits": 4, "lm_head": {"bits": 4, "global_scale": True}}, "global_scale"),
        ({"group_size": 64, "bits": 4, "lm_head": "yes"}, "lm_head is 'yes'"),
        ({"quant_method": "awq", "bits": 4}, "quantised by 'awq'"),
        ("4bit", "not a table"),
    ],
)
def test_quantisations_that_are_not_affine_are_refused_and_named(
    quantization: object, word: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization": quantization}))
    with pytest.raises(ConfigError, match=word):
        read_trainable(tmp_path)


SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_layers_may_have_words_of_their_own(tmp_path: Path) -> None:
    own = {"a.b": {"group_size": 32, "bits": 8}, "a.c": False, "a.d": True, "a.e": {"bits": 3}}
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"quantization": {"group_size": 128, "bits": 2} | own}))
    config, found = read_trainable(tmp_path)
    assert config == SIZES
    assert found == Quantization(
        Affine(group_size=128, bits=2),
        {
            "a.b": Affine(group_size=32, bits=8),
            "a.c": None,
            "a.d": Affine(group_size=128, bits=2),
            "a.e": Affine(group_size=64, bits=3),
        },
    )
    assert found.of("anything") == found.usual


def test_files_that_disagree_with_their_settings_are_refused(tmp_path: Path) -> None:
    words, scales, biases = mx.quantize(mx.ones((2, 64)), group_size=32, bits=4)
    whole = {"a.weight": words, "a.scales": scales, "a.biases": biases}

    def read(tensors: dict[str, mx.array], quantization: Quantization | None) -> None:
        mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
        for source in read_weights(tmp_path, quantization, dtype=torch.float32).values():
            source[...]

    usual = Quantization(Affine(group_size=32, bits=4), {})
    read(whole, usual)
    with pytest.raises(ConfigError, match="a has scales, but config"):
        read(whole, None)
    with pytest.raises(ConfigError, match="a has scales, but config"):
        read(whole, Quantization(usual.usual, {"a": None}))
    with pytest.raises(ConfigError, match="not quantised in mode affine"):
        read({name: array for name, array in whole.items() if name != "a.biases"}, usual)
    with pytest.raises(ConfigError, match=r"a: words .* are not 8 bits"):
        read(whole, Quantization(Affine(group_size=32, bits=8), {}))
    mx.save_safetensors(str(tmp_path / "model-2.safetensors"), whole)
    with pytest.raises(ConfigError, match="which another file has too"):
        read(whole, usual)
    (tmp_path / "model-2.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(whole, usual)
    for path in tmp_path.glob("model*"):
        path.unlink()
    with pytest.raises(ConfigError, match="no weights"):
        read_weights(tmp_path, usual, dtype=torch.float32)


PEAK = """
import resource, sys
from pathlib import Path
import torch
from clawloop_server.trainer.base_config import Affine, Quantization
from clawloop_server.trainer.mlx_weights import read_weights
torch.set_num_threads(1)
weights = read_weights(Path(sys.argv[1]), Quantization(Affine(group_size=64, bits=4), {}), dtype=torch.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = [source[...] for source in weights.values()]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sum(each.nbytes for each in kept) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_the_peak_of_memory_is_near_the_size_of_the_result(tmp_path: Path) -> None:
    for n in range(2):
        words, scales, biases = mx.quantize(mx.random.normal((8192, 2048)), group_size=64, bits=4)
        tensors = {f"l{n}.weight": words, f"l{n}.scales": scales, f"l{n}.biases": biases}
        mx.save_safetensors(str(tmp_path / f"model-{n}.safetensors"), tensors)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, result = (int(kib) for kib in done.stdout.split())
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir()) // 1024
    assert result == 128 << 10
    assert grown < result + on_disk + (40 << 10)  # what is mapped counts; at once it would be 80 more

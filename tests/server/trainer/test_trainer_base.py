"""The base that serves is the base that trains: what mlx-lm made of a model computes the same in torch."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from clawloop_edge.adapters.convert import read_factors
from clawloop_edge.engine.lora import with_adapter
from clawloop_server.trainer.base import attach_adapter, load_base
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.errors import AdapterInvalid, ConfigError
from clawloop_shared.lora import (
    ATTENTION,
    CONFIG_FILE,
    LINEARS,
    WEIGHTS_FILE,
    LoraConfig,
    check_tensors,
    expected_tensors,
    parse_config,
)
from clawloop_shared.model_line import read_shape
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample
from clawloop_shared.safetensors_header import read_header

from .served import KINDS, MORE_KINDS, convert, mlx_logits, mlx_model, random_model, save_as_hub, torch_logits

IDS = [(7 * n * n + 3 * n) % 318 + 2 for n in range(90)]
"""more than 64 picks of experts, from which on MLX sorts them"""
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`hub(kind)` -> a random model of that kind as transformers saves it; made once."""
    made: dict[str, Path] = {}

    def give(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_as_hub(random_model(kind), tmp_path_factory.mktemp("hub"))
        return made[kind]

    return give


def gap(folder: Path) -> float:
    """The largest difference of a logit between MLX and torch, both in float32."""
    return float((mlx_logits(mlx_model(folder), IDS) - torch_logits(load_base(folder), IDS)).abs().max())


@pytest.mark.parametrize(("bits", "group_size"), [(0, 64), (4, 32), (4, 64), (8, 64), (3, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_mlx(
    kind: str, bits: int, group_size: int, hub: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = convert(hub(kind), tmp_path, bits=bits, group_size=group_size)
    assert gap(folder) < 1e-4
    whole, own = torch_logits(load_base(hub(kind)), IDS), torch_logits(load_base(folder), IDS)
    assert float((whole - own).abs().max()) > 0.05 if bits else torch.equal(whole, own)


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_other_architectures_of_the_same_layers_work_too(kind: str, hub: Callable[[str], Path], tmp_path: Path) -> None:
    folder = convert(hub(kind), tmp_path, bits=4)
    assert gap(folder) < 1e-4
    targets = TrainEngine.open(folder, TrainSettings(rank=2)).settings.target_modules
    assert (
        targets == read_shape(folder).targets(LINEARS) == (ATTENTION if kind in ("mixtral", "qwen2-moe") else LINEARS)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_quantised_loads_as_transformers_loads_it(kind: str, hub: Callable[[str], Path]) -> None:
    mine, theirs = load_base(hub(kind)), AutoModelForCausalLM.from_pretrained(hub(kind), dtype=torch.float32).eval()
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())
    assert torch.equal(torch_logits(mine, IDS), torch_logits(theirs, IDS))
    assert mine.config == theirs.config
    assert mine.generation_config.eos_token_id == theirs.generation_config.eos_token_id == 1
    assert not mine.training
    assert not any(parameter.requires_grad for parameter in mine.parameters())


def test_layers_may_be_quantised_each_in_its_own_way(hub: Callable[[str], Path], tmp_path: Path) -> None:
    own = {
        "model.layers.0.self_attn.q_proj": {"group_size": 32, "bits": 8},
        "model.layers.1.mlp.down_proj": {"group_size": 128, "bits": 3},
        "model.embed_tokens": {"group_size": 64, "bits": 6},
    }
    keeps = {"model.layers.2.mlp.up_proj", "lm_head"}
    folder = convert(hub("llama"), tmp_path, bits=4, quant_predicate=lambda path, _: own.get(path, path not in keeps))
    assert {name: json.loads((folder / "config.json").read_text())["quantization"][name] for name in own} == own
    assert gap(folder) < 1e-4


def test_weights_of_a_half_precision_folder_are_those_that_its_products_use(
    hub: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = convert(hub("qwen3"), tmp_path, bits=4, dtype=mx.bfloat16)
    model = mlx_model(folder)
    model.set_dtype(mx.float32)
    exact = load_base(folder)
    assert float((mlx_logits(model, IDS) - torch_logits(exact, IDS)).abs().max()) < 1e-4
    half = load_base(folder, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact.get_parameter(name).bfloat16())


def test_shards_are_read_as_one(hub: Callable[[str], Path], tmp_path: Path) -> None:
    folder = convert(hub("qwen3-moe"), tmp_path, bits=4)
    before = torch_logits(load_base(folder), IDS)
    tensors = sorted(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    for n in range(5):  # words, scales and biases of a layer lie in different files
        save_file(dict(tensors[n::5]), folder / f"model-{n + 1:05}-of-00005.safetensors")
    assert torch.equal(torch_logits(load_base(folder), IDS), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [0, 4])
def test_an_adapter_gives_the_logprobs_in_torch_that_it_gives_in_mlx(
    kind: str, bits: int, hub: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = convert(hub(kind), tmp_path, bits=bits)
    engine = TrainEngine.open(folder, TrainSettings(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(5)
    engine.set_adapter({n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in engine.adapter().items()})
    sample = Sample(
        step_id="s",
        trajectory=0,
        token_ids=IDS,
        trained=range(1, len(IDS)),
        logprobs=[0.0] * (len(IDS) - 1),
        advantages=[0.0] * (len(IDS) - 1),
    )
    files = engine.adapter_files()
    config = parse_config(files[CONFIG_FILE])
    check_tensors(read_header(files[WEIGHTS_FILE], max_bytes=1 << 20), config, shape=read_shape(folder))
    adapted = with_adapter(mlx_model(folder), read_factors(files, rank_max=64))
    found = []
    for model in (adapted, mlx_model(folder)):
        scores = mlx_logits(model, IDS[:-1]).log_softmax(-1)
        found.append(scores.gather(-1, torch.tensor(IDS[1:])[:, None]).squeeze(-1))
    assert engine.logprobs([sample])[0] == pytest.approx(found[0].tolist(), abs=1e-4)
    assert engine.logprobs([sample], adapter=False)[0] == pytest.approx(found[1].tolist(), abs=1e-4)
    assert float((found[0] - found[1]).abs().max()) > 0.5


@pytest.mark.parametrize("kind", ["qwen3-moe", "experts-only"])
def test_calls_that_share_a_row_teach_a_model_with_experts_what_they_teach_alone(
    kind: str, session: Callable[..., list[Sample]], hub: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = convert(hub(kind), tmp_path, bits=4)
    samples = [replace(sample, weight=1.0, version_gap=0) for sample in session(3)]  # a trajectory has one of each
    gradients = []
    for row_tokens in (1, 4096):  # each call by itself, and all that share anything together
        engine = TrainEngine.open(folder, TrainSettings(rank=4, row_tokens=row_tokens))
        generator = torch.Generator().manual_seed(5)
        engine.set_adapter({n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in engine.adapter().items()})
        engine.forward_backward(samples, LossSettings(veto=0.0))
        gradients.append({n: p.grad for n, p in engine.model.named_parameters() if p.requires_grad})
    alone, together = gradients
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    assert largest > 1e-3
    for name, gradient in alone.items():
        assert float((gradient - together[name]).abs().max()) < 1e-5 * max(1.0, largest), name


def test_adapters_name_what_an_architecture_has(hub: Callable[[str], Path]) -> None:
    for kind, targets, modules in (
        ("qwen3", LINEARS, 3 * 7),
        ("qwen3-moe", LINEARS, 3 * 4 + 3),
        ("experts-only", ATTENTION, 3 * 4),
    ):
        engine = TrainEngine.open(hub(kind), TrainSettings(rank=4))
        assert engine.settings.target_modules == targets
        config = parse_config(engine.adapter_files()[CONFIG_FILE])
        assert sorted(config.target_modules) == sorted(targets)
        shapes = {name: tuple(tensor.shape) for name, tensor in engine.adapter().items()}
        assert shapes == expected_tensors(config, read_shape(hub(kind)))
        assert len(shapes) == 2 * modules
    everything = LoraConfig(r=4, lora_alpha=8.0, target_modules=list(LINEARS))
    with pytest.raises(AdapterInvalid, match=r"\['down_proj', 'gate_proj', 'up_proj'\] are in no layer"):
        expected_tensors(everything, read_shape(hub("experts-only")))
    with pytest.raises(ConfigError, match="this model has only"):
        TrainEngine.open(hub("experts-only"), TrainSettings(target_modules=("up_proj",)))


def test_what_an_edge_would_refuse_is_refused_when_it_is_opened() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    fused = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
    fused.requires_grad_(False)
    with pytest.raises(ConfigError, match="Phi3ForCausalLM has not the linear layers"):
        attach_adapter(fused, rank=2, alpha=2.0, target_modules=LINEARS, seed=0)


@pytest.fixture
def folder(hub: Callable[[str], Path], tmp_path: Path) -> Path:
    """A quantised folder to spoil."""
    return convert(hub("qwen3-moe"), tmp_path / "model", bits=4)


def test_missing_strange_and_misshapen_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = load_file(path)

    def spoil(tensors: dict[str, Any], word: str) -> None:
        save_file(tensors, path)
        with pytest.raises(ConfigError, match=word):
            load_base(folder)

    norm, up = "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.switch_mlp.up_proj."
    spoil({n: t for n, t in whole.items() if n != norm}, "lacks model.layers.0.self_attn.q_norm.weight; export")
    spoil(
        {n: t for n, t in whole.items() if not n.startswith(up)}, r"lacks model\.layers\.0\.mlp\.experts\.gate_up_proj"
    )
    spoil(whole | {"model.layers.0.extra.weight": torch.ones(2)}, r"has unknown model\.layers\.0\.extra\.weight")
    spoil(whole | {norm: torch.ones(8)}, r"has other sizes of .*q_norm\.weight")
    spoil({n: t for n, t in whole.items() if ".layers.2." not in n}, r"lacks .* and \d+ more")
    spoil({n: t for n, t in whole.items() if n != f"{up}biases"}, "scales and no biases")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= {"group_size": 32, "bits": 8}  # the same sizes of files, other numbers
    (folder / "config.json").write_text(json.dumps(config))
    spoil(whole, "has other sizes of")


def test_folders_that_cannot_be_trained_are_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for extra, word in (
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mode 'mxfp4'"),
        ({"quantize_activations": True}, "activations"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"model_type": "made-up"}, "no causal language model"),
        ({"model_type": "vit"}, "no causal language model"),
    ):
        (folder / "config.json").write_text(json.dumps(config | extra))
        with pytest.raises(ConfigError, match=word):
            load_base(folder)
    with pytest.raises(ConfigError, match="no model folder"):
        load_base(tmp_path / "nowhere")


def test_no_code_of_a_model_runs(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "surprise.Config", "AutoModelForCausalLM": "surprise.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    (folder / "surprise.py").write_text("raise SystemExit('it ran')")
    (folder / "pytorch_model.bin").write_bytes(b"no pickle is read")
    before = shutil.copy(folder / "config.json", folder / "kept")
    load_base(folder)
    assert (folder / "config.json").read_bytes() == Path(before).read_bytes()


def test_code_that_a_config_names_is_neither_fetched_nor_run(hub: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(hub("qwen3-moe"), tmp_path / "model")
    named = {
        f"{at}{what}_implementation{more}": "x/y"
        for at in ("", "_")
        for what in ("attn", "experts")
        for more in ("", "_internal")
    }
    reconfigure(folder, named | {"auto_map": {"AutoModelForCausalLM": "x/y--code.Model"}})
    model = load_base(folder)
    assert model.config._attn_implementation == "sdpa"
    assert "x/y" not in repr(vars(model.config))
    assert torch.equal(torch_logits(model, IDS), torch_logits(load_base(hub("qwen3-moe")), IDS))


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"hidden_act": "zigzag"},
        {"pad_token_id": 10**6},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
        {"vocab_size": "many"},
        {"rms_norm_eps": "small"},
        {"model_type": ["qwen3"]},
    ],
)
def test_a_config_that_no_model_can_be_made_of_is_refused_in_a_sentence(
    values: dict[str, object], hub: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(hub("qwen3"), tmp_path / "model")
    reconfigure(folder, values)
    with pytest.raises(ConfigError, match=str(folder)):
        load_base(folder)


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_and_biases_that_are_not_finite_are_refused_by_name(
    part: str, value: float, hub: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = convert(hub("qwen3"), tmp_path, bits=4)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.{part}"][3, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(ConfigError, match=f"{name} has scales or biases that are not finite"):
        load_base(folder)


def reconfigure(folder: Path, values: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

"""Where a model is trained: what "auto" means on each machine, and what cannot be is refused with the way out."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clawloop_server.trainer.attention import uses_flex
from clawloop_server.trainer.base import attach_adapter, load_base
from clawloop_server.trainer.device import Machine, Placement, arithmetic, exact, prepare, resolve
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.packing import pack
from clawloop_server.trainer.scorer import bare, score_row
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.errors import ConfigError
from clawloop_shared.lora import LINEARS
from clawloop_shared.rows import Sample

Session = Callable[..., list[Sample]]
CPU = Machine()
MAC = Machine(mps=True, mps_bfloat16=True)
GPU = Machine(cuda=True, cuda_bfloat16=True)


def placed(machine: Machine, **changes: Any) -> Placement:
    return resolve(TrainSettings(**changes), machine)


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.parametrize(
    ("machine", "kind", "dtype", "flex", "checkpointing"),
    [
        (CPU, "cpu", torch.float32, False, False),
        (MAC, "mps", torch.bfloat16, False, True),
        (replace(MAC, mps_bfloat16=False), "mps", torch.float32, False, True),
        (GPU, "cuda", torch.bfloat16, True, True),
        (replace(GPU, cuda_bfloat16=False), "cuda", torch.float32, True, True),
    ],
)
def test_auto_takes_what_the_machine_has(
    machine: Machine, kind: str, dtype: torch.dtype, flex: bool, checkpointing: bool
) -> None:
    found = placed(machine)
    assert (found.device.type, found.dtype, found.flex, found.checkpointing) == (kind, dtype, flex, checkpointing)


def test_what_is_asked_for_by_name_is_done() -> None:
    found = placed(GPU, dtype="float32", attention="dense", activation_checkpointing="off")
    assert found == Placement(torch.device("cuda", 0), torch.float32)
    assert placed(GPU, device="cpu") == Placement(torch.device("cpu"), torch.float32)
    assert placed(CPU, dtype="bfloat16", attention="flex", activation_checkpointing="on") == Placement(
        torch.device("cpu"), torch.bfloat16, flex=True, asked_flex=True, checkpointing=True
    )


@pytest.mark.parametrize(
    ("machine", "changes", "says"),
    [
        (CPU, {"device": "cuda"}, 'found: cpu. Set one of these, or "auto"'),
        (GPU, {"device": "mps"}, "found: cuda, cpu"),
        (replace(MAC, mps_bfloat16=False), {"dtype": "bfloat16"}, 'macOS 14 or newer on mps; set "float32"'),
        (replace(GPU, cuda_bfloat16=False), {"dtype": "bfloat16"}, 'capability 8.0 or newer on cuda; set "float32"'),
        (MAC, {"attention": "flex"}, 'no gradients on mps; set "dense"'),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(machine: Machine, changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        placed(machine, **changes)
    assert says in str(caught.value)


def model_for(folder: Path, placement: Placement) -> Any:
    model = attach_adapter(load_base(folder, dtype=placement.dtype), rank=4, alpha=8.0, target_modules=LINEARS, seed=0)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return prepare(model, placement)


def gradients(model: Any, samples: list[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
    (row,) = pack(samples, row_tokens=4096)
    logprobs_P, _ = score_row(model, row, entropy=True)
    torch.autograd.backward((logprobs_P * row.advantage_P).sum())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logprobs_P.detach(), found


ON_CPU = Placement(torch.device("cpu"), torch.float32)


def test_a_bfloat16_base_has_float32_adapters_gradients_and_logprobs(tiny_folder: Path, session: Session) -> None:
    samples = session(1, trajectories=2)
    plain, wanted = gradients(model_for(tiny_folder, ON_CPU), samples)
    model = model_for(tiny_folder, replace(ON_CPU, dtype=torch.bfloat16))
    seen = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    logprobs_P, found = gradients(model, samples)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}  # nothing of a row's width is float32
    assert bare(model).get_output_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logprobs_P.dtype == torch.float32
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert float((logprobs_P - plain).abs().max()) < 0.2
    for name, gradient in found.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0)
        assert float(cosine) > 0.98, name


def test_a_probe_has_the_numbers_of_float32_and_leaves_the_base_as_it_was(tiny_folder: Path, session: Session) -> None:
    half = TrainEngine.open(tiny_folder, TrainSettings(rank=4, dtype="bfloat16"))
    full = TrainEngine.open(tiny_folder, TrainSettings(rank=4, dtype="float32"))
    for mine, theirs in zip(full.model.parameters(), half.model.parameters(), strict=True):
        mine.data = theirs.data.float()
    before = [p.detach().clone() for p in half.model.parameters()]
    samples = session()
    found, wanted, rough = half.logprobs(samples, in_float32=True), full.logprobs(samples), half.logprobs(samples)
    assert found == wanted
    assert rough != wanted
    assert all(torch.equal(p, b) and p.dtype == b.dtype for p, b in zip(half.model.parameters(), before, strict=True))


def test_a_probe_has_dense_masks_where_flex_was_tried_in_half_precision_alone(
    tiny_folder: Path, session: Session
) -> None:
    half = TrainEngine.open(tiny_folder, TrainSettings(rank=4, dtype="bfloat16", attention="flex"))
    base = bare(half.model)
    with exact(base):
        assert not uses_flex(base)
        assert half.logprobs(session()) == half.logprobs(session(), in_float32=True)
    assert uses_flex(base)
    full = bare(TrainEngine.open(tiny_folder, TrainSettings(rank=4, dtype="float32", attention="flex")).model)
    with exact(full):
        assert uses_flex(full)


def test_without_memory_for_float32_a_probe_has_the_base_s_own_numbers(
    tiny_folder: Path, session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    half = TrainEngine.open(tiny_folder, TrainSettings(rank=4, dtype="bfloat16"))
    wanted, made = half.logprobs(session()), list[int]()
    plain = torch.Tensor.float

    def short(tensor: torch.Tensor) -> torch.Tensor:
        made.append(1)
        if len(made) == 3:
            raise torch.OutOfMemoryError("no memory")
        return plain(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "float", short)
        with exact(bare(half.model)):
            patched.undo()
            assert half.logprobs(session()) == wanted
    assert "no memory for a float32 copy" in caplog.text


def calls_of_layers(model: Any) -> list[int]:
    """How often each layer's MLP begins; filled as the model runs. (Recomputing stops with the last tensor needed.)"""
    counts = [0] * len(bare(model).get_decoder().layers)
    for number, layer in enumerate(bare(model).get_decoder().layers):

        def count(*_: Any, number: int = number) -> None:
            counts[number] += 1

        layer.mlp.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("flex", [False, True], ids=["dense", "flex"])
def test_checkpointed_layers_are_computed_twice_with_the_same_gradients(
    tiny_folder: Path, session: Session, dtype: torch.dtype, flex: bool
) -> None:
    samples = session(2, trajectories=3)
    kept = replace(ON_CPU, dtype=dtype, flex=flex)
    plain, wanted = gradients(model_for(tiny_folder, kept), samples)
    model = model_for(tiny_folder, replace(kept, checkpointing=True))
    counts = calls_of_layers(model)
    logprobs_P, found = gradients(model, samples)
    assert counts == [2, 2]
    assert torch.equal(logprobs_P, plain)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.no_grad():
        score_row(model, pack(samples, row_tokens=4096)[0])
    assert counts == [3, 3]
    assert not any(module.training for module in model.modules())


def test_checkpointing_keeps_a_layer_s_input_and_nothing_within(tiny_folder: Path, session: Session) -> None:
    def kept(checkpointing: bool) -> int:
        model = model_for(tiny_folder, replace(ON_CPU, checkpointing=checkpointing))
        own = {p.data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def hold(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        (row,) = pack(session(2, trajectories=3), row_tokens=4096)
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            output = score_row(model, row)[0]
        assert output.requires_grad
        return sum(held.values())

    assert kept(checkpointing=True) < 0.25 * kept(checkpointing=False)


def test_a_model_that_cannot_checkpoint_is_refused(tiny_folder: Path) -> None:
    model = attach_adapter(load_base(tiny_folder), rank=4, alpha=8.0, target_modules=LINEARS, seed=0)
    bare(model).get_decoder().layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match='activation_checkpointing = "off"'):
        prepare(model, replace(ON_CPU, checkpointing=True))


def test_flex_that_does_not_work_is_left_with_one_warning_or_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr("clawloop_server.trainer.attention.attend_by_blocks", broken)
    model = model_for(tiny_folder, replace(ON_CPU, flex=True))
    assert not uses_flex(bare(model))
    assert ["no such kernel" in record.message for record in caplog.records] == [True]
    with pytest.raises(ConfigError, match=r'no such kernel.*set "dense" or "auto"'):
        model_for(tiny_folder, replace(ON_CPU, flex=True, asked_flex=True))


def test_flex_that_is_wrong_is_found_out(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scale: float) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    monkeypatch.setattr("clawloop_server.trainer.attention.attend_by_blocks", careless)
    with pytest.raises(ConfigError, match="off dense attention"):
        model_for(tiny_folder, replace(ON_CPU, flex=True, asked_flex=True))


def test_a_model_is_as_it_was_after_an_error_within(tiny_folder: Path) -> None:
    model = model_for(tiny_folder, replace(ON_CPU, checkpointing=True))
    before = copy.copy([module.training for module in model.modules()])
    with pytest.raises(ValueError, match="within"), arithmetic(bare(model)):
        raise ValueError("within")
    assert [module.training for module in model.modules()] == before

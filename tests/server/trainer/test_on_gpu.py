"""The engine on a GPU is the engine on a CPU, but for its numbers' last bits; checkpoints go from one to the other."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from clawloop_server.trainer.attention import uses_flex
from clawloop_server.trainer.checkpoint import read_checkpoint, write_checkpoint
from clawloop_server.trainer.engine import TrainEngine
from clawloop_server.trainer.generation import Sampling
from clawloop_server.trainer.scorer import bare
from clawloop_server.trainer.settings import TrainSettings
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample

Session = Callable[..., list[Sample]]
LOSS = LossSettings(veto=0.0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def opened(folder: Path, **changes: str) -> TrainEngine:
    settings = TrainSettings(rank=4, warmup_updates=1, row_tokens=512)
    return TrainEngine.open(folder, msgspec.structs.replace(settings, **changes))


def train(engine: TrainEngine, session: Session, *, seeds: range) -> None:
    for seed in seeds:
        engine.forward_backward(session(seed), LOSS)
        engine.optim_step(1e-2)


def test_a_checkpoint_of_a_gpu_is_gone_on_from_without_one(tiny_folder: Path, session: Session, tmp_path: Path) -> None:
    engine, other = opened(tiny_folder, device="cpu"), opened(tiny_folder, device="cpu")
    train(engine, session, seeds=range(2))
    engine.save_state(tmp_path / "cpu", text="")
    tensors, _ = read_checkpoint(tmp_path / "cpu")
    write_checkpoint(tmp_path / "gpu", tensors | {"rng/cuda": torch.zeros(16, dtype=torch.uint8)}, text="of a GPU")
    assert other.load_state(tmp_path / "gpu") == "of a GPU"
    for each in (engine, other):
        train(each, session, seeds=range(2, 3))
    assert all(torch.equal(tensor, other.adapter()[name]) for name, tensor in engine.adapter().items())


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_a_gpu_finds_the_gradients_and_replies_of_a_cpu(
    tiny_folder: Path, session: Session, attention: str, checkpointing: str
) -> None:
    cpu = opened(tiny_folder, device="cpu")
    gpu = opened(
        tiny_folder, device="cuda", dtype="float32", attention=attention, activation_checkpointing=checkpointing
    )
    assert uses_flex(bare(gpu.model)) == (attention == "flex")
    one, other = (each.forward_backward(session(5, trajectories=6), LOSS).metrics() for each in (cpu, gpu))
    assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    norms = [each.optim_step(1e-2) for each in (cpu, gpu)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    prompts = [list(s.token_ids) for s in session(8, turns=1)]
    sampling = Sampling(max_tokens=4, eos_ids=frozenset({1}), temperature=0.0)
    assert [r.ids for r in gpu.generate(prompts, sampling=sampling)] == [
        r.ids for r in cpu.generate(prompts, sampling=sampling)
    ]


@pytest.mark.gpu
@on_gpu
def test_a_gpu_goes_on_from_its_own_checkpoint_and_from_a_cpu_s(
    tiny_folder: Path, session: Session, tmp_path: Path
) -> None:
    gpu = opened(tiny_folder, device="cuda", dtype="bfloat16")
    train(gpu, session, seeds=range(2))
    gpu.save_state(tmp_path / "gpu", text="")
    assert "rng/cuda" in read_checkpoint(tmp_path / "gpu")[0]
    drawn = torch.rand(3, device="cuda")
    gpu.load_state(tmp_path / "gpu")
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    cpu = opened(tiny_folder, device="cpu")
    cpu.load_state(tmp_path / "gpu")
    for name, tensor in cpu.adapter().items():
        assert torch.equal(tensor, gpu.adapter()[name].cpu())
    cpu.save_state(tmp_path / "cpu", text="")
    gpu.load_state(tmp_path / "cpu")
    train(gpu, session, seeds=range(2, 3))
    assert {p.grad for p in gpu.model.parameters()} == {None}

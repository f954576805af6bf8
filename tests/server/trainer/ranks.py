"""One of several processes of test_distributed.py: trains small models on the samples of a folder, says what came out.

python -m tests.server.trainer.ranks FOLDER, with a seat in the environment
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from clawloop_server.trainer.device import Machine, prepare, resolve
from clawloop_server.trainer.engine import PoisonedSamples, TrainEngine
from clawloop_server.trainer.generation import Sampling
from clawloop_server.trainer.settings import TrainSettings
from clawloop_server.trainer.world import World
from clawloop_shared.objective import LossSettings
from clawloop_shared.rows import Sample

from .conftest import SIZES, awake

ROW_TOKENS = 64
SAMPLING = Sampling(max_tokens=6, eos_ids=frozenset({1}), seed=3)
PROMPTS = [[2, 3, 4], [2, 3, 9, 9], [5]]


class Case(msgspec.Struct, frozen=True):
    """What is trained: `name` of the samples' file, and how."""

    name: str
    architecture: str = "qwen3"
    tied: bool = True
    rank: int = 4
    checkpointing: str = "off"
    kl_beta: float = 0.02


def build(case: Case, world: World | None = None) -> TrainEngine:
    """A random model in float64 with a LoRA that changes something."""
    sizes: dict[str, Any] = SIZES | {"tie_word_embeddings": case.tied}
    torch.manual_seed(0)
    base = Qwen3ForCausalLM(Qwen3Config(**sizes))
    if case.architecture == "llama":
        base = LlamaForCausalLM(LlamaConfig(**sizes))
    settings = TrainSettings(
        rank=case.rank,
        row_tokens=ROW_TOKENS,
        clip_norm=0.5,
        device="cpu",
        activation_checkpointing=case.checkpointing,
    )
    model = prepare(awake(base.eval(), rank=case.rank), resolve(settings, Machine.here()))
    return TrainEngine(model, settings, world=world)


def train(engine: TrainEngine, samples: list[Sample], case: Case, world: World) -> tuple[dict[str, Any], Any]:
    """Everything that an engine can be asked for, by name; and what is logged."""
    loss = LossSettings(veto=0.0, kl_beta=case.kl_beta)
    sums = engine.forward_backward(samples, loss)
    gradients = {name: parameter.grad for name, parameter in engine._parameters.items()}
    found = {f"gradient/{name}": world.whole(each).clone() for name, each in gradients.items() if each is not None}
    norms = [engine.optim_step(1e-2)]
    engine.forward_backward(samples, loss)
    norms.append(engine.optim_step(1e-2))
    found |= {f"adapter/{name}": tensor for name, tensor in engine.adapter().items()}
    state = engine.state()
    found |= {name: tensor for name, tensor in state.items() if not name.startswith("adapter/")}
    logprobs = engine.logprobs(samples)
    replies = engine.generate(PROMPTS, sampling=SAMPLING)
    engine.optim_step(1e-2)
    engine.set_state(state)
    told = {
        "sums": msgspec.structs.asdict(sums) if isinstance(sums, msgspec.Struct) else vars(sums),
        "norms": norms,
        "base": engine.logprobs(samples, adapter=False),
        "logprobs": logprobs,
        "again": engine.logprobs(samples),
        "replies": [reply.ids for reply in replies],
        "poisoned": _poison(engine, samples, loss),
    }
    return found, told


def _poison(engine: TrainEngine, samples: list[Sample], loss: LossSettings) -> list[int]:
    """Which trajectories are named if the model makes no number of one of their tokens."""
    token = samples[0].token_ids[-1]
    embedding = engine.model.get_base_model().get_input_embeddings()

    def spoil(module: Any, ids: Any, output: Any) -> Any:
        return torch.where(ids[0][..., None] == token, torch.nan, output)

    hook = embedding.register_forward_hook(spoil)
    try:
        engine.forward_backward(samples, loss)
    except PoisonedSamples as error:
        return error.trajectories
    finally:
        hook.remove()
    return []


def main(folder: Path) -> None:
    """Every case of the folder, one after the other; the first process writes what came out."""
    from clawloop_server.trainer.distributed import Processes
    from clawloop_server.trainer.launch import find_seat

    torch.set_num_threads(1)
    seat = find_seat(os.environ)
    assert seat is not None
    processes = Processes(seat)
    for path in sorted(folder.glob("*.case")):
        case = msgspec.json.decode(path.read_bytes(), type=Case)
        samples = msgspec.msgpack.decode((folder / case.name).read_bytes(), type=list[Sample])
        tensors, told = train(build(case, processes), samples, case, processes)
        if seat.rank == 0:
            save_file(tensors, path.with_suffix(".safetensors"))
            path.with_suffix(".json").write_text(json.dumps(told))
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

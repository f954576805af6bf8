"""Our step beside the one of TRL's GRPO trainer, in one process: the same model, batch, adapter and threads.

Runs in TRL's environment (`python -m trainer_bench.trl_step`), which `trainer_bench.trl_home` makes, and prints a
Section as JSON. TRL gets the stored trajectories as its own users would give them, by a `rollout_func`, and lays out
its batch by itself. What is timed is its `_compute_loss` and the backward pass, and ours whole.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from clawloop_server.trainer.base import attach_adapter, load_base
from clawloop_shared.lora import LINEARS
from clawloop_shared.rows import Sample
from trainer_bench.engines import OPEN_LOSS, RANK, as_sampled, counted, gradients, open_engine, random_folder, settings
from trainer_bench.measure import in_turns
from trainer_bench.report import Section, equality, faster, row
from trainer_bench.shapes import QUICK, SMALL, ModelShape, call_work, multi_turn_batch

FASTER = 3.0
SECTION = "8 multi-turn trajectories"
THEIRS, OURS = "TRL", "clawloop"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    printed, sys.stdout = sys.stdout, sys.stderr  # TRL prints, too
    shape, scale = (QUICK, 8) if given.quick else (SMALL, 1)
    found = compare(shape, multi_turn_batch(vocab=shape.vocab, scale=scale), rounds=given.rounds, threads=given.threads)
    printed.buffer.write(msgspec.json.encode(found))


def compare(shape: ModelShape, samples: list[Sample], *, rounds: int, threads: int) -> Section:
    """Both in turns, and their gradients at ratio 1, where both define the same loss."""
    with random_folder(shape) as model_folder, tempfile.TemporaryDirectory() as output_folder:
        engine = open_engine(model_folder, settings(threads=threads, device="cpu"))
        model = attach_adapter(load_base(model_folder), rank=RANK, alpha=2.0 * RANK, target_modules=LINEARS, seed=0)
        model.load_state_dict(
            {name.replace(".weight", ".default.weight"): tensor for name, tensor in engine.adapter().items()},
            strict=False,
        )
        trainer = make_trainer(model, samples, folder=output_folder, vocab=shape.vocab)
        inputs = trl_batch(trainer)
    samples = as_sampled(engine, with_advantages(samples, inputs), drift=0.0)
    loss = msgspec.structs.replace(OPEN_LOSS, policy="cispo")

    def theirs() -> None:
        trainer.model.zero_grad(set_to_none=True)
        trainer._compute_loss(trainer.model, inputs).backward()

    def ours() -> None:
        engine.model.zero_grad(set_to_none=True)
        engine.forward_backward(samples, loss)

    computed = {}
    for name, run, of in ((THEIRS, theirs, trainer.model), (OURS, ours, engine.model)):
        with counted(of) as positions:
            run()
        computed[name] = positions.count
    equal = equality("TRL's and ours, CISPO at ratio 1", gradients(trainer.model), gradients(engine.model))
    times = in_turns({THEIRS: theirs, OURS: ours}, rounds=rounds)
    tokens = call_work(samples).tokens
    return Section(
        rows=[row(SECTION, name, times[name], tokens=tokens, computed=computed[name]) for name in times],
        equalities=[equal],
        targets=faster("real tokens a second, of TRL's", times[THEIRS], times[OURS], at_least=FASTER),
    )


def make_trainer(model: Any, samples: Sequence[Sample], *, folder: str, vocab: int) -> Any:
    """A GRPO trainer whose rollouts are the stored trajectories. Nothing in it samples or takes a step."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    firsts = [sample.trained[0] for sample in samples]

    def rollout(prompts: Sequence[str], _: Any) -> dict[str, Any]:
        assert len(prompts) == len(samples)
        masks = [
            [int(at in set(s.trained)) for at in range(first, len(s.token_ids))]
            for s, first in zip(samples, firsts, strict=True)
        ]
        return {
            "prompt_ids": [list(s.token_ids[:first]) for s, first in zip(samples, firsts, strict=True)],
            "completion_ids": [list(s.token_ids[first:]) for s, first in zip(samples, firsts, strict=True)],
            "logprobs": [[0.0] * len(mask) for mask in masks],
            "env_mask": masks,
        }

    def reward(prompts: Sequence[str], **_: Any) -> list[float]:
        return [float(number % 2) for number in range(len(prompts))]

    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=len(samples),
        num_generations=2,
        max_completion_length=1024,
        beta=0.0,
        loss_type="cispo",
        epsilon_high=2.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        save_strategy="no",
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"w{number + 2} w5"} for number in range(len(samples))]),
        processing_class=fast,
        rollout_func=rollout,
    )


def trl_batch(trainer: Any) -> dict[str, Any]:
    """What TRL makes of them for one step, as its own loop would."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch: dict[str, Any] = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return batch


def with_advantages(samples: Sequence[Sample], inputs: dict[str, Any]) -> list[Sample]:
    """The samples with the advantages that TRL gave them; it shuffles, so that they are found by their tokens."""
    masked = zip(inputs["completion_ids"], inputs["completion_mask"].bool(), inputs["advantages"].tolist(), strict=True)
    found = {tuple(ids[mask].tolist()): advantage for ids, mask, advantage in masked}
    advantages = [found[tuple(s.token_ids[s.trained[0] :])] for s in samples]
    return [replace(s, advantages=[a] * len(s.trained)) for s, a in zip(samples, advantages, strict=True)]


if __name__ == "__main__":
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    main()

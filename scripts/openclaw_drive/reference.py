"""A second opinion on kept logprobs: the model folder run by transformers and torch, teacher-forced, in float32.

Knows nothing of the edge: ids in, logprobs out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import transformers


def teacher_forced(
    model: torch.nn.Module, prompt_ids: list[int], *, response_ids: list[int], temperature: float
) -> list[float]:
    """logprob of each response id given all before it, under softmax(logits / temperature)."""
    ids = torch.tensor([prompt_ids + response_ids])
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=len(response_ids) + 1).logits[0, :-1]
        logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    found: list[float] = logprobs.gather(1, ids[0, -len(response_ids) :, None])[:, 0].tolist()
    return found


def largest_differences(folder: Path, steps: Iterable[tuple[list[int], list[int], list[float], float]]) -> list[float]:
    """For each (prompt ids, response ids, kept logprobs, temperature) the largest absolute difference in nats."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    found = []
    for prompt_ids, response_ids, kept, temperature in steps:
        again = teacher_forced(model, prompt_ids, response_ids=response_ids, temperature=temperature)
        found.append(max(abs(a - b) for a, b in zip(again, kept, strict=True)))
    return found

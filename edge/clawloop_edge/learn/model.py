"""The model that learns: logprobs of a sample's trained tokens, and the gradient of a weighted sum of them.

One sample at a time. The head runs only on the positions that predict a trained token, in chunks, one after another, so
that the logits of all of them never exist together; the layers keep their inputs and compute the rest again.
"""

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from clawloop_edge.errors import LearnFailed
from clawloop_edge.learn.attention import in_blocks
from clawloop_edge.learn.lora import Arrays, Learner
from clawloop_shared.rows import Sample

CHUNK_BYTES = 64 << 20
"""of float32 logits at once; with what is derived from them some four times as much"""
_PROBE = (0, 1, 2, 3, 5, 8)
_HEAD_TOLERANCE = 1e-3


class LearningModel:
    """The base, and on it the served adapter with what is learned beside it."""

    def __init__(self, base: Any, learner: Learner, *, vocabulary: int) -> None:
        """`base` has no adapter at all: what the loss stays near to.

        Raises:
            LearnFailed: the model's logits are not those of a plain head on its last hidden state.
        """
        self._base, self._learner = base, learner
        self._rows = max(1, CHUNK_BYTES // (4 * vocabulary))
        ids = mx.array([[number % vocabulary for number in _PROBE]])
        whole, ours = base(ids).astype(mx.float32), _head(base)(base.model(ids)).astype(mx.float32)
        if whole.shape != ours.shape or not bool((mx.abs(whole - ours).max() < _HEAD_TOLERANCE).item()):
            raise LearnFailed(
                f"a {type(base).__module__} model does more to its logits than a head; it cannot learn here"
            )

    def logprobs(self, sample: Sample, *, base: bool = False) -> tuple[list[float], float]:
        """Of each trained token at the sample's temperature, under what is learned or the bare base; and the sum of the
        policy's entropies there."""
        model = self._base if base else self._learner.model
        head = _head(model)
        with in_blocks(model):
            hidden_PD = _hidden(model, sample)
            mx.eval(hidden_PD)
        target_P = _targets(sample)
        found, entropy = list[float](), 0.0
        for at in range(0, len(sample.trained), self._rows):
            part = slice(at, at + self._rows)
            scores_CV = _scores(head, hidden_PD[part], sample.temperature)
            total_C = mx.logsumexp(scores_CV, axis=-1)
            chosen_C = mx.take_along_axis(scores_CV, target_P[part, None], axis=-1)[:, 0]
            entropy_C = total_C - (mx.softmax(scores_CV, axis=-1) * scores_CV).sum(-1)
            mx.eval(logprobs_C := chosen_C - total_C, entropies := entropy_C.sum())
            found += [float(logprob) for logprob in cast("list[float]", logprobs_C.tolist())]
            entropy += float(entropies.item())
        return found, entropy

    def gradient(self, sample: Sample, slope_P: Any, learned: Arrays) -> Arrays:
        """The gradient by `learned` of sum_t slope_t log pi(t) over the sample's trained tokens, evaluated."""

        def weighted(learned: Arrays) -> Any:
            self._learner.put(learned)
            model = self._learner.model
            return _weighted(_head(model), sample, slope_P, rows=self._rows)(_hidden(model, sample))

        try:
            with in_blocks(self._base):
                found: Arrays = mx.grad(weighted)(learned)
                mx.eval(list(found.values()))
        finally:
            self._learner.put(learned)
        return found

    def put(self, learned: Arrays) -> None:
        """Compute with these from now on."""
        self._learner.put(learned)


def _head(model: Any) -> Any:
    """hidden states -> logits."""
    return model.lm_head if "lm_head" in model else model.model.embed_tokens.as_linear


def _hidden(model: Any, sample: Sample) -> Any:
    """hidden_PD: what predicts each trained token. No token is read that nothing is predicted from."""
    hidden_TD = model.model(mx.array([list(sample.token_ids[: sample.trained[-1]])]))[0]
    return hidden_TD[mx.array([at - 1 for at in sample.trained])]


def _targets(sample: Sample) -> Any:
    return mx.array([sample.token_ids[at] for at in sample.trained])


def _scores(head: Any, hidden_CD: Any, temperature: float) -> Any:
    """As the engine has them when it samples."""
    logits_CV = head(hidden_CD).astype(mx.float32)
    return logits_CV if temperature == 1.0 else logits_CV / temperature


def _weighted(head: Any, sample: Sample, slope_P: Any, *, rows: int) -> Any:
    """hidden_PD -> sum_t slope_t log pi(t), whose backward pass goes through the head chunk by chunk.

    Each chunk waits for the one before: MLX would else be free to compute the logits of all of them first.
    """
    target_P = _targets(sample)
    parts: Sequence[slice] = [slice(at, at + rows) for at in range(0, len(sample.trained), rows)]

    def of_chunk(hidden_CD: Any, part: slice) -> Any:
        scores_CV = _scores(head, hidden_CD, sample.temperature)
        chosen_C = mx.take_along_axis(scores_CV, target_P[part, None], axis=-1)[:, 0]
        return (slope_P[part] * (chosen_C - mx.logsumexp(scores_CV, axis=-1))).sum()

    @mx.custom_function
    def weighted(hidden_PD: Any) -> Any:
        return sum(of_chunk(hidden_PD[part], part) for part in parts)

    @weighted.vjp
    def backward(hidden_PD: Any, cotangent: Any, _: Any) -> Any:
        found: list[Any] = []
        for part in parts:
            (hidden_CD,) = mx.depends([hidden_PD[part]], found[-1:]) if found else (hidden_PD[part],)
            found.append(mx.grad(of_chunk)(hidden_CD, part))
        return cotangent * mx.concatenate(found)

    return weighted

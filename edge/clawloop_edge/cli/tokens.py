"""A step's response token by token: the text of each, coloured by how likely it was. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from clawloop_edge.cli.context import shown
from clawloop_edge.engine.detokenizer import WindowDetokenizer

if TYPE_CHECKING:
    from clawloop_edge.pool.records import KeptStep

_COLOURS = ((0.8, ""), (0.4, "green"), (0.1, "yellow"), (0.0, "bold red"))
_MASKED = "dim strike"
_UNLIKELY = 5
Logprobs = Sequence[float | None]


def tokenizer_file(model: str) -> Path | None:
    """The tokenizer of a model given as a folder or a hub id, if it is on this disk. Nothing is fetched."""
    if not model:
        return None
    folder = Path(model).expanduser() / "tokenizer.json"
    if folder.is_file() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        return folder if folder.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "tokenizer.json")
    return Path(found) if isinstance(found, str) else None


def token_texts(file: Path, kept: KeptStep) -> list[str] | None:
    """The text that each token of the response completes, empty for a piece of a character.

    None if this tokenizer is not the one that the response was made with.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    pieces = WindowDetokenizer(lambda ids: str(backend.decode(list(ids), skip_special_tokens=False)), skip=frozenset())
    found = [pieces.add(token_id) for token_id in kept.step.response_ids]
    if found:
        found[-1] += pieces.finish()
    return found if kept.text in "".join(found) else None


def coloured(texts: Sequence[str], logprobs: Logprobs) -> Text:
    """The response, each token in the colour of its probability."""
    line = Text()
    waiting: list[float | None] = []
    for text, logprob in zip(texts, logprobs, strict=True):
        waiting.append(logprob)
        if text:
            line.append_text(shown(text, style=_style(waiting)))
            waiting = []
    return line


def legend() -> Text:
    """What the colours mean."""
    found = Text("probability: ", style="dim")
    names = ("0.8 and more", "0.4 and more", "0.1 and more", "less")
    for (_, style), name in zip(_COLOURS, names, strict=True):
        found.append(f" {name} ", style=style or "none")
    return found


def _style(logprobs: Sequence[float | None]) -> str:
    known = [one for one in logprobs if one is not None]
    if len(known) < len(logprobs):
        return _MASKED
    return next(style for least, style in _COLOURS if math.exp(min(known)) >= least)


def summary(texts: Sequence[str] | None, logprobs: Logprobs) -> str:
    """How many tokens there are, how likely they were, and which were the least likely."""
    known = [one for one in logprobs if one is not None]
    if not known:
        return f"{len(logprobs)} tokens, no logprobs"
    mean = sum(known) / len(known)
    line = f"{len(logprobs)} tokens, mean logprob {mean:.3f}, perplexity {math.exp(-mean):.2f}"
    ranked = sorted((one, text) for one, text in zip(logprobs, texts or (), strict=False) if one is not None and text)
    least = [f"{text!r} {math.exp(one):.3g}" for one, text in ranked[:_UNLIKELY] if math.exp(one) < _COLOURS[1][0]]
    return f"{line}; least likely: {', '.join(least)}" if least else line


def rows(kept: KeptStep, texts: Sequence[str] | None) -> Iterator[tuple[object, ...]]:
    """Each token's place, id, text and logprob."""
    step = kept.step
    for at, (token_id, logprob) in enumerate(zip(step.response_ids, step.response_logprobs, strict=True)):
        text = repr(texts[at]) if texts is not None else ""
        yield at, token_id, text, "masked" if logprob is None else f"{logprob:.4f}"


def tokens_shown(kept: KeptStep, texts: Sequence[str] | None) -> list[RenderableType]:
    """The response in colours, and what is to be said of it."""
    logprobs = kept.step.response_logprobs
    told = shown(summary(texts, logprobs), style="dim")
    return [coloured(texts, logprobs), legend(), told] if texts is not None else [told]

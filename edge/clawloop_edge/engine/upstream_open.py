"""Finding out what an upstream server is: exact where it proves to be, else a server of texts.

One request decides, and says all that later calls say: a conversation in the model folder's own template, as text. An
exact server returns the very ids that our tokenizer makes of it, and an id and a logprob of what it sampled.
"""

import logging
from pathlib import Path

from clawloop_edge.engine.protocol import ChatTokenizer, Engine, TextEngine
from clawloop_edge.engine.upstream import Completion, UpstreamEngine, sampling_fields
from clawloop_edge.engine.upstream_http import ModelCard, Upstream
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.engine.upstream_text import UpstreamTextEngine
from clawloop_edge.errors import EngineGone, RequestError
from clawloop_shared.errors import ClawloopError, ConfigError
from clawloop_shared.model_line import read_line
from clawloop_shared.records import Sampling

_LOG = logging.getLogger(__name__)
_PROBE = [{"role": "system", "content": "Probe 12345, naïve café 東京 😀"}, {"role": "user", "content": "  a\n\tb"}]


async def open_upstream(
    settings: UpstreamSettings, *, folder: Path | None = None, keep_versions: int = 3
) -> Engine | TextEngine:
    """The engine on the server at `settings.url`; exact needs the `folder` of its model (weights are only hashed).

    A server of texts may be away now and come later; an exact one has to be there.

    Raises:
        ConfigError: no usable address or key, or no model is named and the server does not say which it has.
        EngineGone: the server of an exact engine cannot be reached.
    """
    upstream = Upstream(settings)
    try:
        return await _open(upstream, settings, folder=folder, keep_versions=keep_versions)
    except BaseException:
        await upstream.close()
        raise


async def served_model(settings: UpstreamSettings) -> str:
    """The model that a server has: the one that is named, else its first. Raises ClawloopError."""
    upstream = Upstream(settings)
    try:
        return _chosen(await upstream.models(), settings.model).id
    finally:
        await upstream.close()


async def _open(
    upstream: Upstream, settings: UpstreamSettings, *, folder: Path | None, keep_versions: int
) -> Engine | TextEngine:
    exact = folder is not None and settings.ids == "auto"
    card = await _card(upstream, settings.model, needed=exact)
    note = ""
    if exact and folder is not None:
        from clawloop_edge.engine.tokenizer import HfChatTokenizer

        tokenizer = HfChatTokenizer(folder)
        note = await _inexact(upstream, card.id, tokenizer)
        if not note:
            if card.max_model_len:
                tokenizer.context_length = min(tokenizer.context_length, card.max_model_len)
            line = read_line(folder)
            return UpstreamEngine(
                upstream, card.id, line=line, tokenizer=tokenizer, settings=settings, keep_versions=keep_versions
            )
        _LOG.warning("the upstream server is served and kept, and nothing is learned: %s", note)
    return UpstreamTextEngine(upstream, card.id, context_length=card.max_model_len or 0, note=note)


async def _card(upstream: Upstream, model: str, *, needed: bool) -> ModelCard:
    """What the server says of its model; only the name where it says nothing."""
    if not (model.isascii() and model.isprintable()):
        raise ConfigError(f"[upstream] model = {model!r}; it goes into headers, so it is printable ASCII")
    try:
        return _chosen(await upstream.models(), model)
    except EngineGone:
        if needed or not model:
            raise
    except ClawloopError as error:
        if not model:
            raise ConfigError(
                f"the upstream server does not say which models it has ({error}); set [upstream] model"
            ) from error
    return ModelCard(model)


def _chosen(cards: list[ModelCard], model: str) -> ModelCard:
    if model:
        return next((card for card in cards if card.id == model), ModelCard(model))
    base = next((card for card in cards if not card.parent), None)
    if base is None or not (base.id.isascii() and base.id.isprintable()):
        raise ConfigError("the upstream server names no model, or not in ASCII; set [upstream] model")
    return base


async def _inexact(upstream: Upstream, model: str, tokenizer: ChatTokenizer) -> str:
    """Why a server is not exact; empty if it is. Raises EngineError: it could not be asked."""
    text = tokenizer.render(_PROBE, None)
    fields = sampling_fields(Sampling(), stops=sorted(tokenizer.eos_ids))
    body = {**fields, "model": model, "prompt": text, "max_tokens": 1, "logprobs": 0}
    try:
        reply = await upstream.ask("completions", body, Completion)
    except RequestError as error:
        return f"inexact: it refuses what an exact call has to say ({error})"
    choice = reply.choices[0] if reply.choices else None
    if choice is None or choice.prompt_token_ids is None or not choice.token_ids:
        return "inexact: it returns no token ids (vLLM does from 0.10.2 on)"
    if choice.prompt_token_ids != tokenizer.encode(text):
        return "inexact: its tokenizer is not that of the folder that [model] path names"
    if choice.logprobs is None or len(choice.logprobs.token_logprobs) != len(choice.token_ids):
        return "inexact: it returns no logprobs"
    return ""

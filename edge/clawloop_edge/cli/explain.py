"""`explain`: everything that is known of a step."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.table import Table

from clawloop_edge.cli.context import (
    Json,
    console,
    home_of,
    opened_pool,
    print_json,
    print_table,
    shown,
    the_step,
    when,
)
from clawloop_edge.cli.curate import told_of
from clawloop_edge.cli.doctor import MENDS
from clawloop_edge.cli.moments import lasted, told
from clawloop_edge.cli.transcript import judged, trainable, whereabouts
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from clawloop_edge.pool.curation import Curated
    from clawloop_edge.pool.reading import Reading
    from clawloop_edge.pool.records import KeptStep
    from clawloop_edge.pool.store import Pool
    from clawloop_edge.privacy.items import OutboxItem
    from clawloop_shared.records import Signal, Step
    from clawloop_shared.signals import Account, RewardRules

_NO_CUT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}
"""sampling that is not worth a word"""
_TOGETHER = 1000
"""so many steps of one run or trajectory are looked at for what rewards it"""


@dataclass(frozen=True)
class Explained:
    """A step and what is known of it; `account` tells how the reward comes about that it has with its trajectory,
    `curated` what its owner said of it."""

    kept: KeptStep
    title: str
    signals: list[Signal]
    account: Account
    curated: Curated
    items: list[OutboxItem]


def explain(
    context: typer.Context,
    step_ids: Annotated[
        list[str], typer.Argument(help="Completion ids that the agent got; beginnings do.", metavar="STEP...")
    ],
    ids: Annotated[bool, typer.Option("--ids", help="List each token's id and logprob.")] = False,
    rescore: Annotated[
        bool, typer.Option(help="Load the model and compare the kept logprobs with teacher-forced ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """A step: its tokens and logprobs, its policy, its signals, why it may (not) be learned from, where it went.

    `--json` prints one object, or a list of them if several steps were named.
    """
    rules = home_of(context).load_config().reward
    with opened_pool(context) as pool:
        explained = [_explained(pool, the_step(context, pool, start), rules) for start in step_ids]
    found = [_as_json(one) for one in explained]
    if rescore:
        from clawloop_edge.rescore import rescore_steps

        worst = rescore_steps(home_of(context).require(), [one.kept for one in explained])
        for each, difference in zip(found, worst, strict=True):
            each["max_abs_difference"] = difference
    if as_json:
        print_json(found if len(step_ids) > 1 else found[0])
        return
    file = _tokenizer(context)
    for one, each in zip(explained, found, strict=True):
        _print(one, file=file, ids=ids, difference=each.get("max_abs_difference"))


def facts(kept: KeptStep, *, tokens: bool) -> dict[str, Any]:
    """What there is to tell of a step, as JSON values."""
    step = kept.step
    found: dict[str, Any] = {
        "step_id": step.step_id,
        "session_id": step.session_id,
        "run_id": step.run_id,
        "parent_id": step.parent_id,
        "trajectory_id": step.trajectory_id,
        "group_id": step.group_id,
        "kind": kept.kind,
        "app": kept.app,
        "channel": step.channel,
        "adapter_version": step.policy.version,
        "model_line": step.policy.line,
        "temperature": step.sampling.temperature,
        "sampling": step.sampling,
        "finish_reason": step.finish_reason,
        "trainable": step.trainable,
        "untrainable": step.untrainable,
        "prompt_tokens": len(step.prompt_ids),
        "response_tokens": len(step.response_ids),
        "text": kept.text,
        "reply": kept.reply,
        "created_ms": step.created_ms,
        "first_token_ms": kept.first_token_ms,
        "finished_ms": kept.finished_ms,
    }
    if tokens:
        found["prompt_ids"] = step.prompt_ids
        found["response_ids"] = step.response_ids
        found["response_logprobs"] = step.response_logprobs
    return found


def _as_json(one: Explained) -> dict[str, Any]:
    found = {**facts(one.kept, tokens=True), "title": one.title, "signals": one.signals}
    found |= {"reward": one.account.reward, "voices": one.account.voices, "curation": one.curated}
    return {**found, "sent": one.items}


def _explained(pool: Pool, step_id: str, rules: RewardRules) -> Explained:
    from clawloop_edge.pool.curation import Curations
    from clawloop_edge.privacy.outbox import Outbox
    from clawloop_shared.signals import account_of

    with pool.reading() as reading:
        kept = reading.kept(step_id)
        if kept is None:  # it was forgotten between being named and being read
            raise ConfigError(f"no step {step_id} is kept here")
        session = reading.session(kept.step.session_id)
        signals = reading.signals([kept.step])
        account = account_of(_rewarding(reading, kept.step), rules)
        curated = Curations(reading.database, reading.keyring).of(kept.step)
    title, items = session.title if session else "", Outbox.items_with(pool, step_id)
    return Explained(kept, title, signals, account, curated, items)


def _rewarding(reading: Reading, step: Step) -> list[Signal]:
    """The signals that reward a step: those on all that it is rewarded with."""
    place = step.trajectory_id, step.channel, step.group_id
    lines = reading.rewarded_with(step, limit=_TOGETHER)
    return reading.signals([one for one in lines if (one.trajectory_id, one.channel, one.group_id) == place])


def _print(one: Explained, *, file: Path | None, ids: bool, difference: float | None) -> None:
    """`file`: the tokenizer, if it is at hand."""
    from clawloop_edge.cli.tokens import rows, token_texts, tokens_shown

    kept, now = one.kept, datetime.now()
    console.print(shown(one.title or "(no title)", style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in [*_lineage(kept), *_making(kept, now), *_fate(one, now, difference)]:
        if value:
            grid.add_row(name, shown(value))
    console.print(grid)
    if one.account.reward is None:
        heard = "no signal that counts" if one.account.voices else "no signal yet"
        console.print(f"{heard}: not trainable yet" if kept.step.trainable else heard)
    texts = token_texts(file, kept) if file else None
    console.print()
    if texts is None and kept.text:
        console.print(shown(kept.text))
    for line in tokens_shown(kept, texts):
        console.print(line)
    if ids:
        print_table(
            ("", "id", "text", "logprob"), list(rows(kept, texts)), empty="no token", whole={"", "id", "logprob"}
        )
    elif kept.step.response_ids:
        console.print("[dim]--ids lists every token[/dim]")
    console.print()


Facts = list[tuple[str, str]]


def _lineage(kept: KeptStep) -> Facts:
    step = kept.step
    return [
        ("step", step.step_id),
        ("session", step.session_id),
        ("goes on from", step.parent_id),
        ("run", step.run_id),
        ("trajectory", " in group ".join(filter(None, (step.trajectory_id, step.group_id)))),
        ("kind", f"{kept.kind}, from {kept.app or 'an unknown program'}"),
        ("channel", str(step.channel)),
    ]


def _making(kept: KeptStep, now: datetime) -> Facts:
    step, took_ms = kept.step, kept.finished_ms - kept.started_ms
    first = f", first token after {lasted(kept.first_token_ms - kept.started_ms)}" if kept.first_token_ms else ""
    speed = f", {len(step.response_ids) * 1000 / took_ms:.0f} tokens/s" if took_ms > 0 and step.response_ids else ""
    adapter = f"adapter {step.policy.version}" if step.policy.version else "the base, without an adapter"
    sampling = {"temperature": step.sampling.temperature} | {
        name: value for name, value in msgspec.structs.asdict(step.sampling).items() if value != _NO_CUT.get(name, -1)
    }
    return [
        ("when", f"{when(kept.started_ms)} ({told(kept.started_ms, now=now)})"),
        ("took", f"{lasted(took_ms)}{first}{speed}"),
        ("policy", f"{adapter}, model line {step.policy.line}"),
        ("sampling", ", ".join(f"{name} {value:g}" for name, value in sampling.items())),
        ("tokens", f"{len(step.prompt_ids):,} in, {len(step.response_ids):,} out; ended by {step.finish_reason}"),
    ]


def _fate(one: Explained, now: datetime, difference: float | None) -> Facts:
    step = one.kept.step
    judgements = (
        f"{judged([each])} (on the {each.target}, {told(each.created_ms, now=now)}, weight {each.weight:g})"
        for each in one.signals
    )
    return [
        ("trainable", "no (you said so)" if step.trainable and one.curated.trainable is False else trainable(step)),
        ("you said", told_of(one.curated)),
        ("what to do", MENDS.get(step.untrainable, "")),
        ("signals", "\n".join(judgements)),
        ("reward", _reward(one.account)),
        ("went", whereabouts(one.items, now=now)),
        ("rescored", "" if difference is None else f"at most {difference:.2g} nats off"),
    ]


def _reward(account: Account) -> str:
    """The reward and its voices, one a line; empty without a reward."""
    if account.reward is None:
        return ""
    lines = [f"{account.reward.value:+.3g}, weight {account.reward.weight:.3g}"]
    for voice in account.voices:
        words = f"{voice.words} signals" if voice.words > 1 else "1 signal"
        sure = f"weight {voice.weight:.3g} x factor {voice.factor:.3g}"
        lines.append(f"{voice.source} {voice.value:+.3g} ({words}, {sure}): {voice.share:.0%} of it")
    return "\n".join(lines)


def _tokenizer(context: typer.Context) -> Path | None:
    """The tokenizer of the configured model, if it is on this disk."""
    from clawloop_edge.cli.tokens import tokenizer_file

    return tokenizer_file(home_of(context).load_config().model.path)


def register(app: typer.Typer) -> None:
    app.command()(explain)

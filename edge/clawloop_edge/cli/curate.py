"""`curate`: the owner's word on steps, runs and sessions, and the steps that are picked by it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer
from rich.table import Table
from typer.core import TyperGroup

from clawloop_edge.cli.context import (
    App,
    Json,
    Limit,
    Since,
    Until,
    command,
    console,
    home_of,
    opened_pool,
    print_json,
    shown,
    the_session,
    time_range,
)
from clawloop_edge.cli.moments import told
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.pool.curation import Curated
    from clawloop_edge.pool.picking import Picked, Seen
    from clawloop_edge.pool.store import Pool
    from clawloop_shared.records import Target

_SAY = "say"
_NAMED = 6
YesNo = Literal["yes", "no"]
Tag = Annotated[list[str] | None, typer.Option("--tag", help="With this tag; may be repeated: with all of them.")]
QualityMin = Annotated[int | None, typer.Option("--quality-min", min=0, max=5, help="Of this quality or a better.")]
Trainable = Annotated[
    YesNo | None, typer.Option("--trainable", help="May (not) be learned from: exact, and not taken out by you.")
]
Channel = Annotated[Literal["train", "val"] | None, typer.Option("--channel", help="Of this channel.")]
RewardMin = Annotated[float | None, typer.Option("--reward-min", min=-1, max=1, help="Of this reward or a higher.")]
RewardMax = Annotated[float | None, typer.Option("--reward-max", min=-1, max=1, help="Of this reward or a lower.")]


class _Words(TyperGroup):
    """`curate WHAT ...` without a verb is the word itself."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [_SAY, *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_Words,
    no_args_is_help=True,
    help="Say what may be learned from, and what is good: curate STEP|RUN|SESSION [--trainable yes|no] [--quality N] "
    "[--tag T] [--untag T] [--note TEXT]. Training obeys.",
)


@group.command(_SAY)
def say(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="A step, a run or a session; its beginning is enough.")],
    trainable: Annotated[YesNo | None, typer.Option("--trainable", help="Whether it may be learned from.")] = None,
    quality: Annotated[int | None, typer.Option("--quality", min=0, max=5, help="0 (bad) to 5 (a model).")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Give it a tag; may be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option("--untag", help="Take a tag away; may be repeated.")] = None,
    note: Annotated[str | None, typer.Option("--note", help="A note of your own; an empty one takes it away.")] = None,
    as_json: Json = False,
) -> None:
    """Say something of a step, a run or a whole session. `curate WHAT` is short for it; the last word holds.

    What is not trainable does not leave any more; where it had left, the server is told. What is not token-exact
    cannot be made trainable. Without an option it shows what was said.
    """
    from clawloop_edge.pool.curation import Word, curate, flat

    word = Word(
        trainable=None if trainable is None else trainable == "yes",
        quality=quality,
        tags=tag or [],
        untags=untag or [],
        note=note,
    )
    with opened_pool(context) as pool:
        target, target_id = the_target(context, pool, what)
        if word != Word():
            curate(pool, target, target_id, word=word).result()
        holds, words = _standing(pool, target, target_id)
    if as_json:
        history = [flat(each) for each in words]
        print_json({"target": target, "target_id": target_id, "curation": holds, "words": history})
        return
    console.print(shown(f"{target} {target_id}: {told_of(holds) or 'nothing was said of it'}"))


@group.command("list")
def list_steps(
    context: typer.Context,
    tag: Tag = None,
    quality_min: QualityMin = None,
    trainable: Trainable = None,
    channel: Channel = None,
    app: App = "",
    session: Annotated[list[str] | None, typer.Option("--session", help="Of this session; may be repeated.")] = None,
    since: Since = "",
    until: Until = "",
    no_signal: Annotated[bool, typer.Option("--no-signal", help="Of which no signal says anything.")] = False,
    source: Annotated[str, typer.Option("--source", help="Of which this source says something.")] = "",
    reward_min: RewardMin = None,
    reward_max: RewardMax = None,
    before: Annotated[int | None, typer.Option("--before", min=1, help="Before this place; printed if more.")] = None,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """The steps that are so, latest first: what was said of them, and the reward that they have."""
    from clawloop_edge.pool.picking import page

    options = {name: value for name, value in context.params.items() if name not in ("before", "as_json", "limit")}
    with opened_pool(context) as pool:
        sessions = [the_session(context, pool, start) for start in session or ()]
        picked = picked_by(options, sessions=sessions)
        rules = home_of(context).require().load_config().reward
        found = page(pool, picked, rules=rules, limit=limit, before_seq=before)
    if as_json:
        print_json({"steps": [seen.facts() for seen in found.steps], "next": found.next})
        return
    now = datetime.now()
    more = " so far" if found.next else ""
    console.print(_listing(found.steps, now=now) if found.steps else f"no step is like that{more}")
    if found.next:
        again = " ".join(["curate list", *given(options), f"--before {found.next}"])
        typer.echo(shown(f"more: {command(home_of(context), again)}"))


def picked_by(options: dict[str, Any], *, sessions: list[str]) -> Picked:
    """The filter that options of a command make; `sessions` are whole ids.

    Raises:
        ConfigError: a time is none.
    """
    from clawloop_edge.pool.picking import Picked
    from clawloop_shared.records import Channel

    since_ms, until_ms = time_range(options["since"], options["until"])
    channel, trainable = options["channel"], options["trainable"]
    return Picked(
        sessions=sessions,
        app=options["app"],
        channel=Channel(channel) if channel else None,
        since_ms=since_ms,
        until_ms=until_ms,
        tags=list(options["tag"] or ()),
        quality_min=options["quality_min"],
        trainable=None if trainable is None else trainable == "yes",
        judged=False if options["no_signal"] else None,
        source=options["source"],
        reward_min=options["reward_min"],
        reward_max=options["reward_max"],
    )


def given(options: dict[str, Any]) -> list[str]:
    """Options as they are typed again."""
    words = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] * value
        elif value not in (None, ""):
            many = value if isinstance(value, list | tuple) else [value]
            words += [f"{option} {shlex.quote(str(each))}" for each in many]
    return words


def the_target(context: typer.Context, pool: Pool, start: str) -> tuple[Target, str]:
    """The step, session or run that begins so.

    Raises:
        ConfigError: there is none, or there are several.
    """
    from clawloop_edge.pool.names import runs_named, steps_named
    from clawloop_shared.records import Target

    with pool.read() as database:
        steps = steps_named(database, start, limit=_NAMED)
        runs = runs_named(database, start, limit=_NAMED)
    if len(steps) == 1:
        return Target.STEP, steps[0]
    if steps:
        raise ConfigError(f"several steps begin with {start}: {', '.join(steps)}; give more of it")
    if len(runs) == 1 and runs[0] == start:
        return Target.RUN, start
    try:
        return Target.SESSION, the_session(context, pool, start)
    except ConfigError:
        if len(runs) != 1:
            raise
    return Target.RUN, runs[0]


def _standing(pool: Pool, target: Target, target_id: str) -> tuple[Curated, list[Any]]:
    """What holds for a target, and all that was said of it: of a step, also what was said of its run and session."""
    from clawloop_edge.pool.curation import Curations, fold
    from clawloop_shared.records import Target

    with pool.reading() as reading:
        known = Curations(reading.database, reading.keyring)
        link = reading.link(target_id) if target is Target.STEP else None
        words = known.words(link) if link else known.on(target, target_id)
    return fold(words), words


def told_of(curated: Curated) -> str:
    """What was said of a step, in a few words; empty if nothing was."""
    learned = {None: "", True: "trainable, as far as it is exact", False: "not trainable"}[curated.trainable]
    quality = "" if curated.quality is None else f"quality {curated.quality}"
    tags = f"tags {', '.join(curated.tags)}" if curated.tags else ""
    note = f'"{curated.note}"' if curated.note else ""
    return "; ".join(filter(None, (learned, quality, tags, note)))


def _listing(steps: Sequence[Seen], *, now: datetime) -> Table:
    """Two lines a step: its whole id and reward; then its agent, whether it is learned from, and what was said."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("when", no_wrap=True)
    table.add_column("step, and what you said of it", overflow="fold")
    table.add_column("reward", overflow="fold")
    for seen in steps:
        line = seen.line
        sources = ", ".join(sorted({signal.source for signal in seen.signals}))
        reward = f"{seen.reward.value:+.2f} ({sources})" if seen.reward else ""
        table.add_row(told(line.at_ms, now=now), shown(line.step_id, style="bold"), shown(reward))
        learned = "trainable" if seen.trainable else f"not trainable ({line.untrainable or 'you said so'})"
        said = told_of(msgspec.structs.replace(seen.curated, trainable=None))
        table.add_row("", shown(" · ".join(filter(None, (line.app, learned, said))), style="dim"))
    return table


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="curate")

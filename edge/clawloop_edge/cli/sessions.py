"""`sessions` and `explain`: looking at what was kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from clawloop_edge.cli.context import (
    Json,
    Limit,
    command,
    console,
    home_of,
    opened_pool,
    print_json,
    print_table,
    shown,
    when,
)
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.pool.records import KeptStep
    from clawloop_shared.records import Signal, Step

group = typer.Typer(help="Look at what was kept.", no_args_is_help=True)


@group.command("list")
def list_sessions(context: typer.Context, limit: Limit = 50, as_json: Json = False) -> None:
    """The latest sessions, newest first."""
    with opened_pool(context) as pool:
        found = pool.sessions(limit=limit)
    if as_json:
        print_json(found)
        return
    rows = [(s.session_id, s.title, s.app, s.steps, s.trainable, when(s.last_ms)) for s in found]
    print_table(
        ("session", "title", "app", "steps", "trainable", "last"),
        rows,
        empty="nothing was kept yet; call the edge",
        whole={"session"},
        clipped={"title"},
    )


@group.command("show")
def show_session(
    context: typer.Context,
    session_id: Annotated[str, typer.Argument(help="As `list` prints it.")],
    as_json: Json = False,
) -> None:
    """One session: every step with what was said, in order."""
    with opened_pool(context) as pool:
        steps = pool.session_steps(session_id)
    if not steps:
        listing = command(home_of(context), "sessions list")
        raise ConfigError(f"no session {session_id}; `{listing}` shows those that are kept")
    if as_json:
        print_json([facts(kept, tokens=False) for kept in steps])
        return
    for kept in steps:
        step = kept.step
        console.rule(f"{step.step_id} · {kept.kind} · adapter {step.policy.version} · {when(step.created_ms)}")
        console.print(shown(_asked(kept)), style="dim")
        console.print(shown(kept.text))
        console.print(shown(f"trainable: {_trainable(step)}"), style="dim")


def _trainable(step: Step) -> str:
    """Whether a step may be learned from, in the words that its caller got."""
    return "yes" if step.trainable else f"no ({step.untrainable})"


def _asked(kept: KeptStep) -> str:
    """The last thing that a step was told, without what OpenClaw puts around it."""
    from clawloop_edge.sessions.tree import text_of, user_texts

    for message in reversed(kept.messages):
        role, content = message.get("role"), message.get("content")
        text = "\n".join(user_texts(content)) if role == "user" else text_of(content) if role == "tool" else ""
        if text:
            return f"{role}: {text}"
    return ""


def explain(
    context: typer.Context,
    step_ids: Annotated[list[str], typer.Argument(help="Completion ids that the agent got.", metavar="STEP...")],
    rescore: Annotated[
        bool, typer.Option(help="Load the model and compare the kept logprobs with teacher-forced ones.")
    ] = False,
    as_json: Json = False,
) -> None:
    """A step: its tokens and logprobs, its policy, its signals, why it may (not) be learned from, where it went.

    `--json` prints one object, or a list of them if several steps were named.
    """
    from clawloop_edge.privacy.outbox import Outbox

    explained: list[tuple[dict[str, Any], KeptStep]] = []
    with opened_pool(context) as pool:
        for step_id in step_ids:
            kept = pool.get_step(step_id)
            if kept is None:
                raise ConfigError(f"no step {step_id} is kept here")
            found = facts(kept, tokens=True)
            found["signals"] = [msgspec.to_builtins(s) for s in _signals(pool, kept)]
            found["sent"] = Outbox.items_with(pool, step_id)
            explained.append((found, kept))
    if rescore:
        from clawloop_edge.rescore import rescore_steps

        worst = rescore_steps(context.obj.require(), [kept for _, kept in explained])
        for (found, _), difference in zip(explained, worst, strict=True):
            found["max_abs_difference"] = difference
    if as_json:
        print_json([found for found, _ in explained] if len(step_ids) > 1 else explained[0][0])
        return
    for found, kept in explained:
        _print_explained(found, kept)


def _signals(pool: Any, kept: KeptStep) -> list[Signal]:
    found: list[Signal] = pool.signals([kept.step])
    return found


def _print_explained(found: dict[str, Any], kept: KeptStep) -> None:
    hidden = {"response_ids", "response_logprobs", "signals", "prompt_ids", "untrainable"}
    told = {**found, "trainable": _trainable(kept.step)}
    print_table(("what", "is"), [(k.replace("_", " "), v) for k, v in told.items() if k not in hidden], empty="")
    tokens = zip(kept.step.response_ids, kept.step.response_logprobs, strict=True)
    print_table(("token id", "logprob"), [(i, f"{p:.4f}") for i, p in tokens], empty="")
    rows = [(s["source"], s["value"], s.get("weight", 1.0), s["target"]) for s in found["signals"]]
    waits = ": it is learned from once it was judged" if kept.step.trainable else ""
    print_table(("signal", "value", "weight", "on"), rows, empty=f"no feedback yet{waits}")


def facts(kept: KeptStep, *, tokens: bool) -> dict[str, Any]:
    """What there is to tell of a step, as JSON values."""
    step = kept.step
    found: dict[str, Any] = {
        "step_id": step.step_id,
        "session_id": step.session_id,
        "run_id": step.run_id,
        "parent_id": step.parent_id,
        "kind": kept.kind,
        "app": kept.app,
        "channel": step.channel,
        "adapter_version": step.policy.version,
        "model_line": step.policy.line,
        "temperature": step.sampling.temperature,
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


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="sessions")
    app.command()(explain)

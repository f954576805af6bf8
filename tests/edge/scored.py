"""Cases for scorers that read a conversation."""

from pathlib import Path
from typing import Any

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.signals.protocol import Case, Moment
from clawloop_shared.records import Policy, Sampling, Step, Target


def kept(messages: list[dict[str, Any]], reply: str, *, prompt_ids: list[int] | None = None) -> KeptStep:
    """A step that answered these messages."""
    step = Step(
        step_id="step-1",
        session_id="session-1",
        run_id="run-1",
        prompt_ids=prompt_ids or [1, 2, 3],
        response_ids=[4, 5],
        response_logprobs=[-0.5, -0.5],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )
    message = {"role": "assistant", "content": reply}
    return KeptStep(step=step, messages=messages, reply=message, started_ms=1, finished_ms=2, app="app")


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def case(
    question: str = "What is the capital of Australia?",
    answer: str = "Sydney.",
    *,
    said: str | list[dict[str, Any]] = "",
    earlier: tuple[tuple[str, str], ...] = (),
    moment: Moment = Moment.FOLLOWED,
    prompt_ids: list[int] | None = None,
) -> Case:
    """One run, what was said before it (question and answer by turns), and what came after it."""
    before = [m for asked, told in earlier for m in (user(asked), {"role": "assistant", "content": told})]
    messages = [{"role": "system", "content": "You help."}, *before, user(question)]
    following = ([user(said)] if said else []) if isinstance(said, str) else said
    return Case(
        moment=moment,
        target=Target.RUN,
        target_id="run-1",
        steps=[kept(messages, answer, prompt_ids=prompt_ids)],
        following=following,
        following_step_id="step-2" if following else "",
        earlier=[asked for asked, _ in earlier],
    )


def settings_of(*, engine: Any = None, border: Any = None, port: int = 0, **scorers: Any) -> Any:
    """What a scorer sees of its edge: these settings, no model, nothing that may leave."""
    from clawloop_edge.signals.registry import Deps
    from clawloop_edge.signals.settings import SignalsSettings

    return Deps(settings=SignalsSettings(**scorers), engine=engine, folder=Path("/nowhere"), border=border, port=port)

"""What the tests of pool and privacy share: a key, an open pool, and steps to keep."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.records import Policy, Sampling, Signal, Step, Target

MakeKept = Callable[..., KeptStep]
MakeSignal = Callable[..., Signal]


@pytest.fixture
def key() -> bytes:
    """A key-encryption key."""
    return bytes(range(32))


@pytest.fixture
def pool(tmp_path: Path, key: bytes) -> Iterator[Pool]:
    """An empty open pool in `tmp_path`, closed at the end."""
    with Pool.open(tmp_path, key) as opened:
        yield opened


@pytest.fixture
def make_kept() -> MakeKept:
    """`make_kept(session="s", words="hello", prompt=[1, 2], messages=None, untrainable="", **fields)`."""

    def make(
        *,
        session: str = "session-1",
        words: str = "hello",
        prompt: list[int] | None = None,
        response: list[int] | None = None,
        messages: list[dict[str, Any]] | None = None,
        parent: str = "",
        untrainable: str = "",
        **fields: Any,
    ) -> KeptStep:
        ids = response or [7, 8, 9]
        step = Step(
            step_id=new_step_id(),
            session_id=session,
            run_id=f"run-{session}",
            prompt_ids=prompt or [1, 2, 3, 4],
            response_ids=ids,
            response_logprobs=[-0.25] * len(ids),
            policy=Policy(line="line"),
            sampling=Sampling(),
            finish_reason="stop",
            created_ms=1000,
            parent_id=parent,
            untrainable=untrainable,
        )
        defaults: dict[str, Any] = {
            "messages": messages or [{"role": "user", "content": words}],
            "reply": {"role": "assistant", "content": f"echo {words}"},
            "text": f"echo {words}<|im_end|>",
            "app": "agent",
            "started_ms": 1000,
            "finished_ms": 2000,
        }
        return KeptStep(step=step, **(defaults | fields))

    return make


@pytest.fixture
def make_signal() -> MakeSignal:
    """`make_signal(step_id, value=1.0, **fields)`."""

    def make(target_id: str, *, target: Target = Target.STEP, value: float = 1.0, comment: str = "") -> Signal:
        return Signal(
            signal_id=new_id(),
            target=target,
            target_id=target_id,
            source="user",
            value=value,
            created_ms=1,
            comment=comment,
        )

    return make

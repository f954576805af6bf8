"""Steps to keep, for tests of what is done with them afterwards."""

from typing import Any

from clawloop_edge.pool.records import KeptStep
from clawloop_shared.ids import new_step_id
from clawloop_shared.records import Policy, Sampling, Step


def kept_step(session: str = "s1", *, at_ms: int = 1000, **fields: Any) -> KeptStep:
    """A trainable step that says hello; `fields` of `Step` and `KeptStep` replace its own."""
    step: dict[str, Any] = {
        "step_id": new_step_id(),
        "session_id": session,
        "run_id": f"run-{session}",
        "prompt_ids": [1, 2, 3],
        "response_ids": [70_000, 5],
        "response_logprobs": [-0.1, -2.5],
        "policy": Policy("line", 3, "abc"),
        "sampling": Sampling(temperature=0.5),
        "finish_reason": "stop",
        "created_ms": at_ms,
    }
    step |= {name: fields.pop(name) for name in list(fields) if name in Step.__struct_fields__}
    said: dict[str, Any] = {
        "messages": [{"role": "user", "content": "hello"}],
        "reply": {"role": "assistant", "content": "hi"},
        "text": "hi",
        "started_ms": at_ms,
        "finished_ms": at_ms + 5,
    }
    return KeptStep(step=Step(**step), **(said | fields))

"""What the tests of pool and privacy share: a key, an open pool, and steps to keep."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared import signing
from clawloop_shared.ids import new_id, new_step_id
from clawloop_shared.messages import ItemReceipt, ItemReceived
from clawloop_shared.receipts import sign_item
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
    with Pool.open(tmp_path, KnownKey.of(key)) as opened:
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


class Blotter:
    """A redactor that takes token 666 out, and the word `secret`; notes what it was asked to learn from."""

    reserved_id = 1

    def __init__(self) -> None:
        self.learned: list[str] = []

    def learn(self, steps: Iterable[Step]) -> None:
        self.learned += [step.step_id for step in steps]

    def step(self, step: Step) -> Step | None:
        ids = step.token_ids
        spans = [(at, 1) for at, token_id in enumerate(ids) if token_id == 666]
        if not spans:
            return step
        cut = len(step.prompt_ids)
        clean = [self.reserved_id if token_id == 666 else token_id for token_id in ids]
        sampled = zip(step.response_ids, step.response_logprobs, strict=True)
        logprobs = [None if token_id == 666 else logprob for token_id, logprob in sampled]
        changed = {"prompt_ids": clean[:cut], "response_ids": clean[cut:], "response_logprobs": logprobs}
        return msgspec.structs.replace(step, redacted=spans, **changed)

    def text(self, text: str, *, session_id: str) -> str:
        return text.replace("secret", "[redacted]")

    def is_clean(self, ids: Sequence[int], *, session_id: str) -> bool:
        return 666 not in ids


class Acknowledging:
    """A server as far as it signs for what it has."""

    device_id = "device-1"

    def __init__(self) -> None:
        self._private = signing.new_key()
        self.release_key = signing.public_key(self._private)

    def receipts(self, items: Iterable[tuple[str, str]], *, device_id: str = device_id) -> list[ItemReceipt]:
        """Its word that it has these items (ids and hashes)."""
        said = [ItemReceived(device_id=device_id, item_id=i, received_ms=1, sha256=h) for i, h in items]
        return [sign_item(each, self._private) for each in said]

    def acknowledge(self, outbox: Outbox, item_ids: Sequence[str]) -> None:
        """Have an outbox accept receipts of these items, for the bytes that it sent."""
        known = {item.item_id: item.sha256 for item in outbox.list()}
        receipts = self.receipts((item_id, known.get(item_id, "")) for item_id in item_ids)
        outbox.accept(receipts, device_id=self.device_id, release_key=self.release_key)


@pytest.fixture
def server() -> Acknowledging:
    """A server that signs for items."""
    return Acknowledging()

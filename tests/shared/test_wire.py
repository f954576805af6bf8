"""Wire and records: what is encoded comes back equal, and what is not ours is refused with a reason."""

import contextlib
import math

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from clawloop_shared import wire
from clawloop_shared.errors import RecordError, WireError
from clawloop_shared.messages import UploadItem, UploadReply
from clawloop_shared.records import (
    Channel,
    Policy,
    Sampling,
    Signal,
    Step,
    StepBatch,
    Target,
    check_signal,
    check_step,
)

token_ids = st.lists(st.integers(0, 2**31), min_size=1, max_size=40)
logprobs = st.floats(max_value=0.0, min_value=-1e4, allow_nan=False)
text = st.text(max_size=30)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    response = draw(token_ids)
    return Step(
        step_id=draw(text),
        session_id=draw(text),
        run_id=draw(text),
        prompt_ids=draw(token_ids),
        response_ids=response,
        response_logprobs=draw(st.lists(logprobs, min_size=len(response), max_size=len(response))),
        policy=Policy(draw(text), draw(st.integers(0, 2**40)), draw(text)),
        sampling=Sampling(temperature=draw(st.floats(0.1, 3)), seed=draw(st.none() | st.integers(0, 2**53))),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        created_ms=draw(st.integers(0, 2**45)),
        channel=draw(st.sampled_from(Channel)),
        untrainable=draw(text),
    )


signals = st.builds(
    Signal,
    signal_id=text,
    target=st.sampled_from(Target),
    target_id=st.text(min_size=1, max_size=30),
    source=text,
    value=st.floats(-1, 1),
    created_ms=st.integers(0, 2**45),
    weight=st.floats(0.01, 1),
    comment=text,
)


@given(st.lists(steps(), max_size=4), st.lists(signals, max_size=4))
def test_a_batch_comes_back_equal(some_steps: list[Step], some_signals: list[Signal]) -> None:
    batch = StepBatch(some_steps, some_signals)
    assert wire.decode(wire.encode(batch), StepBatch) == batch
    for step in some_steps:
        assert check_step(step) is step
    for signal in some_signals:
        assert check_signal(signal) is signal


@given(st.binary(max_size=300))
def test_an_upload_keeps_its_items_byte_for_byte(body: bytes) -> None:
    reply = UploadReply([UploadItem("i", "r", "steps", body)], more=False, adapter_version=3)
    assert wire.decode(wire.encode(reply), UploadReply).items[0].body == body


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused_and_never_crash(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(data, StepBatch)


@given(st.data())
def test_a_flipped_bit_is_refused_or_still_a_batch(data: st.DataObject) -> None:
    sent = bytearray(wire.encode(StepBatch([data.draw(steps())])))
    position = data.draw(st.integers(0, len(sent) - 1))
    sent[position] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(WireError):
        assert isinstance(wire.decode(bytes(sent), StepBatch), StepBatch)


def test_a_message_of_another_kind_is_refused() -> None:
    with pytest.raises(WireError, match=r"expected b'upload\.v1'"):
        wire.decode(wire.encode(StepBatch()), UploadReply)


def test_a_newer_version_names_the_way_out() -> None:
    sent = bytearray(wire.encode(StepBatch()))
    sent[3] = 9
    with pytest.raises(WireError, match="update the older side"):
        wire.decode(bytes(sent), StepBatch)


def test_a_compression_bomb_is_refused() -> None:
    header = wire.encode(StepBatch())[: 5 + len("steps.v1")]
    bomb = header + zstandard.ZstdCompressor().compress(b"\0" * (100 << 20))
    with pytest.raises(WireError, match="unpacks to more"):
        wire.decode(bomb, StepBatch)


def make_step(**changes: object) -> Step:
    step = Step(
        step_id="chatcmpl-1",
        session_id="s",
        run_id="r",
        prompt_ids=[1],
        response_ids=[2, 3],
        response_logprobs=[-0.5, -0.1],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=1,
    )
    return msgspec.structs.replace(step, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"response_logprobs": [-0.5]},
        {"response_logprobs": [-0.5, math.nan]},
        {"response_logprobs": [-0.5, -math.inf]},
        {"response_logprobs": [-0.5, 0.7]},
        {"prompt_ids": []},
        {"response_ids": [], "response_logprobs": []},
        {"prompt_ids": [-1]},
        {"sampling": Sampling(temperature=0.0)},
        {"sampling": Sampling(temperature=-1.0)},
        {"sampling": Sampling(temperature=math.inf)},
        {"sampling": Sampling(temperature=math.nan)},
        {"response_logprobs": [None, -0.1]},
        {"response_logprobs": [-0.5, None], "redacted": []},
        {"response_logprobs": [None, -0.1], "redacted": [(2, 1)]},
        {"response_logprobs": [None, None], "redacted": [(1, 2)]},
        {"redacted": [(2, 1)]},
        {"response_logprobs": [-0.5, math.nan], "redacted": [(0, 1)]},
        {"redacted": [(0, 0)]},
        {"redacted": [(-1, 1)]},
        {"redacted": [(2, 2)], "response_logprobs": [-0.5, None]},
        {"redacted": [(1, 1), (0, 1)], "response_logprobs": [None, -0.5]},
        {"redacted": [(0, 2), (1, 1)], "response_logprobs": [None, -0.5]},
    ],
)
def test_a_step_that_could_not_be_learned_from_exactly_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(RecordError, match="chatcmpl-1"):
        check_step(make_step(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"redacted": [(0, 1)]},
        {"redacted": [(0, 1)], "response_logprobs": [None, -0.1]},
        {"redacted": [(1, 1)], "response_logprobs": [None, -0.1]},
        {"redacted": [(0, 1), (2, 1)], "response_logprobs": [-0.5, None]},
    ],
)
def test_a_redacted_step_keeps_its_logprobs_only_where_its_own_tokens_are(changes: dict[str, object]) -> None:
    step = make_step(**changes)
    assert check_step(step) is step
    (back,) = wire.decode(wire.encode(StepBatch([step])), StepBatch).steps
    assert back == step


def test_a_step_tells_its_logprobs_only_if_it_has_every_one() -> None:
    assert make_step().logprobs == [-0.5, -0.1]
    with pytest.raises(RecordError, match="1 logprobs are masked"):
        _ = make_step(response_logprobs=[None, -0.1]).logprobs


@pytest.mark.parametrize("changes", [{"value": 1.5}, {"value": math.nan}, {"weight": 0.0}, {"target_id": ""}])
def test_a_signal_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    signal = Signal(signal_id="x", target=Target.STEP, target_id="t", source="s", value=1.0, created_ms=1)
    with pytest.raises(RecordError):
        check_signal(msgspec.structs.replace(signal, **changes))

"""A secure sum, played by the server's machine and by members as they run on devices: exact, and the sum alone."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawloop_edge.learn.sums import SumMember, SumRules
from clawloop_server.aggregate.secure import AGAIN_MS, SecureSum, Status, SumState
from clawloop_server.aggregate.secure_delivery import deliver, terms_of
from clawloop_shared import masking, secure, signing, wire
from clawloop_shared.deltas import Method
from clawloop_shared.errors import SumError
from clawloop_shared.flat import flatten
from clawloop_shared.levels import Level
from clawloop_shared.lora import ModelShape
from clawloop_shared.secure import Phase

from .secure_fleet import PHASE_MS, SHAPE, TASK, TERMS, VALUES, Play


def test_the_secure_sum_is_the_plain_sum() -> None:
    play = Play(7)
    done = play.run()
    play.is_right()
    assert done.members == sorted(play.devices, key=lambda name: signing.public_key(play.devices[name].key))
    assert all(len(device.left) == 1 and device.has_arrived for device in play.devices.values())


def test_the_sum_is_a_delta_for_a_round() -> None:
    play = Play(6)
    done = play.run()
    assert done.result is not None
    delta = deliver(TERMS, done.result, SHAPE)
    assert np.abs(flatten(delta.weights) - play.plain(done.members) / 6).max() < 1e-6
    assert delta.sigma == pytest.approx(0.5 / 6**0.5)
    assert (delta.trajectories, delta.level, delta.rank) == (sum(range(10, 16)), Level.PRIVATE_DELTAS, 2)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("members", [6, 9, 12])
def test_a_third_may_fall_silent_at_each_phase(phase: Phase, members: int) -> None:
    play = Play(members, terms=msgspec.structs.replace(TERMS, min_members=4), rules=SumRules(min_members=4))
    play.until(phase)
    play.gone = {f"d{number:02}" for number in range(0, members, 3)}
    play.run()
    play.is_right()
    stayed = set(play.devices) - play.gone
    late = phase in (Phase.CONFIRM, Phase.UNMASK)
    assert set(play.sum.members) == (set(play.devices) if late else stayed)


@pytest.mark.parametrize("phase", list(Phase)[1:])
def test_more_than_a_third_silent_ends_the_sum_and_says_who(phase: Phase) -> None:
    play = Play(9)
    play.until(phase)
    play.gone = {"d00", "d01", "d02", "d03"}
    done = play.run()
    assert done.state.status is Status.FAILED
    assert f"phase {phase}: 5 of 9 devices answered, 6 must; silent: " in done.state.reason
    assert "d03" in done.state.reason
    assert done.result is None


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 9), st.data())
def test_whoever_falls_silent_whenever_the_sum_is_right_or_there_is_none(members: int, data: st.DataObject) -> None:
    play = Play(members, terms=msgspec.structs.replace(TERMS, min_members=3), rules=SumRules(min_members=3))
    for phase in Phase:
        if play.sum.state.status is not Status.RUNNING or play.sum.state.phase is not phase:
            break
        play.gone |= data.draw(st.sets(st.sampled_from(sorted(play.devices)), max_size=2))
        play.step()
    play.run()
    if play.sum.state.status is Status.DONE:
        play.is_right()
        assert len(play.sum.members) >= max(3, secure.threshold(len(play.sum.state.adverts)))
    else:
        assert play.sum.result is None


def test_too_few_members_wait_and_then_there_is_no_sum() -> None:
    play = Play(4)
    play.step()
    assert play.sum.state.status is Status.FAILED
    assert "phase advertise: " in play.sum.state.reason
    waiting = Play(8)
    for device in list(waiting.devices.values())[:4]:
        device.ready = False
    waiting.step()
    assert waiting.sum.state.status is Status.RUNNING
    assert waiting.sum.due("d00", now_ms=waiting.now_ms) is None, "it said that it has nothing yet"
    waiting.devices["d00"].ready = True
    waiting.now_ms += AGAIN_MS
    waiting.ask("d00")
    waiting.sum.tick(waiting.now_ms + PHASE_MS)
    assert waiting.sum.state.status is Status.RUNNING
    waiting.run()
    waiting.is_right()
    assert len(waiting.sum.members) == 5


def test_who_started_anew_while_others_were_waited_for_is_asked_again() -> None:
    """A device that advertised long ago may have forgotten its keys; there are enough only when all are fresh."""
    play = Play(5)
    for device in list(play.devices.values())[1:]:
        device.ready = False
    play.ask("d00")
    early, play.now_ms = play.devices["d00"], AGAIN_MS
    early.member = SumMember(early, early, device_key=lambda: early.key, rules=SumRules())
    for name, device in play.devices.items():
        device.ready = True
        play.ask(name)
    assert str(play.sum.state.phase) == "advertise"
    play.ask("d00")
    assert str(play.sum.state.phase) == "share"
    play.run()
    play.is_right()
    assert len(play.sum.members) == 5


def test_a_sum_goes_on_from_what_was_kept() -> None:
    """After each answer the server starts anew from its state."""
    play = Play(6)
    for _ in range(200):
        if play.sum.state.status is not Status.RUNNING:
            break
        for name in play.devices:
            play.ask(name)
            if play.sum.result is None:
                kept = msgspec.msgpack.decode(msgspec.msgpack.encode(play.sum.state), type=SumState)
                play.sum = SecureSum(kept, phase_ms=PHASE_MS, total=play.sum.total.copy())
    play.is_right()


# what the server sees


def test_one_masked_vector_is_noise_to_the_server() -> None:
    """All that the server gets of one member, with every key but the member's own and its peers' secrets: bytes as
    uniform as random ones, uncorrelated with the values. Secrets are drawn from a seed, so this cannot flake."""
    rng = np.random.default_rng(5)
    play = Play(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "new_secret", lambda: rng.bytes(32))
        play.until(Phase.CONFIRM)
    seen, plain = [], []
    for device in play.devices.values():
        seen.append(np.frombuffer(wire.decode(device.left[0], secure.Masked).values, "<u4")[:-1])
        plain.append(flatten(device.delta.weights))
    counts = np.bincount(np.frombuffer(np.concatenate(seen).tobytes(), np.uint8), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 255 + 4 * 22.6
    for masked, values in zip(seen, plain, strict=True):
        assert abs(np.corrcoef(masked.view(np.int32), values)[0, 1]) < 4 / VALUES**0.5
    pairs = np.corrcoef([masked.view(np.int32) for masked in seen])
    assert np.abs(pairs - np.eye(7)).max() < 4 / VALUES**0.5


def test_without_the_shares_the_total_is_noise_too() -> None:
    play = Play(6)
    play.until(Phase.UNMASK)
    values = play.sum.total[:-1].view(np.int32)
    assert abs(np.corrcoef(values, play.plain(play.sum.members))[0, 1]) < 4 / VALUES**0.5


def test_who_may_not_sync_any_more_is_asked_no_more() -> None:
    play = Play(7)
    play.until(Phase.SHARE)
    play.sum.leave("d00", "revoked", now_ms=play.now_ms)
    assert play.sum.due("d00", now_ms=play.now_ms) is None
    play.run()
    play.is_right()
    assert "d00" not in play.sum.members


def test_no_task_that_cannot_be_summed_gets_terms() -> None:
    for change in ({"method": Method.LORA}, {"secure": False}, {"clip": 0.0}):
        with pytest.raises(SumError, match="not for a secure sum"):
            terms_of(msgspec.structs.replace(TASK, **change), SHAPE, sum_id="s", min_members=5)
    large = ModelShape(
        hidden_size=8192, intermediate_size=32768, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    with pytest.raises(SumError, match="do not fit one message"):
        terms_of(msgspec.structs.replace(TASK, rank=32), large, sum_id="s", min_members=5)

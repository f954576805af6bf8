"""Groups, marks and late signals in the vault: what goes to a round, when, and with which reward."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from clawloop_server.bases import Base
from clawloop_server.home import Home
from clawloop_server.release.keys import ServerKeys
from clawloop_server.vault.groups import ReadyGroup, Stage, TrajectoryState, stage_of, whole_groups
from clawloop_server.vault.intake import MAX_COMMENT_CHARS, MAX_EVIDENCE_CHARS
from clawloop_server.vault.settings import RewardSettings
from clawloop_server.vault.store import Vault
from clawloop_shared import wire
from clawloop_shared.ids import new_id
from clawloop_shared.messages import ForgetRequest, UploadItem
from clawloop_shared.records import Channel, Hint, Mark, Signal, Step, StepBatch, Target, Trajectory
from clawloop_shared.signals import reward_of

Make = Callable[..., Any]
SETTLE_S, TIMEOUT_S = 10, 100


def item(*records: Step | Signal | Mark) -> UploadItem:
    kinds: dict[type, list[Any]] = {Step: [], Signal: [], Mark: []}
    for record in records:
        kinds[type(record)].append(record)
    body = wire.encode(StepBatch(steps=kinds[Step], signals=kinds[Signal], marks=kinds[Mark]))
    return UploadItem(item_id=new_id(), receipt_id=new_id(), kind="steps", body=body)


def mark(step: Step, *, trainable: bool, at: int = 1, mark_id: str = "") -> Mark:
    return Mark(mark_id=mark_id or new_id(), step_id=step.step_id, trainable=trainable, created_ms=at)


@pytest.fixture
def waiting(home: Home, keys: ServerKeys, base: Base) -> Iterator[Vault]:
    """A vault whose trajectories wait."""
    wait = RewardSettings(settle_s=SETTLE_S, group_timeout_s=TIMEOUT_S)
    vault = Vault.open(home, keys.master, settings=wait)
    yield vault
    vault.close()


@pytest.fixture
def add_member(make_step: Make) -> Make:
    """A step of its own trajectory in a group."""

    def make(name: str, *, group: str = "g", size: int = 0, **fields: Any) -> Step:
        names = {"trajectory_id": name, "run_id": name, "session_id": name}
        made: Step = make_step(**names, group_id=group, group_size=size, **fields)
        return made

    return make


def names(found: list[Trajectory]) -> list[str]:
    return [t.steps[0].trajectory_id for t in found]


# decisions


@pytest.mark.parametrize(
    ("size", "members", "stage"),
    [
        (2, {"open": 2}, Stage.WAITING),
        (2, {"judged": 1}, Stage.PARTIAL),
        (2, {"judged": 1, "open": 1}, Stage.PARTIAL),
        (2, {"judged": 2}, Stage.QUIET),
        (2, {"judged": 2, "open": 1}, Stage.QUIET),
        (2, {"judged": 1, "left out": 1}, Stage.QUIET),
        (2, {"judged": 1, "consumed": 1}, Stage.QUIET),
        (2, {"left out": 2}, Stage.WAITING),
        (0, {"judged": 3}, Stage.QUIET),
        (0, {"judged": 3, "open": 1}, Stage.PARTIAL),
        (0, {"judged": 3, "left out": 1}, Stage.QUIET),
    ],
)
def test_a_group_is_complete_when_all_that_it_is_to_have_are_judged(
    size: int, members: dict[str, int], stage: Stage
) -> None:
    assert stage_of(size, {TrajectoryState(state): number for state, number in members.items()}) is stage


def test_a_round_takes_whole_groups_and_one_that_is_too_large_blocks_nothing() -> None:
    def taken(limit: int, *sizes: int) -> list[str]:
        return whole_groups([ReadyGroup(str(n), size) for n, size in enumerate(sizes)], limit)

    assert taken(8, 4, 4, 4) == ["0", "1"]
    assert taken(8, 4, 6, 1) == ["0", "2"], "what fits goes past what does not"
    assert taken(8, 9, 1) == ["0"], "too large for any round: it goes alone"
    assert taken(8, 1, 9, 1) == ["0", "2"]
    assert taken(0, 1) == []


# the vault


def test_a_group_of_known_size_goes_once_all_are_judged_and_nothing_more_came(
    waiting: Vault, device: str, add_member: Make, make_signal: Make, base: Base
) -> None:
    for name in "abc":
        assert waiting.count_ready(base.line_id, now_ms=1 + SETTLE_S * 1000) == 0
        waiting.receive(device, [item(add_member(name, size=3), make_signal(Target.TRAJECTORY, name))], now_ms=1)
    assert waiting.count_ready(base.line_id, now_ms=SETTLE_S * 1000) == 0
    assert waiting.count_ready(base.line_id, now_ms=1 + SETTLE_S * 1000) == 3
    found = waiting.ready(base.line_id, 9, now_ms=1 + SETTLE_S * 1000)
    assert sorted(names(found)) == ["a", "b", "c"]
    assert len({t.group_id for t in found}) == 1


def test_what_is_judged_of_an_abandoned_group_goes_in_the_end_and_the_rest_follows_when_it_is(
    waiting: Vault, device: str, add_member: Make, make_signal: Make, base: Base
) -> None:
    steps = [add_member(name, size=3) for name in "abc"]
    waiting.receive(device, [item(*steps, *(make_signal(Target.TRAJECTORY, name) for name in "ab"))], now_ms=1000)
    alone = add_member("z", group="")
    waiting.receive(device, [item(alone, make_signal(Target.TRAJECTORY, "z"))], now_ms=1001)
    before, after = 1000 + TIMEOUT_S * 1000 - 1, 1000 + TIMEOUT_S * 1000
    assert names(waiting.ready(base.line_id, 9, now_ms=before)) == ["z"], "it does not block what is behind it"
    taken = waiting.ready(base.line_id, 9, now_ms=after)
    assert sorted(names(taken)) == ["a", "b", "z"]
    waiting.consume("round", taken)
    assert waiting.stats().trajectories == {"train": {"consumed": 3, "open": 1}}
    waiting.receive(device, [item(make_signal(Target.TRAJECTORY, "c", -1.0))], now_ms=after)
    later = after + SETTLE_S * 1000
    assert [(names([t]), t.reward) for t in waiting.ready(base.line_id, 9, now_ms=later)] == [(["c"], -1.0)]


def test_groups_of_one_name_on_two_devices_or_channels_are_strangers(
    waiting: Vault, add_device: Make, add_member: Make, make_signal: Make, base: Base
) -> None:
    for device in (add_device(), add_device()):
        val = add_member("v", size=2, channel=Channel.VAL)
        sent = item(add_member("a", size=2), val, *(make_signal(Target.TRAJECTORY, name) for name in "av"))
        waiting.receive(device, [sent], now_ms=1)
    assert waiting.count_ready(base.line_id, now_ms=1) == waiting.count_ready(base.line_id, Channel.VAL, now_ms=1) == 0
    late = 1 + TIMEOUT_S * 1000
    found = waiting.ready(base.line_id, 9, now_ms=late)
    assert names(found) == ["a", "a"]
    assert len({t.group_id for t in found}) == 2


def test_one_trajectory_name_in_two_groups_is_two_trajectories(
    vault: Vault, device: str, add_member: Make, make_signal: Make, base: Base
) -> None:
    steps = [add_member("t", group=group, size=1) for group in ("g", "h")]
    vault.receive(device, [item(*steps, make_signal(Target.TRAJECTORY, "t"))])
    found = vault.ready(base.line_id, 9)
    assert [t.steps for t in found] == [[step] for step in steps]
    assert len({t.group_id for t in found}) == 2


def test_a_step_that_its_owner_left_out_is_not_learned_from_whichever_comes_first(
    vault: Vault, device: str, make_step: Make, make_signal: Make, base: Base
) -> None:
    early, late, kept = (make_step(run_id="r", created_ms=n) for n in range(3))
    vault.receive(device, [item(mark(early, trainable=False))])
    vault.receive(device, [item(early, late, kept, make_signal(Target.STEP, late.step_id, 0.5))])
    vault.receive(device, [item(mark(late, trainable=False, at=5))])
    (found,) = vault.ready(base.line_id, 9)
    assert (found.steps, found.reward) == ([kept], 0.5), "what was said of a step still judges its run"

    vault.receive(device, [item(mark(kept, trainable=False), mark(late, trainable=True, at=4))])
    assert vault.count_ready(base.line_id) == 0
    assert vault.stats().trajectories == {"train": {"left out": 1}}
    vault.receive(device, [item(mark(late, trainable=True, at=6))])
    (found,) = vault.ready(base.line_id, 9)
    assert found.steps == [late]
    assert vault.stats().marks == 3, "one a step, the latest"


def test_marks_of_forgotten_steps_go_and_come_in_no_more(vault: Vault, device: str, make_step: Make) -> None:
    step, other = make_step(), make_step()
    vault.receive(device, [item(step, mark(step, trainable=False), mark(other, trainable=False))])
    vault.forget(ForgetRequest(request_id="q", device_id=device, at_ms=9, record_ids=[step.step_id], everything=False))
    assert vault.stats().marks == 1
    vault.receive(device, [item(mark(step, trainable=True, at=99))])
    assert vault.stats().marks == 1
    vault.forget(ForgetRequest(request_id="all", device_id=device, at_ms=9, record_ids=[], everything=True))
    assert vault.stats().marks == 0


def test_a_group_goes_on_with_what_its_device_did_not_forget(
    vault: Vault, device: str, add_member: Make, make_signal: Make, base: Base
) -> None:
    gone, stays = add_member("a"), add_member("b")
    vault.receive(device, [item(gone, stays, make_signal(Target.TRAJECTORY, "b"))])
    assert vault.count_ready(base.line_id) == 0, "the group waits for the other"
    request = ForgetRequest(request_id="q", device_id=device, at_ms=9, record_ids=[gone.step_id], everything=False)
    vault.forget(request)
    assert names(vault.ready(base.line_id, 9)) == ["b"]


def test_what_hostile_devices_send_is_set_aside_with_its_reason(
    vault: Vault, device: str, make_step: Make, make_signal: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clawloop_server.vault.receiving.MAX_GROUP", 3)
    step, judged = make_step(run_id="r"), make_signal(Target.RUN, "r")
    change = msgspec.structs.replace
    hint = Hint(step_id=step.step_id, at=2, token_ids=[5, 999])
    good = [change(judged, signal_id="1", hint=hint), change(judged, signal_id="2", comment="x" * MAX_COMMENT_CHARS)]
    bad = [
        change(judged, signal_id="3", hint=change(hint, token_ids=[5, 1000])),
        change(judged, signal_id="4", hint=change(hint, step_id="x" * 300)),
        change(judged, signal_id="5", comment="x" * (MAX_COMMENT_CHARS + 1)),
        change(judged, signal_id="6", evidence="x" * (MAX_EVIDENCE_CHARS + 1)),
    ]
    steps = [
        make_step(group_id="g", group_size=4097),
        make_step(group_id="g", group_size=-1),
        *(make_step(group_id="crowd") for _ in range(5)),
    ]
    marks = [
        mark(step, trainable=False, mark_id="x" * 300),
        Mark(mark_id="m", step_id="", trainable=True, created_ms=1),
    ]
    vault.receive(device, [item(step, *good, *bad, *steps, *marks)])
    assert vault.stats().set_aside == {
        "bad mark": 2,
        "bad signal": 3,
        "bad step": 2,
        "group too large": 2,
        "token outside the vocabulary": 1,
    }
    (found,) = vault.ready(step.policy.line, 9)
    assert [signal.hint for signal in found.signals] == [hint, None], "a hint comes through as it was sent"


def test_what_was_forgotten_of_a_crowd_or_a_device_leaves_no_group_behind(
    vault: Vault, device: str, add_member: Make, make_signal: Make
) -> None:
    vault.receive(device, [item(add_member("a"), add_member("b"), make_signal(Target.TRAJECTORY, "a"))])
    vault.delete_device(device)
    assert vault.database.count("SELECT count(*) FROM trajectory_groups") == 0


def test_sources_that_the_operator_leaves_out_judge_nothing_and_count_again_when_let_in(
    vault: Vault, home: Home, keys: ServerKeys, device: str, make_step: Make, make_signal: Make, base: Base
) -> None:
    judge = msgspec.structs.replace(make_signal(Target.RUN, "r", -1.0), source="judge")
    vault.receive(device, [item(make_step(run_id="r"), judge)])
    assert vault.count_ready(base.line_id) == 1
    strict = Vault.open(home, keys.master, settings=RewardSettings(settle_s=0, weights={"judge": 0.0}))
    strict.obey_settings()
    assert (strict.count_ready(base.line_id), strict.ready(base.line_id, 9)) == (0, [])
    strict.receive(device, [item(make_step(run_id="s"), msgspec.structs.replace(judge, signal_id="2", target_id="s"))])
    assert strict.count_ready(base.line_id) == 0
    strict.receive(device, [item(make_signal(Target.RUN, "s", 0.25))])
    assert [t.reward for t in strict.ready(base.line_id, 9)] == [0.25]
    strict.close()
    vault.obey_settings()
    assert vault.count_ready(base.line_id) == 2


def test_a_round_can_be_explained_by_what_it_read_until_that_is_forgotten(
    vault: Vault, device: str, make_step: Make, make_signal: Make, base: Base
) -> None:
    step, judged = make_step(run_id="r"), make_signal(Target.RUN, "r")
    vault.receive(device, [item(step, judged)])
    vault.consume("round", vault.ready(base.line_id, 9))
    vault.receive(device, [item(make_signal(Target.RUN, "r", -1.0, created_ms=9))])
    (lesson,) = vault.lessons("round")
    assert lesson.account is not None
    assert lesson.account.reward == reward_of([judged]), "a later word changes nothing of what was"
    assert [(v.source, v.share) for v in lesson.account.voices] == [("user", 1.0)]
    vault.forget(
        ForgetRequest(request_id="q", device_id=device, at_ms=9, record_ids=[judged.signal_id], everything=False)
    )
    assert [one.account for one in vault.lessons("round")] == [None]


def test_nothing_is_looked_through_whole_to_take_in_or_hand_out_a_little(
    vault: Vault, device: str, add_member: Make, make_signal: Make, base: Base
) -> None:
    asked: list[str] = []
    connection = vault.database._database.conn
    connection.set_trace_callback(asked.append)
    step = add_member("a", size=1)
    vault.receive(device, [item(step, mark(step, trainable=True), *(make_signal(t, "a") for t in Target))])
    assert vault.count_ready(base.line_id) == 1
    vault.consume("round", vault.ready(base.line_id, 9))
    connection.set_trace_callback(None)
    plans = [
        f"{row[3]}: {sql}"
        for sql in dict.fromkeys(asked)
        if sql.startswith(("SELECT", "UPDATE", "INSERT", "DELETE"))
        for row in vault.database.rows(f"EXPLAIN QUERY PLAN {sql}")
    ]
    tables = "(steps|signals|marks|items|trajectories|trajectory_groups|s|g)"
    whole = re.compile(rf"SCAN {tables}\b|SEARCH {tables} USING PRIMARY KEY \(device_id=\?\)")
    assert len(plans) > 20
    assert [plan for plan in plans if whole.search(plan)] == []


def test_names_that_run_into_each_other_stop_nobody_elses_training(
    vault: Vault, device: str, add_device: Make, base: Base, make_step: Make
) -> None:
    good = make_step(run_id="good")
    vault.receive(device, [item(good, said(Target.STEP, good.step_id))])
    alike = [make_step(run_id="r", session_id="s\0g"), make_step(run_id="r", session_id="s", group_id="g")]
    vault.receive(add_device(), [item(*alike, *(said(Target.STEP, step.step_id) for step in alike))])
    assert "good" in {trajectory.steps[0].run_id for trajectory in vault.ready(base.line_id, 10)}
    assert vault.stats().set_aside == {"bad step": 1}


def said(target: Target, target_id: str) -> Signal:
    return Signal(signal_id=new_id(), target=target, target_id=target_id, source="user", value=1.0, created_ms=1)


def test_a_round_of_a_cohort_takes_what_its_own_devices_sent(
    vault: Vault, device: str, make_step: Make, make_signal: Make, base: Base
) -> None:
    step = make_step(step_id="one")
    vault.receive(device, [item(step, make_signal(Target.STEP, "one"))])
    assert vault.count_ready(base.line_id) == len(vault.ready(base.line_id, 9)) == 1
    assert vault.count_ready(base.line_id, cohort="a") == len(vault.ready(base.line_id, 9, cohort="a")) == 0
    with vault.database.write() as database:
        database.run("UPDATE devices SET cohort = 'a' WHERE device_id = ?", [device])
    assert vault.count_ready(base.line_id) == len(vault.ready(base.line_id, 9)) == 0
    assert vault.pin("round", base.line_id, 9) == (0, 0)
    assert vault.count_ready(base.line_id, cohort="a") == len(vault.ready(base.line_id, 9, cohort="a")) == 1
    assert vault.pin("round", base.line_id, 9, cohort="a") == (1, 1)

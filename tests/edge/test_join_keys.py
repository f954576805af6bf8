"""Keys are on the disk before they are sent: joining, new keys and goodbyes survive a lost answer, a server that is
away, and a kill at any point. Afterwards the device comes in by one pair, and the other is worth nothing."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge import state
from clawloop_edge.cli.root import app
from clawloop_edge.home import EdgeHome
from clawloop_edge.node import leaving, rotating
from clawloop_edge.node.deleting import ask
from clawloop_edge.node.join import Membership, join
from clawloop_edge.node.standing import ask_standing, new_instance, wall_clock_ms
from clawloop_edge.node.transport import NodeError, NodeRefused, ServerAway
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy import device_keys
from clawloop_edge.privacy.audit import AuditLog
from clawloop_edge.privacy.deletions import Deletions, DeletionState
from clawloop_server.hub.devices import DeviceState
from clawloop_shared.membership import LEAVE_PATH, ROTATE_PATH, Stand
from clawloop_shared.messages import FORGET_PATH, JOIN_PATH, read_invitation
from clawloop_shared.model_line import read_line
from clawloop_shared.signing import key_words

from .members_hub import LINE, MembersHub, serving

pytestmark = pytest.mark.filterwarnings("ignore:.*Click 9.0.*:DeprecationWarning")  # typer's own import of click
HOUR_MS = 3_600_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[MembersHub]:
    with serving(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """An empty pool with the tables of all rooms."""
    with Pool.open(tmp_path / "pool", KnownKey.of(b"k" * 32), writer=True) as opened:
        Deletions(opened)
        yield opened


@pytest.fixture
def member(hub: MembersHub, pool: Pool) -> Membership:
    """What the pool joined."""
    made = join(hub.invite(), line=LINE)
    state.keep_membership(pool, made)
    return made


def now(pool: Pool) -> Membership:
    found = state.membership(pool)
    assert found is not None
    return found


def stand(member: Membership) -> Stand:
    return ask_standing(member, new_instance(), takes=False, at_ms=wall_clock_ms()).state


def kinds(pool: Pool) -> list[str]:
    return [entry.kind for entry in AuditLog(pool).entries()]


# New keys


def test_new_keys_take_the_place_of_the_old_and_the_device_stays_the_same(
    hub: MembersHub, pool: Pool, member: Membership
) -> None:
    made = rotating.rotate(pool, member)
    new = now(pool)
    assert new.keys == made
    assert new.keys != member.keys
    assert new.device_id == member.device_id
    assert new.same_as(member)
    assert stand(new) is Stand.JOINED
    with pytest.raises(NodeRefused):
        stand(member)
    assert kinds(pool) == ["rotated"]
    assert AuditLog(pool).verify().signed_by_server == 1
    assert rotating.pending(pool, new) is None
    assert device_keys.request_key(pool, new.device_id) == made.device_key


def test_after_a_lost_answer_the_same_pair_is_asked_for_again(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.lost.add(ROTATE_PATH)
    with pytest.raises(ServerAway):
        rotating.rotate(pool, member)
    assert now(pool).keys == member.keys, "not before the server's signed word"
    with pytest.raises(NodeRefused):
        stand(member)
    hub.lost.clear()
    assert rotating.finish(pool, now(pool))
    assert stand(now(pool)) is Stand.JOINED
    assert not rotating.finish(pool, now(pool))
    assert [event.what for event in hub.devices.events(member.device_id)] == ["joined", "keys rotated"]


def test_a_server_that_is_away_leaves_the_old_pair_good(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.stop()
    with pytest.raises(ServerAway):
        rotating.rotate(pool, member)
    hub.start()
    assert stand(now(pool)) is Stand.JOINED
    asked = rotating.pending(pool, member)
    assert asked is not None
    assert rotating.rotate(pool, member) == asked.keys, "what was begun is finished"
    assert stand(now(pool)) is Stand.JOINED


def test_the_command_has_time_before_the_edge_finishes_for_it(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.lost.add(ROTATE_PATH)
    with pytest.raises(ServerAway):
        rotating.rotate(pool, member)
    hub.lost.clear()
    assert not rotating.finish(pool, member, after_ms=HOUR_MS)
    assert rotating.finish(pool, member, after_ms=0)


def test_keys_that_are_taken_are_thrown_away(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.stop()
    with pytest.raises(ServerAway):
        rotating.rotate(pool, member)
    hub.start()
    asked = rotating.pending(pool, member)
    assert asked is not None
    other = join(hub.invite(), line=LINE, keys=asked.keys)
    with pytest.raises(NodeError, match="409"):
        rotating.rotate(pool, member)
    assert rotating.rotate(pool, now(pool)) != asked.keys
    assert stand(now(pool)) is stand(other) is Stand.JOINED


def test_a_clock_that_is_off_throws_no_keys_away(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.lost.add(ROTATE_PATH)
    with pytest.raises(ServerAway):
        rotating.rotate(pool, member)
    hub.lost.clear()
    with pytest.raises(NodeError, match="set the clock"):
        rotating.rotate(pool, member, now_ms=lambda: wall_clock_ms() - 24 * HOUR_MS)
    rotating.rotate(pool, member)
    assert stand(now(pool)) is Stand.JOINED


@pytest.mark.parametrize("lost", [False, True])
def test_a_pool_that_comes_back_from_a_backup_has_the_keys_that_the_server_knows(
    hub: MembersHub, pool: Pool, member: Membership, tmp_path: Path, lost: bool
) -> None:
    with Pool.open(tmp_path / "backup", KnownKey.of(b"b" * 32), writer=True) as restored:
        Deletions(restored)
        state.keep_membership(restored, member)
        hub.lost |= {ROTATE_PATH} if lost else set()
        with contextlib.suppress(ServerAway):
            rotating.rotate(pool, member)
        hub.lost.clear()
        device_keys.take_over(restored, pool)
        assert rotating.finish(restored, now(restored)) is lost
        assert stand(now(restored)) is Stand.JOINED
        assert now(restored).keys != member.keys


# Leaving


def test_a_server_is_told_that_it_was_left(hub: MembersHub, pool: Pool, member: Membership) -> None:
    state.forget_membership(pool)
    assert leaving.say_due(pool) == 1
    assert hub.devices.get(member.device_id).state is DeviceState.LEFT
    assert (leaving.goodbyes(pool), kinds(pool)) == ([], ["left"])
    assert AuditLog(pool).verify().signed_by_server == 1
    assert leaving.say_due(pool) == 0


def test_a_goodbye_waits_for_a_server_that_is_away(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.stop()
    state.forget_membership(pool)
    assert state.membership(pool) is None
    assert leaving.say_due(pool) == 0
    (waiting,) = leaving.goodbyes(pool)
    assert (waiting.tries, bool(waiting.problem)) == (1, True)
    assert leaving.say_due(pool) == 0, "not at once again"
    hub.start()
    assert leaving.say_due(pool, now_ms=lambda: waiting.due_ms) == 1
    assert hub.devices.get(member.device_id).state is DeviceState.LEFT


def test_a_lost_goodbye_is_said_again(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.lost.add(LEAVE_PATH)
    state.forget_membership(pool)
    assert leaving.say_due(pool) == 0
    hub.lost.clear()
    due_ms = leaving.goodbyes(pool)[0].due_ms
    assert leaving.say_due(pool, now_ms=lambda: due_ms) == 1
    assert [event.what for event in hub.devices.events(member.device_id)] == ["joined", "left"]


def test_who_leaves_in_the_middle_of_a_rotation_is_known_by_either_pair(
    hub: MembersHub, pool: Pool, member: Membership
) -> None:
    hub.lost.add(ROTATE_PATH)
    with pytest.raises(ServerAway):
        rotating.rotate(pool, member)
    state.forget_membership(pool)
    assert leaving.say_due(pool) == 1
    assert hub.devices.get(member.device_id).state is DeviceState.LEFT


def test_a_server_that_deleted_the_device_needs_no_goodbye(hub: MembersHub, pool: Pool, member: Membership) -> None:
    hub.devices.bury(member.device_id)
    state.forget_membership(pool)
    assert leaving.say_due(pool) == 1
    assert (leaving.goodbyes(pool), kinds(pool)) == ([], [])


def test_what_was_sent_can_be_deleted_after_a_rotation_and_after_leaving(
    hub: MembersHub, pool: Pool, member: Membership
) -> None:
    rotating.rotate(pool, member)
    state.forget_membership(pool)
    leaving.say_due(pool)
    second = join(hub.invite(), line=LINE)
    state.keep_membership(pool, second)
    rotating.rotate(pool, second)
    deletions, former = Deletions(pool), state.server_of(member)
    (request_id,) = pool.submit(lambda db: deletions.add_in(db, former, names=[], everything=True)).result()
    assert ask(deletions, request_id).state is DeletionState.DONE


# The commands, and kills


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> EdgeHome:
    found = EdgeHome(tmp_path / "home")
    assert run(found, "setup", "--model", str(tiny_model), "--key-file", "--yes").exit_code == 0
    return found


@pytest.fixture
def box(tmp_path: Path, tiny_model: Path) -> Iterator[MembersHub]:
    """A server of the model that `home` has."""
    with serving(tmp_path / "box", line=read_line(tiny_model)) as running:
        yield running


def run(home: EdgeHome, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments])


def killed_in(box: MembersHub, home: EdgeHome, path: str, *arguments: str) -> None:
    """Run a command, and kill it after the server has done what it asked for, before it hears of that."""
    box.held.add(path)
    box.done.clear()
    box.go.clear()
    program = [sys.executable, "-c", "from clawloop_edge.cli import main; main()", "--home", str(home.folder)]
    child = subprocess.Popen([*program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not box.done.wait(0.1):
            assert child.poll() is None, f"{arguments} ended by itself"
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
        box.held.clear()
        box.go.set()


def test_joining_that_was_killed_is_done_again_with_the_same_invitation(box: MembersHub, home: EdgeHome) -> None:
    invitation = box.invite()
    killed_in(box, home, JOIN_PATH, "join", invitation, "--yes")
    (device,) = box.devices.all()
    done = run(home, "join", invitation, "--yes")
    assert done.exit_code == 0, done.output
    assert f"joined as device {device.device_id}" in done.output
    with open_pool(home, writer=False) as pool:
        assert stand(now(pool)) is Stand.JOINED
        assert pool.get_state(state.JOINING) == b"", "the keys are kept once"


def test_a_rotation_that_was_killed_is_finished_by_the_next(box: MembersHub, home: EdgeHome) -> None:
    run(home, "join", box.invite(), "--yes")
    with open_pool(home, writer=False) as pool:
        before = now(pool)
    killed_in(box, home, ROTATE_PATH, "keys", "rotate", "--yes")
    assert "rotating" in run(home, "keys", "show").output
    done = run(home, "keys", "rotate", "--yes")
    assert done.exit_code == 0, done.output
    with open_pool(home, writer=False) as pool:
        after = now(pool)
    assert after.same_as(before)
    assert stand(after) is Stand.JOINED
    with pytest.raises(NodeRefused):
        stand(before)
    assert run(home, "audit", "verify").exit_code == 0


def test_a_leaving_that_was_killed_has_left_and_the_goodbye_is_said_again(box: MembersHub, home: EdgeHome) -> None:
    run(home, "join", box.invite(), "--yes")
    killed_in(box, home, LEAVE_PATH, "leave", "--yes")
    with open_pool(home, writer=False) as pool:
        assert state.membership(pool) is None
        assert leaving.say_due(pool) == 1
    (device,) = box.devices.all()
    assert device.state is DeviceState.LEFT


def test_leaving_can_ask_for_everything_to_be_deleted(box: MembersHub, home: EdgeHome) -> None:
    run(home, "join", box.invite(), "--yes")
    done = run(home, "leave", "--forget", "--yes")
    assert done.exit_code == 0, done.output
    assert "left; the privacy level is off" in done.output
    assert box.calls[-2:] == [FORGET_PATH, LEAVE_PATH]
    with open_pool(home, writer=False) as pool:
        assert [deletion.state for deletion in Deletions(pool).all()] == [DeletionState.DONE]
    assert run(home, "leave", "--yes").exit_code != 0
    again = run(home, "join", box.invite(), "--yes")
    assert again.exit_code == 0, again.output
    assert [device.state for device in box.devices.all()] == [DeviceState.LEFT, DeviceState.JOINED]


def test_leaving_while_the_server_is_away_says_what_is_still_to_come(box: MembersHub, home: EdgeHome) -> None:
    run(home, "join", box.invite(), "--yes")
    box.stop()
    done = run(home, "leave", "--forget", "--yes")
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "could not be told yet" in told
    assert "privacy deletions" in told
    box.start()


def test_the_words_are_those_of_the_server_and_each_membership_has_its_own_key(box: MembersHub, home: EdgeHome) -> None:
    words = set()
    for _ in range(2):
        invitation = box.invite()
        joined = run(home, "join", invitation, "--yes")
        shown = run(home, "keys", "show", "--json")
        found = read_invitation(invitation)
        assert key_words(found.root_key) in shown.stdout
        device = box.devices.all()[-1]
        assert key_words(device.device_key) in shown.stdout
        assert device.device_id in joined.output
        words.add(key_words(device.device_key))
        run(home, "leave", "--yes")
    assert len(words) == 2, "so that two servers cannot tell that it is the same device"

"""`sessions forget` and what the running edge does about it: memory, deletions, retention."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge import app as edge_app
from clawloop_edge import state
from clawloop_edge.app import Edge
from clawloop_edge.cli.root import app
from clawloop_edge.config import EdgeConfig, ModelConfig
from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.home import EdgeHome
from clawloop_edge.node.join import Membership
from clawloop_edge.opening import open_pool
from clawloop_edge.pool.finishing import unfinished
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.retention import CLOCK, TRUSTED_AFTER_MS, Clock
from clawloop_edge.pool.settings import RetentionSettings
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import ConsentLog, Recipient
from clawloop_edge.privacy.deletions import DeletionState
from clawloop_edge.privacy.outbox import Outbox
from clawloop_shared.errors import ConfigError
from clawloop_shared.ids import new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.model_line import read_line
from clawloop_shared.records import Policy, Sampling, Step

from .pool.hub import DEVICE_ID, Hub, serving

NOW = datetime.now()


def kept(session: str, *, days_ago: float = 0.0, application: str = "agent", words: str = "hello") -> KeptStep:
    """A step of a session, so many days old."""
    at_ms = round((NOW - timedelta(days=days_ago)).timestamp() * 1000)
    step = Step(
        step_id=new_step_id(),
        session_id=session,
        run_id="r",
        prompt_ids=[1],
        response_ids=[2],
        response_logprobs=[-0.5],
        policy=Policy("line"),
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=at_ms,
    )
    reply = {"role": "assistant", "content": words}
    messages = [{"role": "user", "content": words}]
    return KeptStep(
        step=step, messages=messages, reply=reply, app=application, started_ms=at_ms, finished_ms=at_ms, text=words
    )


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> EdgeHome:
    """A home as `setup` makes it, with three sessions in its pool."""
    found = EdgeHome(tmp_path / "home")
    made = run(found, "setup", "--model", str(tiny_model), "--key-file", "--port", "8123", "--yes")
    assert made.exit_code == 0, made.output
    with open_pool(found, writer=True) as pool:
        for step in (kept("alpha-1"), kept("alpha-2", days_ago=3), kept("beta", days_ago=9, application="other")):
            pool.keep_step(step).result()
    return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A server that deletes what it is asked to."""
    with serving(tmp_path) as running:
        yield running


def run(home: EdgeHome, *arguments: str, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments], input=typed)


def left(home: EdgeHome) -> list[str]:
    """The sessions that are left, by name."""
    with open_pool(home, writer=False) as pool:
        assert unfinished(pool) == ()
        assert pool.verify().problems == []
        return sorted(session.session_id for session in pool.sessions())


def join(pool: Pool, hub: Hub, folder: Path) -> None:
    """Be a member of a server, and have let everything leave for it."""
    pool.set_state(state.MEMBERSHIP, b"").result()
    member = Membership(
        device_id=DEVICE_ID,
        url=hub.server.url,
        ca_pem=hub.server.ca_pem,
        root_key=hub.root_key,
        release_key=hub.server.release_key,
        line=read_line(folder),
        device_key=b"d" * 32,
        node_key_pem="",
        node_id=1,
    )
    consent = ConsentLog(pool)
    consent.set_recipient(Recipient(hub.server.url, hub.root_key))
    consent.set_level(Level.FULL, past_after=0)
    state.keep_membership(pool, member)
    outbox = Outbox(pool, consent, hold_s=0)
    outbox.fill()
    outbox.mark_sent([item.item_id for item in outbox.list()])


# The command


def test_it_shows_what_goes_and_asks(home: EdgeHome) -> None:
    refused = run(home, "sessions", "forget", "beta", typed="n\n")
    assert refused.exit_code == 1
    for told in ("beta", "1 session with 1 step,", "nothing of it had left this device", "Forget 1 session for good?"):
        assert told in refused.output
    assert left(home) == ["alpha-1", "alpha-2", "beta"]
    asked = run(home, "sessions", "forget", "beta", "--json", typed="n\n")
    assert (asked.exit_code, asked.stdout) == (1, ""), "what is asked is no fact"
    assert "1 session with 1 step," in asked.stderr, "and what it is about is shown"
    done = run(home, "sessions", "forget", "beta", typed="y\n")
    assert done.exit_code == 0, done.output
    assert "forgotten: 1 session, 1 step, 0 signals (" in done.output
    assert "what cannot be undone" in done.output
    assert left(home) == ["alpha-1", "alpha-2"]


def test_a_beginning_that_several_sessions_have_forgets_none(home: EdgeHome) -> None:
    failed = run(home, "sessions", "forget", "alpha", "--yes")
    assert isinstance(failed.exception, ConfigError)
    assert "alpha-1, alpha-2" in str(failed.exception)
    assert run(home, "sessions", "forget", "alpha-1", "be", "--yes").exit_code == 0
    assert left(home) == ["alpha-2"]


@pytest.mark.parametrize(
    ("options", "stay"),
    [
        (("--app", "other"), ["alpha-1", "alpha-2"]),
        (("--since", "4d"), ["beta"]),
        (("--until", "8d"), ["alpha-1", "alpha-2"]),
        (("--since", "5d", "--until", "2d"), ["alpha-1", "beta"]),
        (("--everything",), []),
    ],
)
def test_sessions_go_by_app_and_time(home: EdgeHome, options: tuple[str, ...], stay: list[str]) -> None:
    assert run(home, "sessions", "forget", *options, "--yes").exit_code == 0
    assert left(home) == stay


def test_what_nothing_matches_forgets_nothing(home: EdgeHome) -> None:
    missed = run(home, "sessions", "forget", "--app", "nobody", "--yes")
    assert (missed.exit_code, "nothing was forgotten" in missed.output) == (1, True)
    for wrong in ((), ("beta", "--everything"), ("--since", "once")):
        assert run(home, "sessions", "forget", *wrong, "--yes").exit_code == 2
    assert len(left(home)) == 3


def test_a_server_is_asked_at_once_and_its_adapters_are_named(home: EdgeHome, hub: Hub, tiny_model: Path) -> None:
    with open_pool(home, writer=True) as pool:
        join(pool, hub, tiny_model)
    hub.adapters = [4]
    shown = run(home, "sessions", "forget", "beta", typed="n\n").output
    assert f"2 names of steps, feedback and sessions had left for {hub.server.url}" in " ".join(shown.split())
    done = run(home, "sessions", "forget", "beta", "--yes", "--json")
    facts = json.loads(done.stdout)
    (deletion,) = facts["deletions"]
    assert (facts["sessions"], facts["unfinished"]) == (1, [])
    assert (deletion["state"], deletion["deleted"], deletion["server"]) == ("done", 2, hub.server.url)
    assert any("cannot unlearn it: 4" in line for line in facts["cannot_be_undone"])
    (listed,) = json.loads(run(home, "privacy", "deletions", "--json").stdout)
    assert (listed["state"], listed["adapters"]) == ("done", [4])
    table = run(home, "privacy", "deletions").output
    assert "deleted 2" in " ".join(table.split())


def test_of_a_session_that_became_old_the_server_can_still_be_asked(home: EdgeHome, hub: Hub, tiny_model: Path) -> None:
    with open_pool(home, writer=True) as pool:
        join(pool, hub, tiny_model)
        pool.submit(lambda database: pool.forgetting.let_go(database, ["beta", "alpha-1"])).result()
    done = run(home, "sessions", "forget", "bet", "--yes")
    assert done.exit_code == 0, done.output
    assert "deleted" in done.output
    assert len(hub.asked) == 1
    assert run(home, "sessions", "forget", "bet", "--yes").exit_code == 1
    run(home, "sessions", "forget", "alpha", "--yes")
    assert left(home) == [], "only one that begins so is kept"


def test_after_leaving_the_server_can_still_be_asked(home: EdgeHome, hub: Hub, tiny_model: Path) -> None:
    with open_pool(home, writer=True) as pool:
        join(pool, hub, tiny_model)
    assert run(home, "leave", "--yes").exit_code == 0
    facts = json.loads(run(home, "sessions", "forget", "beta", "--yes", "--json").stdout)
    assert [deletion["state"] for deletion in facts["deletions"]] == ["done"]
    assert len(hub.asked) == 1


def test_a_server_that_is_away_is_asked_again_by_the_edge(home: EdgeHome, hub: Hub, tiny_model: Path) -> None:
    with open_pool(home, writer=True) as pool:
        join(pool, hub, tiny_model)
    hub.refusals = [(503, 0)]
    done = run(home, "sessions", "forget", "beta", "--yes")
    said = " ".join(done.output.split())
    assert "waiting, asked 1 time:" in said
    assert "it is asked again while the edge runs" in said
    assert "waiting" in run(home, "privacy", "deletions").output


def test_the_server_keeps_what_it_got_if_the_owner_says_so(home: EdgeHome, hub: Hub, tiny_model: Path) -> None:
    with open_pool(home, writer=True) as pool:
        join(pool, hub, tiny_model)
    facts = json.loads(run(home, "sessions", "forget", "beta", "--keep-remote", "--yes", "--json").stdout)
    assert (facts["deletions"], hub.asked) == ([], [])
    assert "The server keeps what it got, because you said so." in facts["cannot_be_undone"]
    assert "no server was ever asked" in run(home, "privacy", "deletions").output


def test_no_byte_of_what_was_forgotten_is_in_any_file_of_the_home(home: EdgeHome) -> None:
    secrets = [f"CANARY{number}xQ7v" for number in range(20)]
    with open_pool(home, writer=True) as pool:
        for secret in secrets:
            pool.keep_step(kept("canaries", words=f"{secret} {'and more ' * 200}")).result()
        assert run(home, "sessions", "search", secrets[3]).exit_code == 0
        assert run(home, "sessions", "forget", "canaries", "--yes").exit_code == 0
        files = [path.read_bytes() for path in home.folder.rglob("*") if path.is_file()]
    files += [path.read_bytes() for path in home.folder.rglob("*") if path.is_file()]
    assert not [secret for secret in secrets for data in files if secret.encode() in data]
    assert "nothing found" in run(home, "sessions", "search", secrets[3]).output


# The running edge


@pytest.fixture
async def edge(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Callable[..., Edge]]:
    """`edge(pool, retention=...)` -> an edge that was not started; stopped at the end."""
    made: list[Edge] = []
    home = EdgeHome(tmp_path / "home")
    home.make()
    engine = ScriptedEngine(tiny_model, [])

    def make(pool: Pool, *, retention: RetentionSettings | None = None) -> Edge:
        config = EdgeConfig(model=ModelConfig(path=str(tiny_model)), retention=retention or RetentionSettings())
        made.append(Edge(home, config, pool=pool, engine=engine))
        return made[-1]

    yield make
    for each in made:
        await each.stop()
    await engine.close()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    """The pool of that edge."""
    with Pool.open(tmp_path / "home", KnownKey.of(os.urandom(32)), writer=True) as opened:
        yield opened


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that the edge does by itself."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - a database tells nobody
            await asyncio.sleep(0.01)


async def test_the_edge_lets_memory_go_of_what_another_process_forgot(
    edge: Callable[..., Edge], pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_app, "WATCH_S", 0.01)
    running, dropped = edge(pool), list[str]()

    async def drop() -> None:
        dropped.append("dropped")

    running.drop_forgotten = drop
    pool.keep_step(kept("s1")).result()
    await running.start()
    with Pool.open(pool.folder, pool.store) as other:
        other.submit(lambda database: other.forgetting.forget(database, ["s1"])).result()
    await until(lambda: dropped == ["dropped"])
    await until(lambda: unfinished(pool) == ())
    assert pool.verify().problems == []


async def test_the_edge_asks_for_deletions_at_level_off_until_they_are_signed(
    edge: Callable[..., Edge], pool: Pool, hub: Hub, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_app, "DELETIONS_S", 0.01)
    pool.keep_step(kept("s1")).result()
    running = edge(pool)
    join(pool, hub, tiny_model)
    ConsentLog(pool).set_level(Level.OFF)
    state.forget_membership(pool)

    def queue(database: object) -> list[str]:
        return running.deletions.add_in(database, hub.server, names=["step-1"])  # type: ignore[arg-type]

    (request_id,) = pool.submit(queue).result()
    await running.start()
    await until(lambda: running.deletions.get(request_id).state is DeletionState.DONE)
    assert [request.record_ids for request in hub.asked] == [["step-1"]]


async def test_the_edge_lets_go_of_what_is_old_when_it_starts(edge: Callable[..., Edge], pool: Pool) -> None:
    for session, days in (("old", 31), ("young", 29)):
        pool.keep_step(kept(session, days_ago=days)).result()
    now_ms = time.time_ns() // 1_000_000
    gone_on = Clock(at_ms=now_ms, since_ms=now_ms - TRUSTED_AFTER_MS)  # only then does anything go for its age
    pool.set_state(CLOCK, msgspec.msgpack.encode(gone_on)).result()
    await edge(pool, retention=msgspec.structs.replace(RetentionSettings(), free_floor_bytes=0)).start()
    await until(lambda: [session.session_id for session in pool.sessions()] == ["young"])

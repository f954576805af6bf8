"""Curation from outside: the commands `curate`, `review` and `explain`, and the routes beside them."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge.cli import review
from clawloop_edge.cli.root import app
from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.app import make_app, make_runner
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import open_pool
from clawloop_edge.pool import curation
from clawloop_edge.pool.curation import Word
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.picking import Page, Picked, page
from clawloop_edge.pool.review import Queue, queue
from clawloop_edge.pool.store import Pool
from clawloop_edge.sessions.names import SessionNames
from clawloop_shared.ids import new_id
from clawloop_shared.records import Channel, Signal, Step, Target
from clawloop_shared.signals import DEFAULT_RULES

from .kept import kept_step

TOKEN = "test-token-0123456789"
LATER_MS = 10_000_000


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    with Pool.open(tmp_path / "pool", KnownKey.of(os.urandom(32)), writer=True) as opened:
        curation.prepare(opened)
        yield opened


def keep(pool: Pool, session: str, **fields: Any) -> Step:
    kept = kept_step(session, **fields)
    pool.keep_step(kept).result()
    return kept.step


def judge(pool: Pool, step: Step, value: float, *, source: str = "user", weight: float = 1.0) -> None:
    signal = Signal(
        signal_id=new_id(),
        target=Target.STEP,
        target_id=step.step_id,
        source=source,
        value=value,
        weight=weight,
        created_ms=1,
    )
    pool.keep_signal(signal).result()


def say(pool: Pool, step: Step, **word: Any) -> None:
    curation.curate(pool, Target.STEP, step.step_id, word=Word(**word)).result()


def picked(pool: Pool, limit: int = 10, **fields: Any) -> Page:
    return page(pool, Picked(**fields), rules=DEFAULT_RULES, limit=limit)


def ids(found: Page) -> list[str]:
    return [seen.line.step_id for seen in found.steps]


def queued(pool: Pool, **options: Any) -> Queue:
    return queue(pool, rules=DEFAULT_RULES, now_ms=LATER_MS, limit=options.pop("limit", 10), **options)


# Picking


def test_steps_are_picked_by_what_is_known_of_them_latest_first(pool: Pool) -> None:
    good, bad, plain = (keep(pool, name, at_ms=at) for at, name in enumerate(("good", "bad", "plain"), 1000))
    val = keep(pool, "val", channel=Channel.VAL, app="other", at_ms=5000)
    broken = keep(pool, "broken", untrainable="cut")
    judge(pool, good, 1.0)
    judge(pool, bad, -0.5, source="judge")
    say(pool, good, quality=5, tags=["a", "b"])
    say(pool, bad, trainable=False, tags=["b"])
    assert ids(picked(pool)) == [each.step_id for each in (broken, val, plain, bad, good)]
    assert ids(picked(pool, tags=["b"])) == [bad.step_id, good.step_id]
    assert ids(picked(pool, tags=["b", "a"])) == ids(picked(pool, quality_min=4)) == [good.step_id]
    assert ids(picked(pool, trainable=False)) == [broken.step_id, bad.step_id]
    assert ids(picked(pool, judged=True)) == [bad.step_id, good.step_id]
    assert ids(picked(pool, source="judge")) == ids(picked(pool, reward_max=0.0)) == [bad.step_id]
    assert ids(picked(pool, reward_min=0.5)) == [good.step_id]
    assert ids(picked(pool, channel=Channel.VAL)) == ids(picked(pool, app="other")) == [val.step_id]
    assert ids(picked(pool, since_ms=5000)) == [val.step_id]
    assert ids(picked(pool, since_ms=1001, until_ms=1002)) == [bad.step_id]
    assert ids(picked(pool, sessions=["plain"])) == [plain.step_id]


def test_pages_hold_all_steps_once_and_look_at_no_more_than_they_may(pool: Pool) -> None:
    steps = [keep(pool, f"s{number % 3}") for number in range(12)]
    found, before = [], None
    while True:
        part = page(pool, Picked(), rules=DEFAULT_RULES, limit=5, before_seq=before)
        found += ids(part)
        before = part.next
        if before is None:
            break
    assert found == [step.step_id for step in reversed(steps)]
    bounded = page(pool, Picked(source="nobody"), rules=DEFAULT_RULES, limit=5, look_at=4)
    assert (bounded.steps, bounded.next is None) == ([], False), "there may be more behind what was looked at"


# What needs a word


def test_the_queue_says_why_a_step_needs_a_word_and_leaves_out_what_has_one(pool: Pool) -> None:
    silent, weak, torn, rated, marked = (keep(pool, name) for name in ("silent", "weak", "torn", "rated", "marked"))
    keep(pool, "inexact", untrainable="cut")
    flagged = keep(pool, "flagged")
    judge(pool, weak, 0.5, source="next-state", weight=0.4)
    judge(pool, torn, 1.0, source="exact")
    judge(pool, torn, -1.0, source="judge")
    judge(pool, rated, 1.0)
    judge(pool, flagged, 1.0)
    say(pool, marked, trainable=False)
    say(pool, flagged, tags=["review"])
    why = {each.step.line.step_id: each.why for each in queued(pool).steps}
    assert why == {
        flagged.step_id: ["tagged review"],
        torn.step_id: ["judge says -1.0, exact says +1.0"],
        weak.step_id: ["only weak signs, of next-state"],
        silent.step_id: ["nothing was said of it, and its run has ended"],
    }
    assert (queued(pool).steps[0].question, queued(pool).steps[0].answer) == ("hello", "hi")


def test_a_run_that_goes_on_is_not_asked_about_and_one_that_ended_only_once(pool: Pool) -> None:
    keep(pool, "s", at_ms=LATER_MS - 10)
    assert queued(pool).steps == [], "it may not be over"
    last = keep(pool, "s", at_ms=LATER_MS - 9)
    keep(pool, "s", run_id="next", at_ms=LATER_MS - 8)
    assert [each.step.line.step_id for each in queued(pool).steps] == [last.step_id]


def test_keys_are_feedback_curation_or_nothing(pool: Pool) -> None:
    good, bad, off, skipped = (keep(pool, name) for name in ("d", "c", "b", "a"))
    order = {good.step_id: "g", bad.step_id: "b", off.step_id: "x", skipped.step_id: "s"}
    found = queued(pool).steps
    keys = iter([key for each in found for key in ("?", order[each.step.line.step_id])])
    assert review.ask_all(pool, found, key=lambda: next(keys)) == 3
    assert [(s.value, s.source) for s in pool.signals([good, bad])] == [(-1.0, "user"), (1.0, "user")]
    assert ids(picked(pool, trainable=False)) == [off.step_id]
    assert [each.step.line.step_id for each in queued(pool).steps] == [skipped.step_id]
    assert review.ask_all(pool, queued(pool).steps, key=lambda: "q") == 0


# HTTP


@pytest.fixture
async def edge(pool: Pool, tiny_model: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a gateway on `pool`."""
    engine = ScriptedEngine(tiny_model, lambda prompt: "Fine.")
    runner = make_runner(make_app(engine, pool, settings=GatewaySettings(), token=TOKEN))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession(base, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        yield client
    await runner.cleanup()
    await engine.close()


async def test_a_word_over_http_is_kept_and_found_again(pool: Pool, edge: aiohttp.ClientSession) -> None:
    step = keep(pool, SessionNames(pool.tag).id_of("my chat"))
    keep(pool, "other")
    body = {"session_id": "my chat", "trainable": False, "tags": ["a"], "quality": 1, "note": "no"}
    async with edge.post("/v1/curate", json=body) as reply:
        said = await reply.json()
    assert (reply.status, said["target"], said["target_id"], said["stored"]) == (200, "session", "my chat", True)
    async with edge.get("/v1/steps", params={"tag": "a", "trainable": "no", "session_id": "my chat"}) as reply:
        found = await reply.json()
    (seen,) = found["steps"]
    assert (seen["step_id"], seen["trainable"], seen["untrainable"]) == (step.step_id, False, "")
    assert (seen["curation"]["quality"], seen["curation"]["note"], found["next"]) == (1, "no", None)
    async with edge.get("/v1/steps", params={"limit": "1"}) as reply:
        first = await reply.json()
    async with edge.get("/v1/steps", params={"limit": "1", "before": str(first["next"])}) as reply:
        second = await reply.json()
    assert first["steps"][0]["step_id"] != second["steps"][0]["step_id"] == step.step_id
    async with edge.get("/v1/review") as reply:
        assert [each["session_id"] for each in (await reply.json())["steps"]] == ["other"]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"step_id": "nobody", "trainable": False}, 404, "no step nobody is kept here"),
        ({"step_id": "nobody"}, 400, "nothing is said"),
        ({"trainable": False}, 400, "0 are named"),
        ({"step_id": "a", "session_id": "b", "trainable": False}, 400, "2 are named"),
        ({"step_id": "a", "trainable": "no"}, 400, "trainable"),
        ({"step_id": "a", "quality": 6}, 400, "quality"),
        ({"step_id": "a", "tags": ["a b"]}, 400, "tags"),
        ({"step_id": "a", "trainabel": False}, 400, "trainabel"),
    ],
)
async def test_a_wrong_word_is_refused_by_name(
    edge: aiohttp.ClientSession, body: dict[str, Any], status: int, told: str
) -> None:
    async with edge.post("/v1/curate", json=body) as reply:
        assert reply.status == status
        assert told in (await reply.json())["error"]["message"]


async def test_lists_need_the_token_and_know_their_parameters(edge: aiohttp.ClientSession) -> None:
    for query in ("tga=x", "limit=0", "limit=1000", "trainable=maybe", "reward_min=2", "before=null", "tag=a&tag=b"):
        async with edge.get(f"/v1/steps?{query}") as reply:
            assert reply.status == 400, query
            assert query.split("=")[0] in (await reply.json())["error"]["message"].split()[0]
    async with edge.get("/v1/review", headers={"Authorization": "Bearer wrong"}) as reply:
        assert reply.status == 401


# Commands


def run(home: EdgeHome, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments])


def facts(home: EdgeHome, *arguments: str) -> Any:
    result = run(home, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> EdgeHome:
    found = EdgeHome(tmp_path / "home")
    assert run(found, "setup", "--model", str(tiny_model), "--key-file", "--yes").exit_code == 0
    return found


def test_the_commands_say_list_explain_and_review(home: EdgeHome) -> None:
    with open_pool(home, writer=True) as pool:
        step, other = keep(pool, "s1"), keep(pool, "s2")
    said = facts(home, "curate", step.step_id, "--trainable", "no", "--quality", "2", "--tag", "a", "--note", "why")
    assert (said["target"], said["curation"]["trainable"], said["curation"]["tags"]) == ("step", False, ["a"])
    assert facts(home, "curate", "run-s2", "--tag", "b")["target"] == "run"
    assert facts(home, "curate", "s2", "--quality", "5")["target"] == "session"
    assert [each["step_id"] for each in facts(home, "curate", "list", "--tag", "a")["steps"]] == [step.step_id]
    assert [each["step_id"] for each in facts(home, "curate", "list", "--quality-min", "5")["steps"]] == [other.step_id]
    assert facts(home, "explain", step.step_id)["curation"]["note"] == "why"
    shown = run(home, "explain", step.step_id).stdout
    assert "no (you said so)" in shown
    assert 'quality 2; tags a; "why"' in shown
    first = run(home, "curate", "list", "-n", "1")
    assert "curate list --before" in first.stdout
    assert [each["step_id"] for each in facts(home, "review")["steps"]] == []
    assert "nothing needs a word" in run(home, "review").stdout
    assert [each["quality"] for each in facts(home, "curate", step.step_id)["words"]] == [2]


def test_wrong_words_are_one_line(home: EdgeHome) -> None:
    with open_pool(home, writer=True) as pool:
        step = keep(pool, "s1")
    unknown = run(home, "curate", "nobody", "--trainable", "no")
    assert "no session nobody is kept here" in str(unknown.exception or unknown.output)
    wrong = run(home, "curate", step.step_id, "--tag", "two words")
    assert "is no tag" in str(wrong.exception or wrong.output)
    assert run(home, "curate", step.step_id, "--quality", "6").exit_code == 2


def test_an_export_for_others_is_checked_and_not_taken_in(home: EdgeHome, tmp_path: Path) -> None:
    with open_pool(home, writer=True) as pool:
        step = keep(pool, "s1", reply={"role": "assistant", "content": "hi"})
    folder = tmp_path / "out"
    folder.mkdir()
    told = facts(home, "pool", "export", str(folder), "--format", "chat")
    assert (told["rows"], told["file"], told["content"]) == (1, str(folder / "chat.jsonl"), "text")
    assert told["head"]["consent"]["level"] == "off"
    assert facts(home, "pool", "import", told["file"], "--check")["rows"] == 1
    refused = run(home, "pool", "import", told["file"])
    assert "cannot be taken in" in str(refused.exception)
    assert run(home, "pool", "export", str(folder), "--format", "verl").exit_code == 0
    assert run(home, "pool", "export", str(folder / "own.jsonl")).exit_code == 0
    assert facts(home, "pool", "import", str(folder / "own.jsonl"), "--check")["steps"] == 1
    facts(home, "curate", step.step_id, "--trainable", "no")
    assert facts(home, "pool", "export", str(folder), "--format", "trl-completion")["rows"] == 0

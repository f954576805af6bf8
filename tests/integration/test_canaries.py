"""A hundred secrets are said to a real edge in every way there is, and then looked for in every file that it has.

They may be in none: not while it runs, not after kill -9, not after a clean stop; and once they were forgotten, an
earlier copy of the files does not give them back to today's keys.
"""

import base64
import json
import secrets
import shutil
import signal
import sqlite3
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from clawloop_edge.home import EdgeHome
from clawloop_edge.opening import key_store, open_pool
from clawloop_edge.pool.crypt import session_scope
from clawloop_shared.database import open_database
from clawloop_shared.errors import ClawloopError
from demoworld.stage import Part, make_edge

MODEL = Path(__file__).resolve().parents[2] / "scripts/demoworld/model"
COUNT = 100


@dataclass
class Speaker:
    """Says secrets to an edge; `said` has each with where it was put."""

    edge: Part
    said: dict[str, str] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)

    def secret(self, where: str) -> str:
        found = f"canary{secrets.token_hex(9)}"
        self.said[found] = where
        return found

    def post(
        self, path: str, body: dict[str, Any] | bytes, *, headers: dict[str, str] | None = None, token: str = ""
    ) -> Any:
        """The answer, whatever its status; errors included."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {token or self.edge.token()}", "Content-Type": "application/json"}
        request = Request(f"http://127.0.0.1:{self.edge.port}{path}", data, {**sent, **(headers or {})})
        try:
            with urlopen(request, timeout=60) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        try:
            found = json.loads(text)
        except ValueError:
            return None
        if isinstance(found, dict) and isinstance(found.get("id"), str):
            self.steps.append(found["id"])
        return found


def chat(speaker: Speaker) -> None:
    say, post = speaker.secret, speaker.post
    tool = {
        "type": "function",
        "function": {"name": "look", "description": say("tool"), "parameters": {"type": "object"}},
    }
    call = {
        "id": "call1",
        "type": "function",
        "function": {"name": "look", "arguments": json.dumps({"q": say("arguments")})},
    }
    messages = [
        {"role": "system", "content": say("system") + " system words" * 200},
        {"role": "user", "content": f"my key is {say('prompt')}"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call1", "content": say("tool result")},
    ]
    headers = {
        "X-Clawloop-Session": say("session header"),
        "Idempotency-Key": say("idempotency key"),
        "X-Whatever": say("unknown header"),
        "User-Agent": say("user agent"),
        "traceparent": say("broken traceparent"),
    }
    asked = {
        "model": say("model name"),
        "messages": messages,
        "tools": [tool],
        "max_tokens": 4,
        "user": say("user field"),
    }
    post("/v1/chat/completions", {**asked, "metadata": {"note": say("metadata")}}, headers=headers)
    post("/v1/chat/completions", {**asked, "stream": True})
    post("/v1/chat/completions", {**asked, "model": "clawloop", "stop": [say("stop")]})


def other_apis(speaker: Speaker) -> None:
    say, post = speaker.secret, speaker.post
    post(
        "/v1/responses",
        {"model": "m", "input": say("responses"), "instructions": say("instructions"), "max_output_tokens": 4},
    )
    body = {"model": "m", "max_tokens": 4, "system": say("messages system")}
    post("/v1/messages", {**body, "messages": [{"role": "user", "content": say("messages")}]})
    post("/v1/messages/count_tokens", {"model": "m", "messages": [{"role": "user", "content": say("count_tokens")}]})
    post("/v1/completions", {"model": "m", "prompt": say("completions"), "max_tokens": 4})
    post(
        f"/{say('trajectory')}/{say('group')}/v1/chat/completions",
        {"messages": [{"role": "user", "content": say("claw-r1")}], "max_tokens": 4},
    )
    post(
        f"/v1/chat/completions?x={say('query')}", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    )


def mistakes(speaker: Speaker) -> None:
    say, post = speaker.secret, speaker.post
    post("/v1/chat/completions", f'{{"messages": "{say("broken json")}'.encode())
    post("/v1/chat/completions", {"messages": say("wrong type")})
    post("/v1/chat/completions", {"messages": [{"role": say("role"), "content": "x"}]})
    post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "temperature": say("temperature")})
    post("/v1/chat/completions", {"messages": [{"role": "user", "content": say("long") + " word" * 60_000}]})
    post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": say("image")}}]}]},
    )
    post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, token=say("wrong token"))
    post(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}]},
        headers={"Origin": f"http://{say('origin')}"},
    )
    post(f"/{say('unknown path')}", {"a": 1})
    grammar = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": say("schema")}}}
    post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "response_format": grammar})
    hidden = {"messages": [{"role": "user", "content": say("incognito")}], "max_tokens": 4}
    post("/v1/chat/completions", hidden, headers={"X-Clawloop-Incognito": "1"})


def feedback(speaker: Speaker) -> None:
    step_id = speaker.steps[0]
    speaker.post("/v1/feedback", {"step_id": step_id, "value": 1, "comment": speaker.secret("comment")})
    speaker.post("/v1/feedback", {"step_id": speaker.secret("unknown step"), "value": 1})
    speaker.post("/v1/feedback", {"step_id": step_id, "value": speaker.secret("value")})


WAYS: tuple[Callable[[Speaker], None], ...] = (chat, other_apis, mistakes, feedback)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaker]:
    folder = tmp_path_factory.mktemp("canaries")
    edge = make_edge(folder, MODEL, name="edge", settings={})
    speaker = Speaker(edge)
    try:
        edge.start()
        while len(speaker.said) < COUNT:
            for way in WAYS:
                way(speaker)
        yield speaker
    finally:
        edge.stop()


def found_in(folder: Path, said: dict[str, str]) -> list[str]:
    """Where a secret stands in a file of this folder, in the clear or in a usual encoding of it."""
    places = []
    shapes = {
        shape: where
        for secret, where in said.items()
        for shape in (
            secret.encode(),
            secret.encode("utf-16-le"),
            base64.b64encode(secret.encode())[:20],
            secret[6:].encode(),
        )
    }
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        places += [f"{path.name}: {where}" for shape, where in shapes.items() if shape in data]
    return places


def test_no_secret_is_in_any_file_of_an_edge_that_runs(spoken: Speaker) -> None:
    assert len(spoken.said) >= COUNT
    assert len(spoken.steps) > 10
    assert (spoken.edge.home / "pool.db").stat().st_size > 100_000
    assert found_in(spoken.edge.home.parent, spoken.said) == []


def test_nor_after_it_was_killed_or_aborted(spoken: Speaker) -> None:
    spoken.edge.kill()
    assert found_in(spoken.edge.home.parent, spoken.said) == []
    spoken.edge.start()
    chat(spoken)
    process = spoken.edge.process
    assert process is not None
    process.send_signal(signal.SIGABRT)
    process.wait()
    assert found_in(spoken.edge.home.parent, spoken.said) == []
    spoken.edge.start()
    spoken.edge.stop()
    assert found_in(spoken.edge.home.parent, spoken.said) == []


def test_what_was_said_is_there_for_its_owner(spoken: Speaker) -> None:
    with open_pool(EdgeHome(spoken.edge.home), writer=False) as pool:
        sessions = [session.session_id for session in pool.sessions()]
        kept = json.dumps([kept.messages for session_id in sessions for kept in pool.session_steps(session_id)])
    there = {where for secret, where in spoken.said.items() if secret in kept}
    assert there >= {"prompt", "messages", "system", "tool result", "arguments"}, "this file would test nothing"


def test_once_forgotten_an_earlier_copy_of_the_files_does_not_open_to_todays_keys(spoken: Speaker) -> None:
    earlier = spoken.edge.home.parent.parent / "earlier-copy"
    shutil.copytree(spoken.edge.home, earlier)
    spoken.edge.run("sessions", "forget", "--everything", "--keep-remote", "--yes")
    assert spoken.edge.run("sessions", "list", "--json", expect_json=True) == []
    home, old = EdgeHome(spoken.edge.home), EdgeHome(earlier)
    keys = key_store(home, home.load_config().pool).load()
    database = open_database(earlier / "pool.db", keys.file_key)
    try:
        clear = "\n".join(everything_in(database.conn))
        assert [where for secret, where in spoken.said.items() if secret in clear] == []
        wrapped = database.conn.execute("SELECT count(*) FROM keys WHERE scope LIKE 'session/%'").fetchone()[0]
        assert wrapped > 3, "the copy has no session's key, so that this test tests nothing"
    finally:
        database.close()
    shutil.copy(spoken.edge.home / "pool.key", earlier / "pool.key")
    with pytest.raises(ClawloopError):
        open_a_session(old)
    assert found_in(spoken.edge.home.parent, spoken.said) == []


def open_a_session(home: EdgeHome) -> None:
    with open_pool(home, writer=False) as pool, pool.read() as snapshot:
        (session_id,) = snapshot.conn.execute("SELECT session_id FROM sessions").fetchone()
        pool.keyring.find(snapshot, session_scope(session_id))


def everything_in(connection: Any) -> Iterator[str]:
    """Every value of every table that opens, as text."""
    for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        try:
            rows = connection.execute(f'SELECT * FROM "{table}"').fetchall()  # noqa: S608
        except sqlite3.Error:
            continue
        for row in rows:
            yield " ".join(v.decode("latin-1") if isinstance(v, bytes) else str(v) for v in row)

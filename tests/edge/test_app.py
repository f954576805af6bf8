"""The running edge: joining and leaving servers, wishes of its owner, silence at level off, and how it starts."""

import asyncio
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import msgspec
import pytest
from aiohttp import ClientSession
from typer.testing import CliRunner

from clawloop_edge import state
from clawloop_edge.adapters.log import KnownLog
from clawloop_edge.adapters.store import AdapterStore
from clawloop_edge.app import Edge, serve
from clawloop_edge.cli import log as log_command
from clawloop_edge.cli.root import app
from clawloop_edge.cli.service import ask
from clawloop_edge.config import EdgeConfig, ModelConfig
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.errors import ConsentError
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.handlers import Handlers
from clawloop_edge.home import EdgeHome
from clawloop_edge.node.join import Membership
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.records import KeptStep
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import wall_clock_ms
from clawloop_shared import config, signing, wire
from clawloop_shared.errors import ConfigError
from clawloop_shared.files import sha256
from clawloop_shared.ids import new_step_id
from clawloop_shared.levels import Level
from clawloop_shared.log_head import LogProof, TreeHead, sign_head
from clawloop_shared.lora import parse_config
from clawloop_shared.manifest import Evaluation, FileEntry, Manifest, Probe, sign_manifest
from clawloop_shared.messages import AdapterOffer, StatusRequest, UploadRequest
from clawloop_shared.model_line import ModelLine
from clawloop_shared.records import Policy, Sampling, Step, StepBatch

MakeAdapter = Callable[..., dict[str, bytes]]
PROBE_IDS = [5, 300, 301, 302]
FAR_MS = 1 << 42


def member(line: ModelLine, key: bytes, *, name: str = "one") -> Membership:
    """A membership at a server whose release key is `key`."""
    return Membership(
        device_id=name,
        url=f"https://{name}.invalid:1",
        ca_pem="",
        root_key=b"r" * 32,
        release_key=signing.public_key(key),
        line=line,
        device_key=b"d" * 32,
        node_key_pem="",
        node_id=1,
    )


async def offer(engine: MlxEngine, files: dict[str, bytes], *, key: bytes, version: int) -> AdapterOffer:
    """What the server with `key` would release."""
    await engine.load(Policy(engine.line.line_id, 9999, "probe"), files)
    probe = await engine.score(PROBE_IDS[:1], PROBE_IDS[1:], version=9999)
    await engine.unload(9999)
    config = parse_config(files["adapter_config.json"])
    manifest = Manifest(
        line=engine.line,
        version=version,
        previous_sha256="",
        files=[FileEntry(name, len(data), sha256(data)) for name, data in files.items()],
        rank=config.r,
        alpha=config.lora_alpha,
        target_modules=config.target_modules,
        probe=Probe(PROBE_IDS, probe),
        evaluation=Evaluation("none", 0, 0.0, 0.0, 0.0),
        round_id="r",
        lineage_root="",
        created_ms=1,
        expires_ms=FAR_MS,
    )
    return AdapterOffer(sign_manifest(manifest, key), files)


@pytest.fixture
async def edge(tmp_path: Path, engine: MlxEngine, tiny_model: Path) -> AsyncIterator[Edge]:
    """An edge that was not started, on a home with an empty pool."""
    home = EdgeHome(tmp_path / "home")
    home.make()
    config = EdgeConfig(model=ModelConfig(path=str(tiny_model)))
    with Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool:
        edge = Edge(home, config, pool=pool, engine=engine)
        yield edge
        await edge.stop()


async def test_after_leaving_one_server_the_adapters_of_another_are_taken(
    edge: Edge, engine: MlxEngine, make_adapter: MakeAdapter
) -> None:
    one, two = signing.new_key(), signing.new_key()
    state.keep_membership(edge.pool, member(engine.line, one))
    await edge._follow_membership()
    assert edge.activator is not None
    for version in (1, 2):
        reply = await edge.activator.install(await offer(engine, make_adapter(seed=version), key=one, version=version))
        assert reply.installed
    state.want_adapter(edge.pool, 1, now_ms=5)
    state.forget_membership(edge.pool)
    await edge._watch()
    assert engine.policy.version == 0
    assert engine.health().versions == [0]

    state.keep_membership(edge.pool, member(engine.line, two, name="two"))
    await edge._watch()
    assert edge.activator is not None
    reply = await edge.activator.install(await offer(engine, make_adapter(seed=8), key=two, version=1))
    assert (reply.installed, reply.reason) == (True, "")
    state.keep_membership(edge.pool, member(engine.line, one))
    await edge._watch()
    assert engine.policy.version == 2, "who comes back finds what was in use there"


async def test_what_stopped_updates_is_in_status_and_the_owner_can_accept_it(
    edge: Edge, engine: MlxEngine, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = signing.new_key()
    joined = member(engine.line, key)
    state.keep_membership(edge.pool, joined)
    await edge._follow_membership()
    assert edge.activator is not None
    seen, shown = (TreeHead(line_id=engine.line.line_id, size=n, root=f"{n}" * 64, at_ms=1) for n in (5, 4))
    state.keep_log(edge.pool, joined, KnownLog(seen))
    assert state.log_words(edge.pool, joined) == f"5 entries, root {'5' * 16}"
    assert state.log_words(edge.pool, None) == ""
    bad = await offer(engine, make_adapter(seed=1), key=key, version=1)
    proof = LogProof(sign_head(shown, key), 0, [])
    reply = await edge.activator.install(msgspec.structs.replace(bad, log=proof))
    assert (reply.installed, engine.policy.version) == (False, 0)
    assert "has 4 entries, and had 5 before" in reply.reason
    assert state.log_words(edge.pool, joined).startswith("adapters are refused: the server's log has 4 entries")

    state.forget_membership(edge.pool)
    state.keep_membership(edge.pool, again := member(engine.line, signing.new_key()))
    assert state.known_log(edge.pool, again).shown == shown, "neither leaving nor another key lets a server begin anew"
    other = msgspec.structs.replace(again, root_key=b"o" * 32)
    assert state.known_log(edge.pool, other) == KnownLog()

    monkeypatch.setattr(log_command, "opened_pool", lambda _: nullcontext(edge.pool))
    run = partial(CliRunner().invoke, app, env={"CLAWLOOP_EDGE_HOME": str(edge.home.folder)})
    found = json.loads(run(["log", "show", "--json"]).output)
    assert (found["known"]["head"]["size"], found["known"]["shown"]["size"]) == (5, 4)
    assert "stopped" in run(["log", "show"]).output
    assert run(["log", "accept", "--yes"]).exit_code == 0
    assert state.known_log(edge.pool, again) == KnownLog(shown)
    refused = run(["log", "accept", "--yes"])
    assert refused.exit_code == 1
    assert "updates are not stopped" in str(refused.exception)
    state.forget_membership(edge.pool)
    assert "has joined no server" in str(run(["log", "show"]).exception)


async def test_a_wish_made_while_the_edge_was_down_is_followed_at_its_start(
    edge: Edge, engine: MlxEngine, make_adapter: MakeAdapter
) -> None:
    key = signing.new_key()
    state.keep_membership(edge.pool, member(engine.line, key))
    await edge._follow_membership()
    assert edge.activator is not None
    assert (await edge.activator.install(await offer(engine, make_adapter(), key=key, version=1))).installed
    state.want_adapter(edge.pool, 0, now_ms=5)
    await edge.start()
    await edge._watch()
    assert engine.policy.version == 0
    assert state.wanted_adapter(edge.pool) is None
    state.want_adapter(edge.pool, 77, now_ms=6)
    await edge._watch()
    assert state.wanted_adapter(edge.pool) is None, "what cannot be followed is not tried for ever"
    assert AdapterStore.of_key(edge.home.adapters, signing.public_key(key)).pointer().version == 0


async def test_a_newer_wish_is_not_taken_for_the_one_that_was_followed(edge: Edge) -> None:
    state.want_adapter(edge.pool, 1, now_ms=5)
    old = state.wanted_adapter(edge.pool)
    assert old is not None
    state.want_adapter(edge.pool, 2, now_ms=6)
    state.done_wanting(edge.pool, old)
    newer = state.wanted_adapter(edge.pool)
    assert newer is not None
    assert newer.version == 2


async def test_at_level_off_not_even_a_counter_is_answered(edge: Edge, engine: MlxEngine) -> None:
    joined, cohorts = member(engine.line, signing.new_key()), list[int]()
    state.keep_membership(edge.pool, joined)
    await edge._follow_membership()
    assert edge.activator is not None
    assert edge.node is None
    handlers = Handlers(
        engine,
        edge.outbox,
        consent=edge.consent,
        member=joined,
        activator=edge.activator,
        keep_cohort=cohorts.append,
        loop=asyncio.get_running_loop(),
    )
    with pytest.raises(ConsentError):
        handlers.status(StatusRequest(cohort=3))
    with pytest.raises(ConsentError):
        handlers.upload(UploadRequest([], 1 << 20))
    assert not handlers.may_leave(())
    edge.consent.set_level(Level.METRICS)
    assert handlers.may_leave(())
    assert handlers.status(StatusRequest(cohort=3)).level == "metrics"
    for cohort in (3, 0, 5):
        handlers.status(StatusRequest(cohort=cohort))
    assert cohorts == [3, 5]


class Cut:
    """A node that is told to stop."""

    def __init__(self) -> None:
        self.silent = threading.Event()

    def stop(self, *, silent: bool) -> bool:
        assert silent
        self.silent.set()
        return True


class Busy:
    """Learning at home whose thread ends when it is let: a large model is being read, say."""

    def __init__(self, node: Cut) -> None:
        self.schedule, self._node, self.ended = self, node, False

    def stop(self, timeout_s: float = 10.0) -> bool:
        if timeout_s:
            assert self._node.silent.wait(20), "the node was not cut before learning was waited for"
        return self.ended


async def test_at_level_off_the_server_is_cut_off_before_learning_is_waited_for(
    edge: Edge, engine: MlxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.keep_membership(edge.pool, member(engine.line, signing.new_key()))
    await edge._follow_membership()
    node = Cut()
    busy, begun = Busy(node), list[str]()
    edge.node, edge.learning = node, busy  # type: ignore[assignment]
    await edge._follow_membership()
    assert node.silent.is_set()
    assert edge.node is None
    assert getattr(edge, "learning") is busy, "it still learns"  # noqa: B009
    monkeypatch.setattr(edge, "_learn_at_home", lambda _: begun.append("learning"))
    edge.consent.set_level(Level.METRICS)
    await edge._follow_membership()
    assert (edge.node, begun) == (None, []), "nothing learns beside what has not ended"
    busy.ended = True
    await edge._follow_membership()
    assert edge.node is not None
    assert begun == ["learning"]
    assert edge.learning is None


async def test_a_consent_that_cannot_be_checked_is_none(edge: Edge) -> None:
    edge.consent.set_level(Level.FULL)
    assert not edge._is_silent()
    edge.pool.set_state("device.key", signing.new_key()).result()
    assert edge._is_silent()


def say(engine: MlxEngine, words: str) -> KeptStep:
    """A step of now, which retention lets be, whose prompt is what a person said."""
    now = wall_clock_ms()
    ids = engine.tokenizer.encode(words)
    answer = engine.tokenizer.encode("done, and nothing else was asked for")
    step = Step(
        step_id=new_step_id(),
        session_id="talk",
        run_id="run",
        prompt_ids=ids,
        response_ids=answer,
        response_logprobs=[-1.0] * len(answer),
        policy=engine.policy,
        sampling=Sampling(),
        finish_reason="stop",
        created_ms=now,
    )
    return KeptStep(step=step, messages=[], reply={"role": "assistant"}, started_ms=now, finished_ms=now + 1)


async def test_at_redacted_the_outbox_holds_no_secret_and_logprobs_of_what_is_sent(
    edge: Edge, engine: MlxEngine
) -> None:
    await edge.start()
    edge.consent.set_level(Level.REDACTED)
    secret = "jane.roe@company-mail.com"
    kept = say(engine, f"please write to {secret} about the garden")
    await asyncio.wrap_future(edge.pool.keep_step(kept))
    await edge._fill()
    (item,) = await asyncio.to_thread(edge.outbox.list)
    (step,) = wire.decode(edge.outbox.get(item.item_id).body, StepBatch).steps
    assert (item.level, item.redacted_tokens) == (Level.REDACTED, sum(length for _, length in step.redacted))
    assert step.redacted
    text = engine.tokenizer.decode(step.token_ids)
    assert "jane" not in text
    assert "company-mail" not in text
    assert "about the garden" in text
    expected = await engine.score(step.prompt_ids, step.response_ids, version=0)
    assert step.response_logprobs == pytest.approx(expected, abs=1e-3)


async def test_a_model_whose_folder_is_not_there_lets_nothing_out_redacted_and_says_so(
    tmp_path: Path, engine: MlxEngine
) -> None:
    home = EdgeHome(tmp_path / "home")
    home.make()
    gone = EdgeConfig(model=ModelConfig(path=str(tmp_path / "gone")))
    with Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool:
        edge = Edge(home, gone, pool=pool, engine=engine)
        await edge.start()
        edge.consent.set_level(Level.REDACTED)
        await asyncio.wrap_future(pool.keep_step(say(engine, "hello")))
        await edge._fill()
        assert edge.outbox.list() == []
        assert edge.outbox.waits_for_redactor()
        assert "nothing can be redacted, so at level redacted no step leaves" in edge._redaction
        await edge.stop()


async def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    home = EdgeHome(tmp_path / "home")
    home.make()
    with socket.socket() as taken, Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = EdgeConfig(model=ModelConfig(path="/nowhere"), gateway=GatewaySettings(port=taken.getsockname()[1]))
        with pytest.raises(ConfigError, match="cannot listen on 127"):
            await serve(home, config, pool=pool)


async def test_a_second_signal_cuts_the_calls_that_the_first_one_waits_for(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(tiny_model, ["never said"], token_delay_s=300)

    async def slow(config: EdgeConfig) -> ScriptedEngine:
        return engine

    monkeypatch.setattr("clawloop_edge.app.open_engine", slow)
    caplog.set_level(logging.INFO, logger="clawloop_edge.app")
    home = EdgeHome(tmp_path / "home")
    home.make()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen = EdgeConfig(model=ModelConfig(path=str(tiny_model)), gateway=GatewaySettings(port=port, drain_s=300))
    config.save(home.config_file, chosen)
    headers, body = {"Authorization": f"Bearer {home.token()}"}, {"messages": [{"role": "user", "content": "x"}]}
    with Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool:
        async with ClientSession(f"http://127.0.0.1:{port}", headers=headers) as http:
            serving = asyncio.create_task(serve(home, chosen, pool=pool))
            await _until(lambda: "serving on" in caplog.text)
            call = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await _until(lambda: bool(engine.health().in_flight))
            os.kill(os.getpid(), signal.SIGTERM)
            await _until(lambda: "stopping: 1 call to finish within 300 s" in caplog.text)
            found = await asyncio.to_thread(ask, home)
            assert found["state"] == f"stopping (process {os.getpid()})"
            os.kill(os.getpid(), signal.SIGINT)
            assert await asyncio.wait_for(serving, 20) == 1
            await asyncio.gather(call, return_exceptions=True)


async def _until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 - a log and an engine have no event
        await asyncio.sleep(0.01)

"""The edge before a server of texts: set up without a model folder, it serves, learns nothing, and says so."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession
from click.testing import Result
from typer.testing import CliRunner

from clawloop_edge import state
from clawloop_edge.app import Edge
from clawloop_edge.cli.root import app
from clawloop_edge.config import EdgeConfig, ModelConfig
from clawloop_edge.engine.protocol import TextEngine
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.gateway.app import make_app, make_runner
from clawloop_edge.home import EdgeHome
from clawloop_edge.node.join import Membership
from clawloop_edge.opening import open_engine
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_shared import signing
from clawloop_shared.errors import ConfigError
from clawloop_shared.levels import Level
from clawloop_shared.messages import Invitation, write_invitation

from .fake_vllm import PlainServer, running


def run(home: EdgeHome, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--home", str(home.folder), *arguments])


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """The address of a plain server."""
    async with running(PlainServer().app()) as found:
        yield found


async def test_setup_asks_the_server_for_its_model_and_needs_no_folder(tmp_path: Path, url: str) -> None:
    home = EdgeHome(tmp_path / "home")
    key = tmp_path / "key"
    key.write_text("sk-1\n")
    more = ("--key-file", "--yes", "--upstream-key-file", str(key))
    made = await asyncio.to_thread(run, home, "setup", "--upstream", url, *more)
    assert made.exit_code == 0, made.output
    assert "nothing is learned" in made.output.replace("\n", " ")
    config = home.load_config()
    assert config.model == ModelConfig(kind="upstream")
    assert config.upstream == UpstreamSettings(url=url, model="plain", key_file=str(key))
    assert "sk-1" not in home.config_file.read_text()
    engine = await open_engine(config)
    assert isinstance(engine, TextEngine)
    await engine.close()

    again = ("setup", "--upstream", url + "/v1", "--upstream-model", "named", "--yes")
    assert (await asyncio.to_thread(run, home, *again)).exit_code == 0
    assert home.load_config().upstream.key_file == "", "another address is not shown the key of this one"
    line = write_invitation(Invitation("https://x.invalid:1", "", b"r" * 32, "code"))
    refused = await asyncio.to_thread(run, home, "join", line, "--yes")
    assert "without its model folder" in str(refused.exception)


async def test_setup_beside_a_model_folder_is_for_an_exact_server(tmp_path: Path, url: str, tiny_model: Path) -> None:
    home = EdgeHome(tmp_path / "home")
    done = await asyncio.to_thread(
        run, home, "setup", "--upstream", url, "--model", str(tiny_model), "--key-file", "--yes"
    )
    assert done.exit_code == 0, done.output
    assert home.load_config().model == ModelConfig(path=str(tiny_model), kind="upstream")


def test_setup_refuses_an_address_that_is_none_and_a_server_that_is_away(tmp_path: Path) -> None:
    home = EdgeHome(tmp_path / "home")
    for address, words in (("localhost", "base URL"), ("http://127.0.0.1:9", "cannot reach")):
        done = run(home, "setup", "--upstream", address, "--key-file", "--yes")
        assert done.exit_code == 1
        assert words in str(done.exception)
    assert not home.exists
    assert run(home, "setup", "--upstream", "http://x", "--script", "y", "--yes").exit_code == 2


async def test_before_a_server_of_texts_the_edge_answers_no_server(tmp_path: Path, url: str) -> None:
    home = EdgeHome(tmp_path / "home")
    home.make()
    config = EdgeConfig(model=ModelConfig(kind="upstream"), upstream=UpstreamSettings(url=url))
    engine = await open_engine(config)
    with Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool:
        edge = Edge(home, config, pool=pool, engine=engine)
        state.keep_membership(pool, _member(engine))
        edge.consent.set_level(Level.FULL)
        state.want_adapter(pool, 1, now_ms=5)
        await edge.start()
        gateway = make_app(engine, pool, settings=config.gateway, token="t" * 20)
        gateway.router.add_get("/v1/status", edge.status)
        runner = make_runner(gateway)
        await runner.setup()
        from aiohttp import web

        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession(headers={"Authorization": "Bearer " + "t" * 20}) as http:
            port = runner.addresses[0][1]
            found = json.loads(await (await http.get(f"http://127.0.0.1:{port}/v1/status")).text())
        assert found["server_state"] == "silent (the upstream server gives no token ids)"
        assert found["engine_alive"]
        assert found["encryption"] == "file (SQLCipher) and rows"
        assert (edge.node, edge.activator) == (None, None)
        state.forget_membership(pool)
        await edge._watch()
        assert edge.member is None
        await edge.stop()
        await runner.cleanup()
    await engine.close()


def _member(engine: object) -> Membership:
    assert isinstance(engine, TextEngine)
    key = signing.new_key()
    return Membership(
        device_id="one",
        url="https://one.invalid:1",
        ca_pem="",
        root_key=b"r" * 32,
        release_key=signing.public_key(key),
        line=engine.line,
        device_key=b"d" * 32,
        node_key_pem="",
        node_id=1,
    )


async def test_an_unknown_kind_of_engine_names_those_that_are(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"mlx.*upstream.*scripted"):
        await open_engine(EdgeConfig(model=ModelConfig(kind="vllm", path=str(tiny_model))))

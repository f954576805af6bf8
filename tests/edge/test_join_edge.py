"""The running edge around its membership: what `status` and `doctor` say of it; new keys change nothing else."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from clawloop_edge import state
from clawloop_edge.app import Edge
from clawloop_edge.cli import doctor
from clawloop_edge.config import EdgeConfig, ModelConfig
from clawloop_edge.engine.mlx import MlxEngine
from clawloop_edge.home import EdgeHome
from clawloop_edge.node import rotating
from clawloop_edge.node.join import Membership, join
from clawloop_edge.node.worker import NodeState
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.privacy.consent import Recipient
from clawloop_edge.privacy.device_keys import request_key
from clawloop_server.hub.devices import DeviceState
from clawloop_shared.levels import Level
from clawloop_shared.signing import key_words

from .members_hub import MembersHub, serving


@pytest.fixture
def hub(tmp_path: Path, engine: MlxEngine) -> Iterator[MembersHub]:
    """A server that approves each device."""
    with serving(tmp_path / "hub", line=engine.line, approve=True) as running:
        yield running


@pytest.fixture
async def edge(tmp_path: Path, engine: MlxEngine, tiny_model: Path) -> AsyncIterator[Edge]:
    """An edge that was not started, on a home with an empty pool."""
    home = EdgeHome(tmp_path / "home")
    home.make()
    with Pool.open(home.folder, KnownKey.of(b"k" * 32), writer=True) as pool:
        edge = Edge(home, EdgeConfig(model=ModelConfig(path=str(tiny_model))), pool=pool, engine=engine)
        yield edge
        await edge.stop()


async def joined(edge: Edge, hub: MembersHub) -> Membership:
    member = await asyncio.to_thread(join, hub.invite(), line=hub.line)
    edge.consent.set_recipient(Recipient(member.url, member.root_key))
    state.keep_membership(edge.pool, member)
    await edge._follow_membership()
    return member


async def until(condition: Callable[[], object]) -> None:
    def wait() -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.02)

    await asyncio.to_thread(wait)


async def test_a_device_that_waits_shows_its_words_silent_or_not(edge: Edge, hub: MembersHub) -> None:
    member = await joined(edge, hub)
    words = f"compare these words: {key_words(member.keys.public)}"
    assert edge._server_state() == "silent (level off)"
    assert words in edge._server_detail()
    edge.consent.set_level(Level.METRICS)
    await edge._follow_membership()
    node = edge.node
    assert node is not None
    await until(lambda: node.status.state is NodeState.WAITING)
    assert words in edge._server_detail()
    hub.devices.approve(member.device_id)
    node.poke()
    await until(lambda: not state.waits(edge.pool, member))
    edge.consent.set_level(Level.OFF)
    await edge._follow_membership()
    assert edge._server_detail() == "", "it remembers that it was approved"


async def test_new_keys_end_no_adapter_and_the_edge_finishes_what_a_killed_command_began(
    edge: Edge, hub: MembersHub
) -> None:
    member = await joined(edge, hub)
    activator = edge.activator
    assert activator is not None
    rotating._begin(edge.pool, member, 0)  # all that a command which was killed at once has left
    await edge._ask_deletions()
    await edge._follow_membership()
    assert edge.member is not None
    assert (edge.member.same_as(member), edge.member.keys == member.keys) == (True, False)
    assert edge.activator is activator
    assert hub.devices.get(member.device_id).device_key == edge.member.keys.public
    assert request_key(edge.pool, member.device_id) == edge.member.device_key


async def test_the_edge_says_the_goodbye_that_a_killed_command_did_not(edge: Edge, hub: MembersHub) -> None:
    member = await joined(edge, hub)
    state.forget_membership(edge.pool)
    await edge._follow_membership()
    assert edge.member is None
    await edge._ask_deletions()
    assert hub.devices.get(member.device_id).state is DeviceState.LEFT


@pytest.mark.parametrize(
    ("told", "states"),
    [
        ({"running": False}, []),
        ({"running": True, "server": ""}, []),
        ({"running": True, "server": "https://x", "server_state": "online", "server_detail": ""}, ["ok"]),
        ({"running": True, "server": "https://x", "server_state": "silent (level off)", "server_detail": ""}, ["ok"]),
        ({"running": True, "server": "https://x", "server_state": "online", "server_detail": "two edges"}, ["warn"]),
        ({"running": True, "server": "https://x", "server_state": "clock off", "server_detail": "by 24 h"}, ["warn"]),
        ({"running": True, "server": "https://x", "server_state": "waiting", "server_detail": "words"}, ["warn"]),
    ],
)
def test_doctor_tells_how_the_edge_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, object], states: list[str]
) -> None:
    home = EdgeHome(tmp_path)
    home.token_file.write_text("token")
    monkeypatch.setattr(doctor, "ask", lambda _: told)
    found = list(doctor.check_server(home))
    assert [finding.state for finding in found] == states
    assert all(finding.mend for finding in found if finding.state == "warn")

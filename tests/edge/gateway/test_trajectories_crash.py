"""kill -9 loses nothing of a trajectory that was acknowledged."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from clawloop_edge.gateway.trajectory_store import TrajectoryStore
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.sessions.names import SessionNames
from clawloop_shared.records import Channel
from clawloop_shared.signals import assemble

from .conftest import TOKEN
from .rollouts import chat, post

ASKED = [{"role": "user", "content": "hi"}]
GATEWAY = """
import asyncio, sys
from pathlib import Path
from aiohttp import web
from clawloop_edge.engine.scripted import ScriptedEngine
from clawloop_edge.gateway.app import make_app, make_runner
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.pool.keys import KnownKey
from clawloop_edge.pool.store import Pool
from clawloop_edge.sessions.names import SessionNames

async def main(folder, key, model, token):
    with Pool.open(Path(folder), KnownKey.of(bytes.fromhex(key)), writer=True) as pool:
        engine = ScriptedEngine(Path(model), ["a"] * 9)
        runner = make_runner(make_app(engine, pool, settings=GatewaySettings(), token=token))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def start(folder: Path, key: bytes, model: Path) -> "subprocess.Popen[str]":
    """A gateway in a process of its own; the first line that it prints is its port."""
    command = [sys.executable, "-c", GATEWAY, str(folder), key.hex(), str(model), TOKEN]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


async def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path, tiny_model: Path) -> None:
    key = os.urandom(32)
    auth = {"Authorization": f"Bearer {TOKEN}"}
    with start(tmp_path, key, tiny_model) as server:
        try:
            assert server.stdout is not None
            home = f"http://127.0.0.1:{int(server.stdout.readline())}"
            begun = [(await post(f"{home}/init_trajectory", headers=auth)).json() for _ in range(2)]
            judged, registered = (f"{home}/{row['trajectory_uid']}/g/v1" for row in begun)
            await post(f"{registered}/register_trajectory", {"channel": "val"})
            await chat(judged, ASKED)
            await post(f"{judged}/complete_trajectory", {"reward": 1.0})
            step = {"prompt_ids": [5], "response_ids": [6], "reward": -1, "trajectory_uid": "own", "step_index": 0}
            assert (await post(f"{home}/submit_steps", {"steps": [step]}, headers=auth)).status_code == 200
        finally:
            os.kill(server.pid, signal.SIGKILL)
    with Pool.open(tmp_path, KnownKey.of(key), writer=True) as pool:
        steps = [kept.step for name in pool.step_ids() if (kept := pool.get_step(name))]
        rewards = {t.trajectory_id: t.reward for t in assemble(steps, pool.signals(steps))}
        assert rewards == {begun[0]["trajectory_uid"]: 1.0, SessionNames(pool.tag).id_of("own"): -1.0}
        assert pool.verify().ok
        row = await TrajectoryStore(pool).find(begun[1]["trajectory_uid"])
        assert row is not None
        assert (row.row.minted, row.row.facts.channel, row.row.facts.group_id) == (True, Channel.VAL, "g")

"""scripts/bench-gateway itself: a short run works, and its client notices wrong answers. No timing is judged."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway_bench.client import Connection, WrongReplyError, make_body
from gateway_bench.measure import PHASES
from gateway_bench.report import Kept, Report
from gateway_bench.upstream import CHUNKS, event, whole

ROOT = Path(__file__).resolve().parents[2]
MOST_IDLE_MIB = 90
DONE = b"data: [DONE]\n\n"
GOOD = [event({"content": f"{number} 1 "}) for number in range(CHUNKS)]


def test_a_short_run_measures_every_contender_in_every_phase_and_loses_nothing() -> None:
    command = [sys.executable, "-m", "gateway_bench", "--quick", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    measured = {(row["phase"], row["contender"]) for row in report["rows"]}
    assert measured == {(phase.name, name) for phase in PHASES for name in ("direct", "relay", "clawloop")}
    assert all(row["calls"] and not row["errors"] for row in report["rows"])
    assert all(row["cpu_low"] > 0 for row in report["rows"] if row["contender"] != "direct")
    assert report["kept"]["answered"] == report["kept"]["steps"] > report["memory"][1]["requests"] > 0
    assert report["memory"][1]["idle"] < MOST_IDLE_MIB  # this is no matter of load: it is what was imported
    assert all(target["found"] > 0 for target in report["targets"] if "CPU" in target["name"])


@pytest.mark.parametrize(
    ("stream", "status", "body"),
    [
        (True, 200, b"".join([*GOOD[:-1], DONE])),
        (True, 200, b"".join([*GOOD[1::-1], *GOOD[2:], DONE])),
        (True, 200, b"".join(GOOD)),
        (True, 503, b"".join([*GOOD, DONE])),
        (False, 200, whole().replace(b"7 ", b"8 ")),
        (False, 401, whole()),
    ],
    ids=["a chunk is missing", "two are swapped", "no end mark", "status 503", "another text", "status 401"],
)
async def test_a_wrong_answer_is_noticed(stream: bool, status: int, body: bytes) -> None:
    with pytest.raises(WrongReplyError):
        await ask(lambda: web.Response(status=status, body=body), stream=stream)


async def test_a_right_answer_is_timed() -> None:
    timing = await ask(lambda: web.Response(body=b"".join([*GOOD, DONE])), stream=True)
    assert 0 < timing[0] <= timing[1]
    assert (await ask(lambda: web.Response(body=whole()), stream=False))[1] > 0


async def ask(answer: Callable[[], web.Response], *, stream: bool) -> tuple[float, float]:
    """Until the first token and until the end, of a server that always answers so."""

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        return answer()

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    async with TestServer(app) as server:
        assert server.port is not None
        connection = Connection(server.port, token="token")
        try:
            timing = await connection.ask(make_body(kib=1, stream=stream), stream=stream)
        finally:
            connection.close()
    return timing.first_s, timing.total_s


@pytest.mark.parametrize("kept", [Kept(5, 4, []), Kept(4, 5, []), Kept(5, 5, ["a row does not open"])])
def test_a_run_that_lost_a_step_is_not_sound(kept: Kept) -> None:
    def report(kept: Kept) -> Report:
        return Report(machine="", versions={}, load_averages=[], rows=[], memory=[], kept=kept, targets=[])

    assert report(Kept(5, 5, [])).sound
    assert not report(kept).sound

"""The admin API: on loopback alone, with a token."""

from typing import Any

import aiohttp

from clawloop_server.hub.admin import AdminPort
from clawloop_server.hub.status import DeviceCounts, RoundCounts, ServerStatus
from clawloop_server.hub.training import TrainerEar


async def test_the_admin_api_wants_its_token_and_a_loopback_name() -> None:
    told = ServerStatus(
        running=True,
        url="https://x",
        line_id="l",
        devices=DeviceCounts(joined=1, revoked=0),
        ready_trajectories=3,
        round_trajectories=64,
        rounds=RoundCounts(),
        adapter=None,
    )

    async def status() -> ServerStatus:
        return told

    ear = TrainerEar()
    ear.hear(b'{"event": "began", "round_id": "r1", "updates": 4}')
    admin = AdminPort(token="secret", status=status, trainer=ear)
    url = f"http://127.0.0.1:{await admin.start(0)}"
    good = {"Authorization": "Bearer secret"}
    async with aiohttp.ClientSession() as client:

        async def get(path: str, **headers: str) -> tuple[int, Any]:
            async with client.get(url + path, headers=headers) as response:
                return response.status, await response.json()

        assert await get("/healthz") == (200, {"status": "ok"})
        assert (await get("/v1/status", **good))[1]["ready_trajectories"] == 3
        assert (await get("/v1/status"))[0] == 401
        assert (await get("/v1/status", Authorization="Bearer wrong"))[1]["error"]["type"] == "invalid_request_error"
        assert (await get("/v1/status", Authorization="Bearer \udcff"))[0] == 401
        assert (await get("/v1/nothing", **good))[0] == 404
        assert (await get("/v1/training", **good))[1]["training"]["updates"] == 4
        assert (await get("/v1/training?after=1", **good))[1]["events"] == []
        assert (await get("/v1/training?after=-1", **good))[0] == 400
        assert [(await get(path))[0] for path in ("/v1/training", "/metrics")] == [401, 401]
        async with client.get(url + "/metrics", headers=good) as response:
            assert response.content_type == "text/plain"
            assert "clawloop_trajectories_ready 3.0" in await response.text()
        assert (await get("/v1/status", Host="evil.example", **good))[0] == 403
    await admin.stop()

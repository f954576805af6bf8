"""`/metrics` is Prometheus' format, counts what happened, and names nothing of it."""

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from .conftest import Serve, Served

CHAT = "/v1/chat/completions"


async def _samples(served: Served) -> dict[tuple[str, tuple[str, ...]], float]:
    auth = {"Authorization": f"Bearer {served.token}"}
    async with served.http.get(served.base_url + "/metrics", headers=auth) as reply:
        assert reply.status == 200
        text = await reply.text()
    assert "secret" not in text
    found = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {(sample.name, tuple(sample.labels.values())): sample.value for sample in found}


def _said(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **more}


async def test_calls_tokens_and_times_are_counted(scripted: Serve) -> None:
    served = await scripted(lambda prompt: "a secret of three")
    for stream in (False, True):
        auth = {"Authorization": f"Bearer {served.token}"}
        body = _said("my secret", stream=stream)
        async with served.http.post(served.base_url + CHAT, json=body, headers=auth) as reply:
            assert reply.status == 200
            await reply.read()
    await served.post(CHAT, data=b"{")
    await asyncio.wait_for(asyncio.to_thread(served.pool.submit(lambda database: None).result), 10)
    found = await _samples(served)
    assert found["clawloop_requests_total", (CHAT, "200")] == 2
    assert found["clawloop_requests_total", (CHAT, "400")] == 1
    assert found["clawloop_first_token_seconds_count", ()] == 2
    assert found["clawloop_tokens_total", ("completion",)] > 4
    assert found["clawloop_tokens_total", ("prompt",)] > 10
    assert found["clawloop_steps_kept_total", ()] == 2
    assert found["clawloop_engine_up", ()] == 1
    assert not [name for name, _ in found if name.endswith("_created")], "times of making, that nobody reads"
    assert found["clawloop_version_loaded", ("0",)] == 1
    assert found["clawloop_prompts_total", ("fresh",)] + found.get(("clawloop_prompts_total", ("prefix",)), 0) == 2


async def test_paths_that_clients_make_up_are_no_labels(scripted: Serve) -> None:
    served = await scripted([])
    await served.post("/v1/secret/path", {})
    found = await _samples(served)
    assert [labels for name, labels in found if name == "clawloop_requests_total"] == [("other", "404")]


async def test_metrics_need_the_token(scripted: Serve) -> None:
    served = await scripted([])
    async with served.http.get(served.base_url + "/metrics") as reply:
        assert reply.status == 401

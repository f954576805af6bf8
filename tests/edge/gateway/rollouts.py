"""What tests of trajectories share: the calls that Claw-R1's clients make."""

from typing import Any

import httpx
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from clawloop_shared.records import Step, Trajectory
from clawloop_shared.signals import assemble

from .conftest import TOKEN, Served


def client(**more: Any) -> httpx.AsyncClient:
    """A client that loads no certificates, which takes longer than a call."""
    return httpx.AsyncClient(verify=False, timeout=30, **more)


def url(served: Served, path: str) -> str:
    """The URL as an owner configures it, with the token in it: httpx sends it as HTTP Basic."""
    return served.base_url.replace("http://", f"http://clawloop:{TOKEN}@") + path


async def begin(served: Served) -> tuple[str, str]:
    """A trajectory's id and base_url."""
    async with client() as http:
        reply = await http.post(url(served, "/init_trajectory"))
    assert reply.status_code == 200, reply.text
    return reply.json()["trajectory_uid"], reply.json()["base_url"]


async def post(address: str, body: Any = None, **more: Any) -> httpx.Response:
    async with client() as http:
        return await http.post(address, json=body, **more) if body is not None else await http.post(address, **more)


def agent(base_url: str, key: str = "not-needed") -> AsyncOpenAI:
    return AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, http_client=DefaultAsyncHttpxClient(verify=False))


async def chat(base_url: str, messages: list[Any], **more: Any) -> Any:
    async with agent(base_url) as sdk:
        return await sdk.chat.completions.with_raw_response.create(model="default", messages=messages, **more)


def steps_of(served: Served, trajectory_id: str) -> list[Step]:
    served.pool.submit(lambda database: None).result(10)
    found = [served.pool.get_step(step_id) for step_id in served.pool.step_ids()]
    steps = [kept.step for kept in found if kept is not None and kept.step.trajectory_id == served.id_of(trajectory_id)]
    return sorted(steps, key=lambda step: (step.created_ms, step.step_id))


def assembled(served: Served, *trajectory_ids: str) -> list[Trajectory]:
    steps = [step for name in trajectory_ids for step in steps_of(served, name)]
    return assemble(steps, served.pool.signals(steps))

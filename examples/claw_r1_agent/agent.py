"""A rollout program for Claw-R1's gateway, as its documents describe it: it begins trajectories, registers them with a
group, lets an OpenAI client work at the `base_url`, and completes each with a reward.

    CLAW_R1_URL=http://clawloop:TOKEN@127.0.0.1:8100 python agent.py TASKS.jsonl --n 4

Knows that gateway's four endpoints and the `openai` SDK, and nothing of whoever stands behind them.
"""

import argparse
import asyncio
import json
import os
import re

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

MAX_CALLS = 3


class Gateway:
    """The endpoints."""

    def __init__(self, url):
        self.url = url.rstrip("/")
        self.http = DefaultAsyncHttpxClient(timeout=120, trust_env=False)

    async def post(self, url, body=None):
        """The JSON answer of a POST; the token stands in the URL."""
        reply = await self.http.post(url, json=body or {})
        reply.raise_for_status()
        return reply.json()

    async def begin(self, group, metadata):
        """A trajectory of a group: its base_url."""
        begun = await self.post(f"{self.url}/init_trajectory")
        base_url = begun["base_url"].replace("/1/v1", f"/{group}/v1")
        await self.post(f"{base_url}/register_trajectory", {"channel": "train", "metadata": metadata})
        return base_url


async def play(base_url, task, http):
    """One tool loop: the calls that the model made, and its answer."""
    model = AsyncOpenAI(base_url=base_url, api_key="not-needed", http_client=http)
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [
        {"type": "function", "function": {"name": name, "description": f"Search {name}.", "parameters": city}}
        for name in task["contacts"]
    ]
    history, calls = list(task["messages"]), []
    while True:
        reply = await model.chat.completions.create(
            model="default", messages=history, tools=tools, temperature=1.0, max_tokens=48
        )
        message = reply.choices[0].message
        history.append({"role": "assistant", "content": message.content})  # as it was sampled, calls included
        if not message.tool_calls or len(calls) >= MAX_CALLS:
            return calls, message.content or ""
        for call in message.tool_calls:
            calls.append((call.function.name, call.function.arguments))
            contact = task["contacts"].get(call.function.name) if task["city"] in call.function.arguments else None
            found = {"contact": contact} if contact else {"error": "not found"}
            history.append({"role": "tool", "content": json.dumps(found)})


def reward_of(task, calls, answer):
    """1 for one call, of the directory whose contact is right, and that contact's name alone; else -1."""
    words = set(re.findall(r"\w+", answer))
    right = [name for name, contact in task["contacts"].items() if contact in task["answer"]]
    named = [name for name, contact in task["contacts"].items() if contact in words]
    return 1.0 if [name for name, _ in calls] == right == named else -1.0


async def run(gateway, group, task):
    """One trajectory from begin to end; its reward."""
    base_url = await gateway.begin(group, {"uid": task["id"], "answer": task["answer"]})
    calls, answer = await play(base_url, task, gateway.http)
    reward = reward_of(task, calls, answer)
    done = await gateway.post(f"{base_url}/complete_trajectory", {"reward": reward})
    print(f"{task['id']}: {done['steps']} steps, reward {reward:g}", flush=True)
    return reward


async def rollout(tasks, n):
    """Every task `n` times, four at a time."""
    gateway, four = Gateway(os.environ["CLAW_R1_URL"]), asyncio.Semaphore(4)

    async def one(task):
        async with four:
            return await run(gateway, f"row-{task['id']}", task)

    rewards = await asyncio.gather(*(one(task) for task in tasks for _ in range(n)))
    await gateway.http.aclose()
    print(f"{len(rewards)} trajectories, mean reward {sum(rewards) / len(rewards):.3f}")


def main():
    """Read the tasks and play them."""
    options = argparse.ArgumentParser()
    options.add_argument("tasks")
    options.add_argument("--n", type=int, default=4)
    options.add_argument("--first", type=int, default=None, help="only so many of the tasks")
    chosen = options.parse_args()
    with open(chosen.tasks) as file:
        tasks = [json.loads(line) for line in file][: chosen.first]
    asyncio.run(rollout(tasks, chosen.n))


if __name__ == "__main__":
    main()

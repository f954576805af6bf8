"""The user of the demo: asks questions, and tells what was good, by `/v1/feedback` or by what is said next.

`Office` keeps a bounded number of conversations going against one edge, forever, and counts what happened. With
`shuffle` the judgements go to the wrong conversations: the control that shows that the reward is what teaches.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections import deque
from dataclasses import dataclass, field

from openai import APIError, AsyncOpenAI

from demoworld import agent, world
from demoworld.talk import SILENCE, Talker

RECENT = 320
HEARD_TOKENS = 4
"""what the model may say to a user who only wanted to be heard"""


@dataclass
class Tally:
    """What one office saw: episodes, the recent rewards, and any call that failed or paused."""

    episodes: int = 0
    failed: int = 0
    timings: list[tuple[float, float]] = field(default_factory=list)
    """(when it ended by the monotonic clock, how long it took) of each model call, in seconds"""
    acknowledged: list[str] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def reward(self) -> float:
        """Mean reward of the last `RECENT` episodes; 0 before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else 0.0


@dataclass(frozen=True)
class Score:
    """An evaluation: mean reward, its standard error, and the share of episodes in which a tool was called."""

    episodes: int
    reward: float
    standard_error: float
    called: float


@dataclass(frozen=True)
class Played:
    """A conversation that waits for the user's judgement."""

    task: world.Task
    session: str
    episode: agent.Episode


class Office:
    """People at one edge. Knows its base URL and token. With `talks` nobody rates: they only say something next."""

    def __init__(
        self,
        base_url: str,
        token: str,
        *,
        seed: int,
        temperature: float = 1.0,
        shuffle: bool = False,
        talks: Talker | None = None,
    ) -> None:
        self._talks = talks
        self.client = AsyncOpenAI(base_url=base_url, api_key=token, max_retries=0, timeout=120)
        self.temperature, self.shuffle = temperature, shuffle
        self.tally = Tally()
        self._rng = random.Random(seed)
        self._unjudged: list[tuple[Played, float]] = []
        self._progress = asyncio.Event()

    async def __aenter__(self) -> Office:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.client.close()

    async def work(self, stop: asyncio.Event, *, concurrency: int) -> None:
        """Hold `concurrency` conversations at a time until `stop` is set, then finish those that are open."""
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(self._desk(stop))

    async def played(self, episodes: int) -> None:
        """Return when so many episodes were played and judged."""
        while self.tally.episodes < episodes:
            self._progress.clear()
            await self._progress.wait()

    async def _desk(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            task, session = world.draw_task(self._rng), uuid.uuid4().hex if self._talks else ""
            try:
                episode = await self._play(task, temperature=self.temperature, channel="train", session=session)
            except APIError:
                self.tally.failed += 1
                await asyncio.sleep(0.2)
                continue
            now = time.monotonic()
            self.tally.timings.extend((now, seconds) for seconds in episode.call_seconds)
            value = world.reward(task.kind, task.city, calls=episode.calls, answer=episode.answer)
            await self._judge(Played(task, session, episode), value)
            self.tally.episodes += 1
            self.tally.recent.append(value)
            self._progress.set()

    async def _play(self, task: world.Task, *, temperature: float, channel: str, session: str = "") -> agent.Episode:
        return await agent.play(
            self.client,
            task.messages(),
            tools=world.TOOL_SPECS,
            run_tool=world.tool_result,
            temperature=temperature,
            headers={"X-Clawloop-Channel": channel} | ({"X-Clawloop-Session": session} if session else {}),
        )

    async def _judge(self, played: Played, value: float) -> None:
        if not self.shuffle:
            await self._tell(played, value)
            return
        self._unjudged.append((played, value))
        if len(self._unjudged) < 64:
            return
        batch, self._unjudged = self._unjudged, []
        values = [v for _, v in batch]
        self._rng.shuffle(values)
        for (one, _), other in zip(batch, values, strict=True):
            await self._tell(one, other)

    async def _tell(self, played: Played, value: float) -> None:
        if self._talks is None:
            await self._rate(played.episode.completion_ids[-1], value)
            return
        words = self._talks.reaction(played.task, right=value > 0)
        if words != SILENCE:
            await self._say(played, words)

    async def _say(self, played: Played, words: str) -> None:
        """The user's next message, in the same conversation."""
        try:
            await self.client.chat.completions.create(
                model="clawloop",
                messages=[*played.episode.messages, {"role": "user", "content": words}],
                tools=list(world.TOOL_SPECS),  # type: ignore[arg-type]
                max_tokens=HEARD_TOKENS,
                extra_headers={"X-Clawloop-Session": played.session},
            )
        except APIError:
            self.tally.failed += 1

    async def _rate(self, completion_id: str, value: float) -> None:
        body = {"step_id": completion_id, "value": 2 * value - 1, "source": "demo-user"}
        try:
            await self.client.post("/feedback", body=body, cast_to=object)
        except APIError:
            self.tally.failed += 1
            return
        self.tally.acknowledged.append(completion_id)

    async def evaluate(self, *, per_pair: int, greedy: bool = False, concurrency: int = 32) -> Score:
        """Play every held-out pair `per_pair` times (phrasings in turn); nothing of it is judged or learned from."""
        todo = [
            world.Task(kind, city, n % len(world.PHRASINGS))
            for kind, city in world.pairs(world.Split.HELD)
            for n in range(per_pair)
        ]
        limit = asyncio.Semaphore(concurrency)

        async def one(task: world.Task) -> tuple[float, bool]:
            async with limit:
                episode = await self._play(task, temperature=0.0 if greedy else self.temperature, channel="val")
            value = world.reward(task.kind, task.city, calls=episode.calls, answer=episode.answer)
            return value, bool(episode.calls)

        played = await asyncio.gather(*(one(task) for task in todo))
        mean = sum(v for v, _ in played) / len(played)
        error = (mean * (1 - mean) / len(played)) ** 0.5
        return Score(len(played), mean, error, sum(c for _, c in played) / len(played))

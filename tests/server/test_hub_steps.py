"""What the hub does again and again: one step that fails holds up no other, and is tried again more and more seldom."""

import asyncio
import logging
import math

import pytest

from clawloop_server.hub.steps import Step, go_on
from clawloop_shared.errors import StorageError


class Work:
    """A clock that runs while it is looked at, and what was done when."""

    def __init__(self) -> None:
        self.now_s, self.done = 0.0, list[tuple[str, float]]()
        self.error: Exception | None = None

    def clock(self) -> float:
        return self.now_s

    async def fails(self) -> None:
        self.done.append(("fails", self.now_s))
        if self.error is not None:
            raise self.error

    async def goes(self) -> None:
        self.done.append(("goes", self.now_s))
        self.now_s += 1.0
        if self.now_s > 20:
            raise asyncio.CancelledError

    def times(self, name: str) -> list[float]:
        return [at for each, at in self.done if each == name]


@pytest.mark.parametrize(("error", "traceback"), [(StorageError("no file"), False), (KeyError("odd"), True)])
async def test_a_step_that_fails_holds_up_no_other(
    error: Exception, caplog: pytest.LogCaptureFixture, *, traceback: bool
) -> None:
    work = Work()
    work.error = error
    steps = [Step("failing", work.fails, every_s=1.0, longest_wait_s=4.0), Step("going", work.goes, every_s=0.0)]
    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        await go_on(steps, look_s=0.0, clock=work.clock)
    assert work.times("goes") == [float(second) for second in range(21)]
    assert work.times("fails") == [0.0, 1.0, 3.0, 7.0, 11.0, 15.0, 19.0]
    assert caplog.records[0].getMessage().startswith("failing failed and is tried again in 1 s: ")
    assert bool(caplog.records[0].exc_info) is traceback


async def test_a_step_of_once_is_taken_once_it_succeeds_and_no_more() -> None:
    work = Work()
    work.error = StorageError("not yet")
    once = Step("once", work.fails, every_s=math.inf)
    await once.take(work.clock)
    work.error = None
    await once.take(work.clock)
    assert once.due_s == math.inf

"""Children are kept alive, and nothing of them outlives the supervisor."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from clawloop_server.fleet.children import ChildSpec, Supervisor

SLEEP = "import time; time.sleep(600)"
FAMILY = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"
STUBBORN = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"


def spec(folder: Path, code: str, *, grace_s: float = 1.0) -> ChildSpec:
    return ChildSpec("child", [sys.executable, "-c", code], folder / "child.log", grace_s=grace_s)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def family(pid: int) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    return found


def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


async def until_async(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(until, condition)


async def test_a_killed_child_comes_back(tmp_path: Path) -> None:
    supervisor = Supervisor([spec(tmp_path, SLEEP)])
    await supervisor.start()
    try:
        first = supervisor.status[0].pid
        await until_async(lambda: family(first))
        family(first)[0].kill()
        await until_async(lambda: supervisor.status[0].restarts == 1 and supervisor.status[0].pid not in (0, first))
        assert supervisor.status[0].last_exit == 128 + signal.SIGKILL
    finally:
        await supervisor.stop()


async def test_one_that_fails_at_once_is_started_less_and_less_often(tmp_path: Path) -> None:
    once = replace(spec(tmp_path, "import sys; sys.exit(3)"), longest_wait_s=600.0)
    supervisor = Supervisor([once])
    await supervisor.start()
    try:
        await until_async(lambda: supervisor.status[0].restarts == 2 and supervisor.status[0].wait_s > 0)
        status = supervisor.status[0]
        assert (status.pid, status.last_exit) == (0, 3)
        assert 0.4 < status.wait_s <= 0.8
        assert status.log == tmp_path / "child.log"
    finally:
        await supervisor.stop()


async def test_a_start_that_the_system_refuses_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "cwd"
    folder.mkdir()
    supervisor = Supervisor([replace(spec(tmp_path, SLEEP), folder=folder)])
    await supervisor.start()
    try:
        folder.rmdir()
        supervisor.restart("child")
        await asyncio.sleep(0.5)
        folder.mkdir()
        await until_async(lambda: supervisor.status[0].restarts == 1 and supervisor.status[0].pid)
    finally:
        await supervisor.stop()


async def test_stopping_ends_grandchildren_and_those_that_ignore_it(tmp_path: Path) -> None:
    supervisor = Supervisor([spec(tmp_path, FAMILY), spec(tmp_path, STUBBORN, grace_s=0.2)])
    await supervisor.start()
    pids = [status.pid for status in supervisor.status]
    await until_async(lambda: len(family(pids[0])) == 2 and "up" in (tmp_path / "child.log").read_text())
    everyone = [process for pid in pids for process in family(pid)]
    await supervisor.stop()
    await until_async(lambda: not alive(everyone))
    assert [status.pid for status in supervisor.status] == [0, 0]


def test_no_orphan_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib, sys
from clawloop_server.fleet.children import ChildSpec, Supervisor
async def main():
    command, log = [sys.executable, "-c", {FAMILY!r}], pathlib.Path({str(tmp_path)!r}) / "log"
    supervisor = Supervisor([ChildSpec("c", command, log)])
    await supervisor.start()
    await asyncio.sleep(600)
asyncio.run(main())
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    until(lambda: len(family(supervisor.pid)) == 3)
    everyone = family(supervisor.pid)
    supervisor.kill()
    supervisor.wait()
    until(lambda: not alive(everyone))


async def test_what_a_child_prints_is_heard_line_by_line_also_the_last_words_of_one_that_dies(tmp_path: Path) -> None:
    told = list[bytes]()
    talk = "import os; print('one'); print('x' * (2 << 20)); print('two', end='', flush=True); os.write(2, b'err\\n')"
    heard_at_exit = list[int]()
    supervisor = Supervisor()
    once = replace(spec(tmp_path, talk), on_line=told.append, longest_wait_s=600.0)
    await supervisor.add(once, on_exit=lambda: heard_at_exit.append(len(told)))
    try:
        await until_async(lambda: heard_at_exit)
        assert (told[0], told[-1]) == (b"one\n", b"two")
        assert heard_at_exit[0] == len(told)
        assert (tmp_path / "child.log").read_text().splitlines()[0] == "err"
    finally:
        await supervisor.stop()

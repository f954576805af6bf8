"""The process that redacts: what it answers, what it gives away, and that it never outlives or outlasts its parent."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from clawloop_edge.config import EdgeConfig, PrivacyConfig
from clawloop_edge.errors import RedactionError
from clawloop_edge.home import EdgeHome
from clawloop_edge.privacy.redact.tokens import TokenTable
from clawloop_edge.privacy.redact_worker import JobFailed, Plan, RedactWorker
from clawloop_shared import config

DEMO_MODEL = Path(__file__).parents[2] / "scripts" / "demoworld" / "model"
TABLE = TokenTable.of(DEMO_MODEL)
KEY = "ghp_9fK2mQ7xT4bWz1Lp0RvN8cYe5HsD3aGj6VuX"


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RedactWorker]:
    chosen = EdgeConfig(privacy=PrivacyConfig(redact_words=["Projekt Nordlicht"]))
    config.save(EdgeHome(tmp_path).config_file, chosen)
    opened = RedactWorker(Plan(folder=str(DEMO_MODEL), home=str(tmp_path)))
    yield opened
    opened.close()


def ids_of(text: str) -> list[int]:
    found: list[int] = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).encode(text).ids
    return found


def chat(*turns: str) -> list[int]:
    return ids_of("".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns))


def text_of(ids: Sequence[int]) -> str:
    return TABLE.view(ids).text


def test_the_child_redacts_ids_and_texts(worker: RedactWorker) -> None:
    ids = chat(f"user\nuse {KEY} for Projekt Nordlicht", "assistant\nnoted")
    done = worker.redact(ids, session_id="s")
    assert len(done.ids) == len(ids)
    assert KEY not in text_of(done.ids)
    assert "Nordlicht" not in text_of(done.ids)
    assert "noted" in text_of(done.ids)
    assert worker.redact(done.ids, session_id="s") == done
    assert worker.redact(ids, also=["noted"]).spans != done.spans
    assert worker.text(f"thanks, {KEY}") == "thanks, [redacted]"
    assert worker.texts(ids)[-2] == "assistant\nnoted"


def test_the_child_learns_a_session(worker: RedactWorker) -> None:
    earlier, later = chat("user\nit is xK7vRosebud42"), chat("user\nmy password: xK7vRosebud42")
    assert worker.redact(earlier, session_id="s").spans == []
    worker.learn(later, session_id="s")
    assert "Rosebud" not in text_of(worker.redact(earlier, session_id="s").ids)


def test_nothing_of_what_is_asked_is_in_the_childs_arguments_environment_or_output(
    worker: RedactWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker.redact(chat(f"user\n{KEY}"), session_id=KEY)
    with pytest.raises(JobFailed):
        worker.redact([1 << 63], session_id=KEY)
    child = psutil.Process(worker.pid)
    assert KEY not in " ".join(child.cmdline())
    assert "Nordlicht" not in " ".join(child.cmdline())
    assert not any(KEY in value or "Nordlicht" in value for value in child.environ().values())
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert child.nice() >= 10


def test_a_killed_child_is_started_again(worker: RedactWorker) -> None:
    ids = chat(f"user\n{KEY}")
    done = worker.redact(ids)
    before = worker.pid
    assert before
    os.kill(before, signal.SIGKILL)
    assert worker.redact(ids) == done
    assert worker.pid not in (None, before)


def test_a_closed_worker_has_no_process_until_it_is_asked_again(worker: RedactWorker) -> None:
    worker.text("x")
    child = psutil.Process(worker.pid)
    worker.close()
    assert not child.is_running()
    assert worker.text("still works") == "still works"


def test_a_close_waits_for_no_job_and_the_job_is_not_held_for_impossible(worker: RedactWorker) -> None:
    worker.redact(chat("user\nhello"))
    assert worker.pid
    os.kill(worker.pid, signal.SIGSTOP)  # so that it never answers
    with ThreadPoolExecutor(2) as others:
        jobs = [others.submit(worker.redact, chat("user\nhello")) for _ in range(2)]
        while not worker._lock.locked():
            time.sleep(0.01)
        begun_s = time.monotonic()
        worker.close()
        for job in jobs:
            with pytest.raises(RedactionError, match="it is done again") as broken:
                job.result(timeout=10)
            assert not isinstance(broken.value, JobFailed), "what failed is left out of what leaves for good"
    assert time.monotonic() - begun_s < 2.0
    assert worker.redact(chat("user\nhello")).spans == []


def test_a_search_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    worker = RedactWorker(Plan(folder=str(DEMO_MODEL), home=str(tmp_path), job_cpu_s=1.0))
    try:
        with pytest.raises(JobFailed, match="died twice of the same text"):
            worker.text("user@example.org, " * 500_000)
        assert worker.text("x") == "x"
    finally:
        worker.close()


def test_an_error_names_its_place_and_no_content(worker: RedactWorker) -> None:
    with pytest.raises(JobFailed, match=r"OverflowError at turns\.py:\d+; this is left out of what leaves") as caught:
        worker.redact([1 << 63])
    assert str(1 << 63) not in str(caught.value)


def test_the_child_knows_what_this_machine_holds(worker: RedactWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "zq81-Vm44-Kw07-Lt96")
    assert worker.text("it says zq81-Vm44-Kw07-Lt96 here") == "it says [redacted] here"


def test_a_model_without_a_tokenizer_stops_redaction_with_its_reason(tmp_path: Path) -> None:
    worker = RedactWorker(Plan(folder=str(tmp_path), home=str(tmp_path)))
    with pytest.raises(RedactionError, match=r"nothing can be redacted, so nothing leaves: .*tokenizer\.json"):
        worker.text("x")
    assert worker.pid is None


ORPHAN = """
import os, sys, signal
from clawloop_edge.privacy.redact_worker import Plan, RedactWorker
if __name__ == "__main__":
    worker = RedactWorker(Plan(folder=sys.argv[1], home=sys.argv[2]))
    worker.text("x")
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN)
    command = [sys.executable, str(script), str(DEMO_MODEL), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.wait() == -signal.SIGKILL
    gone, alive = psutil.wait_procs([child], timeout=20)
    assert gone, f"{alive} outlived its parent"


async def test_the_event_loop_goes_on_while_the_child_searches(worker: RedactWorker) -> None:
    text = "\n".join(f"line {n} of a file, with user{n}@example.org in it" for n in range(20_000))
    worker.text("x")
    late: list[float] = []
    searching = asyncio.create_task(asyncio.to_thread(worker.text, text))
    while not searching.done():
        before = time.monotonic()
        await asyncio.sleep(0.005)
        late.append(time.monotonic() - before - 0.005)
    assert "example.org" not in await searching
    assert sorted(late)[len(late) // 2] < 0.02

"""`python -m openclaw_drive`: some turns of the real OpenClaw through a real edge, then a table of what must hold.

Exit code 0 only if all of it holds, 1 otherwise. Everything lies in .openclaw/run, which is made anew each time.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demoworld.stage import StageError
from openclaw_drive.agent import DriveError, OpenClaw
from openclaw_drive.check import Finding, check_all, check_tool_loop
from openclaw_drive.config import Api
from openclaw_drive.drive import DAEMON, TOOL_WORD, Drive, Played, shortened
from openclaw_drive.evidence import read_decoder
from openclaw_drive.leftovers import SYSTEM_TMP, remove_leftovers

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / ".openclaw"
MODEL = ROOT / "scripts/demoworld/model"
PIPE_WIDTH = 150


def main() -> int:
    """Drive, check, print; 0 if everything holds."""
    parser = argparse.ArgumentParser(prog="scripts/openclaw", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--api", choices=[*Api, "all", "none"], default="all", help="by which API `agent --local` talks"
    )
    parser.add_argument(
        "--daemon", action=argparse.BooleanOptionalAction, default=True, help="and through OpenClaw's daemon"
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder that the edge serves")
    parser.add_argument("--tries", type=int, default=3, help="how often the model may try the tool turn")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is stopped
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    apis = {"all": list(Api), "none": []}.get(options.api) or [Api(each) for each in Api if each == options.api]
    folder, started = INSTALLED / "run", time.monotonic()
    try:
        with alone(INSTALLED):
            drive = Drive(
                OpenClaw(INSTALLED, folder),
                folder,
                model=options.model.absolute(),
                tries=options.tries,
                say=partial(console.print, markup=False),
            )
            played = drive.play(apis, through_daemon=options.daemon)
    except (DriveError, StageError, subprocess.TimeoutExpired) as error:
        console.print(f"openclaw: {error}", markup=False)
        return 1
    decode, end = read_decoder(options.model)
    findings = [
        *check_all(played.conversations, played.apart, decode=decode, end=end),
        *(check_tool_loop(played.conversations, part, word=TOOL_WORD) for part in [*apis, *[DAEMON] * options.daemon]),
        *played.findings,
    ]
    show(console, played, findings)
    console.print(f"{time.monotonic() - started:.0f} s; OpenClaw's and the edge's files: {folder}", markup=False)
    return 0 if all(finding.ok for finding in findings) else 1


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """An empty `folder`/run for one drive at a time, and nothing of OpenClaw's left behind outside of it.

    Raises:
        DriveError: another drive is using it.
    """
    was_there = (SYSTEM_TMP / "openclaw").exists()
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DriveError(f"another scripts/openclaw is using {folder}; wait until it is done") from error
        shutil.rmtree(folder / "run", ignore_errors=True)
        (folder / "run").mkdir(mode=0o700)
        try:
            yield
        finally:
            remove_leftovers(folder / "run/home", keep_folder=was_there)


def show(console: Console, played: Played, findings: list[Finding]) -> None:
    """Two tables: the steps, and what must hold of them."""
    columns = ("conversation", "step", "run", "kind", "prompt", "ids", "trainable", "edge |Δ|", "torch |Δ|", "text")
    steps = Table(*columns, title="steps, and how far teacher-forced logprobs are from the kept ones (nats)")
    named = [(c.talk.name, step) for c in played.conversations for step in c.steps]
    for name, s in [*named, *(("-", step) for step in played.apart)]:
        found = ["-" if d is None else f"{d:.1e}" for d in (s.max_abs_difference, s.reference_difference)]
        counts = (str(len(s.prompt_ids)), str(len(s.response_ids)))
        trainable = "yes" if s.trainable else s.untrainable
        text = Text(shortened(s.text, chars=40))
        steps.add_row(name, s.step_id[-6:], s.run_id[-6:], s.kind, *counts, trainable, *found, text)
    checks = Table("must hold", "", "against it", title="checks")
    for finding in findings:
        checks.add_row(finding.name, "ok" if finding.ok else "NO", Text("\n".join(finding.problems)))
    console.print(steps)
    console.print(checks)
    console.print("prompts by how their ids came about: " + listed(played.prompts))
    doctors = {f"{kind} ({why or 'may be learned from'})": count for (kind, why), count in played.counts.items()}
    console.print("steps, as `doctor` counts them: " + listed(Counter(doctors)))
    console.print("all of it holds" if all(finding.ok for finding in findings) else "NOT all of it holds")


def listed(counts: Counter[str]) -> str:
    """Counts in one line, the largest first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())

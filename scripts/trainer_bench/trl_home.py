"""TRL in an environment of its own (`.trl/`) that sees what .venv has: the same torch, transformers and clawloop."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import msgspec

from trainer_bench.report import Section

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".trl"
VERSION = "1.16.0"
"""its internals are called, so no other will do"""


class TrlError(Exception):
    """TRL cannot be installed or does not work here; the message says why."""


def install() -> None:
    """Make the environment if it is not there.

    Raises:
        TrlError: it cannot be made here.
    """
    done = HOME / f".installed-{VERSION}"
    if done.exists():
        return
    python = str(HOME / "bin/python")
    _run([sys.executable, "-m", "venv", "--clear", str(HOME)])
    scheme = {"base": str(HOME), "platbase": str(HOME)}
    inner = Path(sysconfig.get_path("purelib", "venv", scheme))
    (inner / "clawloop.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _run([*pip, "-c", str(ROOT / "constraints.txt"), f"trl=={VERSION}"])
    done.touch()


def measure(*, rounds: int, threads: int, quick: bool) -> Section:
    """Our step beside TRL's, in its environment.

    Raises:
        TrlError: it failed.
    """
    command = [str(HOME / "bin/python"), "-m", "trainer_bench.trl_step", "--rounds", str(rounds)]
    command += ["--threads", str(threads), *(["--quick"] if quick else [])]
    return msgspec.json.decode(_run(command), type=Section)


def _run(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True, cwd=ROOT / "scripts")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise TrlError(f"{' '.join(command[:4])} ended with {done.returncode}: {said[-1] if said else 'no word'}")
    return done.stdout

"""The trainer's process: `python -m clawloop_server.trainer.process --home HOME`.

Waits until enough rewarded trajectories are ready, runs a round, and waits again. It prints one JSON line for the start
and the end of each round and for each update (`observing.py`). It can be killed at any moment: what was not recorded is
run again from the same state. It ends when its parent does.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import msgspec

from clawloop_server.config import load_config
from clawloop_server.errors import TrainerError
from clawloop_server.home import Home, open_home
from clawloop_server.trainer.launch import Seat, find_seat, launch
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from clawloop_server.trainer.engine import TrainEngine
    from clawloop_server.trainer.settings import TrainSettings

POLL_S = 0.25
LOCK_FILE = "lock"

log = logging.getLogger("clawloop.trainer")


def main(arguments: list[str] | None = None) -> int:
    """Run until told to stop; 0, or 1 after a known failure, which is one line on stderr."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    try:
        if (seat := find_seat(os.environ)) is not None:
            _take_seat(seat, options.home, rounds=options.rounds)
            return 0
        home = open_home(options.home)
        if (count := load_config(home.config).train.processes) > 1:
            own = ["--home", str(options.home), "--rounds", str(options.rounds)]
            return launch(count, [sys.executable, "-m", "clawloop_server.trainer.process", *own])
        serve(home, rounds=options.rounds)
    except ClawloopError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def serve(
    home: Home, *, rounds: int = 0, open_engine: Callable[[Path, TrainSettings], TrainEngine] | None = None
) -> None:
    """Run rounds as data arrive; `rounds` of them, or for ever if 0. `open_engine`: how, if not for one process.

    Raises:
        TrainerError: another trainer runs on this home.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from clawloop_server.trainer.observing import Observer
    from clawloop_server.trainer.worker import Worker

    parent = os.getppid()
    with sole_trainer(home):
        worker = Worker.open(home, open_engine=open_engine)
        observer = Observer(home.trainer, emit=_emit)

        def report(metrics: dict[str, float]) -> None:
            _log_update(metrics)
            observer.updated(metrics)

        try:
            _emit({"event": "ready", "missing": worker.missing})
            done = 0
            while (not rounds or done < rounds) and os.getppid() == parent:
                judged = worker.judge()
                if worker.resting or worker.missing:
                    time.sleep(0 if judged else POLL_S)
                    continue
                observer.ended(worker.run(report, began=observer.began))
                done += 1
        finally:
            observer.close()
            worker.close()


@contextmanager
def sole_trainer(home: Home) -> Iterator[None]:
    """Hold the lock that only one trainer of a home can have; the system frees it when the process dies.

    Raises:
        TrainerError: another process has it.
    """
    with (home.trainer / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainerError(f"another trainer runs on {home.folder}; stop it first") from error
        yield


def _take_seat(seat: Seat, folder: Path, *, rounds: int) -> None:
    """Be one of several processes: the first serves, the others follow it. Does not return if anything fails."""
    from clawloop_server.trainer.distributed import BEAT_S, Processes, Pulse, end_with_the_others
    from clawloop_server.trainer.leading import begin_leading, follow

    sys.excepthook = _tell_and_end
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if seat.rank:  # a follower waits in calls that no Python handler interrupts, and owns nothing that could be lost
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    processes = Processes(seat)
    pulse = Pulse(processes, lost=lambda: end_with_the_others(seat))
    pulse.start()
    try:
        if seat.rank:
            follow(Home(folder.absolute()), processes)
        else:
            engines = []

            def open_engine(base: Path, settings: TrainSettings) -> TrainEngine:
                engines.append(begin_leading(base, settings, processes))
                return engines[-1]

            serve(open_home(folder), rounds=rounds, open_engine=open_engine)
            engines[-1].stop()
        pulse.stop()
        processes.close()
    except ClawloopError as error:
        if seat.rank:
            time.sleep(3 * BEAT_S)  # where the first process has the same to tell, it has ended this one by then
        print(error, file=sys.stderr)
        _end(1)
    except KeyboardInterrupt:
        _end(0)
    except RuntimeError:
        time.sleep(3 * BEAT_S)  # if it is only that another process is gone, the pulse ends this one first
        raise


def _tell_and_end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    traceback.print_exception(kind, error, trace)
    _end(1)


def _end(code: int) -> NoReturn:
    """End at once: at Python's own end, threads that wait for other processes would be in the way."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The trainer of a clawloop server; started by the server itself.")
    parser.add_argument("--home", type=Path, required=True, help="the server's folder")
    parser.add_argument("--rounds", type=int, default=0, help="stop after so many rounds; 0: never")
    return parser


def _emit(line: object) -> None:
    print(msgspec.json.encode(line).decode(), flush=True)


def _log_update(metrics: dict[str, float]) -> None:
    shown = ("update", "reward", "kept", "k3", "ess", "gradient_norm", "lr")
    log.info(" ".join(f"{name}={metrics[name]:.4g}" for name in shown if name in metrics))


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""`python -m fleet_chaos`: a real server and real edges under a constant stream of calls, and kill -9 at random: of
SuperLink, superexec, bridge and trainer, of the server itself, and of each edge. What supervises the last two on a real
machine (systemd, launchd) is played here: they are started again. Now and then the server's database is locked for 8 s.

At the end: every step whose call was acknowledged to its client is in the vault exactly once, under its own device, and
nothing else is; each item has its receipt; audit logs and pools verify. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from clawloop_server.home import Home
from clawloop_server.release.keys import load_master_key
from clawloop_server.vault.database import ServerDatabase
from clawloop_server.vault.seals import DeviceSeals
from clawloop_server.vault.store import Vault
from demoworld.stage import Part, StageError, make_edge, make_server

MODEL = Path(__file__).parent / "demoworld/model"
SERVER: Mapping[str, Mapping[str, object]] = {
    "fleet": {"upload_every_s": 0.2},
    "reward": {"settle_s": 3600.0},
    "train": {"batch_trajectories": 4096},
}
"""devices upload all the time, and the trainer has nothing to do"""
EDGE: Mapping[str, Mapping[str, object]] = {"privacy": {"hold_s": 0.0, "fill_every_s": 0.1}, "node": {"poll_s": 0.2}}
CHILDREN = {
    "superlink": "flower-superlink",
    "superexec": "flower-superexec",
    "bridge": "flwr-serverapp",
    "trainer": "clawloop_server.trainer.process",
}
DATABASE = "database"
"""a victim of another kind: for so long nobody but us can write to the server's"""
LOCKED_S = 8.0
HEALED_S = 180.0
PAUSE_S = (0.3, 4.0)
WAITS = 0.7
CALLS_PER_S = 4.0
DRAIN_S = 240.0


@dataclass
class Report:
    """What happened, and what it came to. Times in seconds."""

    seed: int
    seconds: float
    edges: int
    kills: dict[str, int] = field(default_factory=dict)
    slowest_back_s: dict[str, float] = field(default_factory=dict)
    """from a kill until the victim ran again and each edge had a new receipt, where that was waited for"""
    calls_failed: int = 0
    acknowledged: int = 0
    in_pools: int = 0
    in_vault: int = 0
    lost: int = 0
    doubled: int = 0
    strange: int = 0
    """in the vault, but of no step of that device's pool"""
    set_aside: int = 0
    items: int = 0
    receipts: int = 0
    drained_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        bad = self.lost or self.doubled or self.strange or self.set_aside or self.problems
        return not bad and self.items == self.receipts and self.acknowledged > 0


class Client(threading.Thread):
    """An agent that calls one edge for ever, and keeps the id of each step that it was given whole."""

    def __init__(self, edge: Part) -> None:
        super().__init__(name=f"client of {edge.name}", daemon=True)
        self.edge, self.failed = edge, 0
        self.acknowledged: list[str] = []
        self._stop_asked = threading.Event()
        self._number = 0

    def run(self) -> None:
        while not self._stop_asked.wait(random.expovariate(CALLS_PER_S)):
            self._number += 1
            try:
                self.acknowledged.append(self._call(stream=self._number % 2 == 0))
            except (OSError, http.client.HTTPException, ValueError):
                self.failed += 1

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(60)

    def _call(self, *, stream: bool) -> str:
        """The id of the step that came back whole. Raises ValueError if it did not."""
        text = f"call {self._number} of {self.edge.name}"
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "stream": stream, "user": text}
        connection = http.client.HTTPConnection("127.0.0.1", self.edge.port, timeout=30)
        try:
            headers = {"Authorization": f"Bearer {self.edge.token()}", "Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            reply = connection.getresponse()
            data = reply.read().decode()
            if reply.status != 200 or (stream and not data.rstrip().endswith("data: [DONE]")):
                raise ValueError(f"{reply.status}")
            if stream:
                data = data.split("data: ", 2)[1].split("\n", 1)[0]
            step_id: str = json.loads(data)["id"]
            return step_id
        finally:
            connection.close()


class Stage:
    """One server and some edges, joined and at level full."""

    def __init__(self, folder: Path, *, edges: int) -> None:
        self.server = make_server(folder, MODEL, settings=SERVER)
        self.edges = [make_edge(folder, MODEL, name=f"edge{n}", settings=EDGE) for n in range(edges)]
        self.devices: dict[str, str] = {}

    def start(self) -> None:
        self.server.start()
        for edge in self.edges:
            edge.start()
            invitation = self.server.run("invite", "--json", expect_json=True)["invitation"]
            known = self._devices()
            edge.run("join", invitation, "--yes")
            (self.devices[edge.name],) = self._devices() - known
            edge.run("privacy", "set", "full", "--yes")

    def stop(self) -> None:
        for part in (*self.edges, self.server):
            part.stop()

    def acknowledged(self) -> dict[str, int]:
        """How many items of each edge the server has given a receipt for; -1: that edge does not answer."""
        return {edge.name: _acknowledged(edge) for edge in self.edges}

    def pid(self, victim: str) -> int:
        """The process of a part or child; 0 if it does not run now."""
        if victim == DATABASE:
            return int(time.monotonic())
        if victim in CHILDREN:
            found = self.child(victim)
            return found.pid if found else 0
        process = self._part(victim).process
        return process.pid if process else 0

    def child(self, name: str) -> psutil.Process | None:
        """The program of that child of the server, if it runs now (not its guard)."""
        if self.server.process is None:
            return None
        try:
            for process in psutil.Process(self.server.process.pid).children(recursive=True):
                line = process.cmdline()
                if not any(part.endswith("guard.py") for part in line) and CHILDREN[name] in " ".join(line[:4]):
                    return process
        except psutil.Error:
            return None
        return None

    def kill(self, victim: str) -> bool:
        """kill -9; what no supervisor of ours watches is started again. False: it was down already."""
        if victim == DATABASE:
            self._lock()
            return True
        if victim in CHILDREN:
            found = self.child(victim)
            if found is None:
                return False
            try:
                found.kill()
            except psutil.NoSuchProcess:
                return False
            return True
        part = self._part(victim)
        part.kill()
        _start_again(part)
        return True

    def _lock(self) -> None:
        home = Home(self.server.home)
        database = ServerDatabase.open(home.database, load_master_key(home))
        try:
            with database.write():
                time.sleep(LOCKED_S)
        finally:
            database.close()

    def _part(self, name: str) -> Part:
        return next(part for part in (self.server, *self.edges) if part.name == name)

    def _devices(self) -> set[str]:
        found = self.server.run("devices", "list", "--json", expect_json=True)
        return {device["device_id"] for device in found}


def _start_again(part: Part) -> None:
    for attempt in range(3):
        try:
            part.start()
            return
        except StageError:
            part.kill()
            if attempt == 2:
                raise


def rampage(stage: Stage, report: Report, *, draw: random.Random, least: int, say: Callable[[str], None]) -> None:
    """Kill for `report.seconds`, and `least` times; each victim once before any is drawn again."""
    kills: Counter[str] = Counter()
    deck: list[str] = []
    until = time.monotonic() + report.seconds
    while time.monotonic() < until or kills.total() < least:
        if not deck:
            deck = [*CHILDREN, "server", DATABASE, *(edge.name for edge in stage.edges)]
            draw.shuffle(deck)
        victim = deck.pop()
        before, pid, began = stage.acknowledged(), stage.pid(victim), time.monotonic()
        if stage.kill(victim):
            kills[victim] += 1
            if draw.random() < WAITS:  # else the next blow falls while this one heals
                _watch(stage, victim, report, before=before, pid=pid, began=began)
                say(f"{victim} was killed, and all was well again after {time.monotonic() - began:.1f} s")
        time.sleep(draw.uniform(*PAUSE_S))
    report.kills = dict(kills)


def _watch(stage: Stage, victim: str, report: Report, *, before: dict[str, int], pid: int, began: float) -> None:
    """Wait until the victim runs again and each edge has a receipt that it had not before."""

    def healed() -> bool:
        return stage.pid(victim) not in (0, pid) and all(
            count > before[name] for name, count in stage.acknowledged().items()
        )

    wait_for(healed, HEALED_S, what=f"{victim} to heal")
    back_s = round(time.monotonic() - began, 1)
    report.slowest_back_s[victim] = max(back_s, report.slowest_back_s.get(victim, 0.0))


def wait_for(condition: Callable[[], bool], timeout_s: float, *, what: str) -> None:
    """Raises StageError: it did not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise StageError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(0.1)


def drain(stage: Stage, report: Report) -> None:
    """Wait until every edge has a receipt for all that it has."""
    began = time.monotonic()

    def empty() -> bool:
        return all(_left(edge) == 0 for edge in stage.edges)

    wait_for(empty, DRAIN_S, what="the outboxes to empty")
    time.sleep(1.0)  # what was kept last may not have been in the outbox yet
    wait_for(empty, DRAIN_S, what="the outboxes to empty")
    report.drained_s = round(time.monotonic() - began, 1)


def _acknowledged(edge: Part) -> int:
    try:
        status = edge.get("/v1/status")
    except (OSError, http.client.HTTPException):
        return -1
    count: int = status["sent_items"] - status["outbox_unacknowledged"]
    return count


def _left(edge: Part) -> int:
    status = edge.get("/v1/status")
    left: int = status["outbox_waiting"] + status["outbox_unacknowledged"]
    return left


def check(stage: Stage, clients: Sequence[Client], report: Report) -> None:
    """Compare what clients were told, what pools keep and what the vault has."""
    for client in clients:
        edge = client.edge
        pool = set(edge.run("pool", "ids", "--json", expect_json=True))
        report.in_pools += len(pool)
        report.lost += len(set(client.acknowledged) - pool)
        report.acknowledged += len(client.acknowledged)
        report.calls_failed += client.failed
        items = edge.run("outbox", "list", "--json", expect_json=True)
        report.items += len(items)
        report.receipts += sum(item["state"] == "received" for item in items)
        for command in (("audit", "verify"), ("pool", "verify")):
            try:
                edge.run(*command)
            except StageError as error:
                report.problems.append(f"{edge.name}: {error}")
        _check_vault(stage, edge, pool, report=report)


def _check_vault(stage: Stage, edge: Part, pool: set[str], *, report: Report) -> None:
    home = Home(stage.server.home)
    key, device_id = load_master_key(home), stage.devices[edge.name]
    vault = Vault.open(home, key)
    try:
        database = vault.database
        seal = DeviceSeals(database, key).open(device_id)
        names = {seal.name("step", step_id) for step_id in pool}
        kept = [row[0] for row in database.rows("SELECT step_key FROM steps WHERE device_id = ?", [device_id])]
        in_trajectories = "SELECT coalesce(sum(steps), 0) FROM trajectories WHERE device_id = ?"
        counted = database.count(in_trajectories, [device_id])
        report.set_aside += database.count("SELECT count(*) FROM set_aside WHERE device_id = ?", [device_id])
    finally:
        vault.close()
    report.in_vault += len(kept)
    report.lost += len(names - set(kept))
    report.strange += len(set(kept) - names)
    report.doubled += len(kept) - len(set(kept)) + abs(counted - len(kept))


def run(
    folder: Path, *, seconds: float, seed: int, edges: int, least: int = 0, say: Callable[[str], None] = lambda _: None
) -> Report:
    """The whole play in an empty folder.

    Raises:
        StageError: a part did not come up or back.
    """
    report = Report(seed=seed, seconds=seconds, edges=edges)
    stage = Stage(folder, edges=edges)
    try:
        stage.start()
        clients = [Client(edge) for edge in stage.edges]
        for client in clients:
            client.start()
        try:
            wait_for(lambda: min(stage.acknowledged().values()) > 0, HEALED_S, what="the first receipts")
            rampage(stage, report, draw=random.Random(seed), least=least, say=say)
        finally:
            for client in clients:
                client.stop()
        drain(stage, report)
        say(f"outboxes empty after {report.drained_s} s")
    finally:
        stage.stop()
    check(stage, clients, report)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it and tell."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--seconds", type=float, default=300.0, help="for how long to kill (300)")
    parser.add_argument("--seed", type=int, default=1, help="who is killed when (1)")
    parser.add_argument("--edges", type=int, default=2, help="how many edges (2)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--keep", type=Path, help="an empty folder to use and leave there, logs and all")
    chosen = parser.parse_args(arguments)

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    try:
        report = _in_folder(chosen.keep, seconds=chosen.seconds, seed=chosen.seed, edges=chosen.edges, say=say)
    except StageError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    facts: dict[str, Any] = {**asdict(report), "ok": report.ok}
    print(json.dumps(facts) if chosen.json else "\n".join(f"{name}: {value}" for name, value in facts.items()))
    return 0 if report.ok else 1


def _in_folder(keep: Path | None, *, seconds: float, seed: int, edges: int, say: Callable[[str], None]) -> Report:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        return run(keep, seconds=seconds, seed=seed, edges=edges, say=say)
    with tempfile.TemporaryDirectory(prefix="clawloop-chaos-") as folder:
        return run(Path(folder), seconds=seconds, seed=seed, edges=edges, say=say)


if __name__ == "__main__":
    sys.exit(main())

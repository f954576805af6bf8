"""The demo: one server, one or two edges, an agent that only knows `openai`, and a user who says what was good.

    python -m demoworld.demo [--devices 2] [--bits 4] [--talk [--flip 0.2]] [--control] [--kill] [--folder DIR]

Everything real: the edge's MLX engine and encrypted pool, Flower over TLS, the torch update, signed adapters swapped in
while the agent goes on. Ends with a table and report.html; exits 1 if the loop did not do what it promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from demoworld import report, world
from demoworld.quantise import quantise
from demoworld.stage import Part, StageError, make_edge, make_server
from demoworld.talk import Talker
from demoworld.user import Office, Score

ROOT = Path(__file__).resolve().parents[2]
MODEL = Path(__file__).resolve().parent / "model"
CONVERSATIONS = 32
PER_PAIR = 16
TARGET_REWARD = 0.86
MAX_ROUNDS, CONTROL_ROUNDS = 40, 12
MAX_SECONDS = 480
SETTLE_S = 2.0
"""what was said of an episode is heard before the episode is learned from"""
PAUSE_S = 5.0
BEFORE_AT_MOST, AFTER_AT_LEAST, CONTROL_GAIN_AT_MOST, ADAPTERS_AT_LEAST = 0.35, 0.75, 0.1, 3
TALKED_AT_LEAST, FLIPPED_GAIN_AT_LEAST = 0.7, 0.2
"""of a user who only talks, and of one whose words are the opposite of what is meant in a part of the cases"""

EDGE_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "privacy": {"hold_s": 0.0, "fill_every_s": 0.25},
    "node": {"poll_s": 0.2},
    "engine": {"prefill_batch_size": 32},
}


def server_settings(tasks_file: Path, *, control: bool) -> dict[str, dict[str, object]]:
    """What the operator of this small world sets.

    The control has no gate: it would refuse what shuffled rewards teach, and the control would show the gate at work
    and not the reward.
    """
    watched = {
        "tasks": str(tasks_file),
        "max_format_drop": 0.15,
    }  # a small model's form wavers while it changes its mind
    gate: dict[str, object] = {"required": False} if control else watched
    train: dict[str, object] = {"lr": 3e-3, "planned_updates": 120, "loss": {"kl_beta": 0.05}}
    return {"fleet": {"upload_every_s": 0.5}, "reward": {"settle_s": SETTLE_S}, "gate": gate, "train": train}


@dataclass
class Show:
    """What happened so far, for the screen and the report."""

    console: Console
    offices: list[Office]
    curves: list[report.Curve]
    started: float = field(default_factory=time.monotonic)
    swap_times: list[float] = field(default_factory=list)
    rounds: int = 0
    refused: int = 0
    waiting: int = 0
    released: int = 0
    idle: bool = False
    versions: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def table(self) -> Table:
        """The live view."""
        table = Table(title=f"{self.seconds:5.0f} s", title_justify="left")
        for name in ("device", "episodes", "reward (last 320)", "adapter", "failed calls"):
            table.add_column(name, justify="left" if name == "device" else "right")
        for curve, office, version in zip(self.curves, self.offices, self.versions, strict=True):
            tally = office.tally
            bar = "█" * round(20 * tally.reward)
            table.add_row(curve.name, str(tally.episodes), f"{bar} {tally.reward:.2f}", str(version), str(tally.failed))
        table.caption = f"server: {self.rounds} rounds, {self.waiting} trajectories waiting"
        return table

    def see(self, edges: list[Part], server: Part) -> None:
        """Ask every part how it is, and remember when a new adapter came."""
        self._see_server(server.get("/v1/status"))
        for n, (edge, curve, office) in enumerate(zip(edges, self.curves, self.offices, strict=True)):
            state = edge.get("/v1/status")
            version = state["adapter_version"]
            self.idle = self.idle and not state["outbox_waiting"] and not state["outbox_unacknowledged"]
            if version != self.versions[n]:
                self.versions[n] = version
                curve.swaps.append((self.seconds, version))
                self.swap_times.append(time.monotonic())
            if office.tally.episodes:
                curve.points.append((self.seconds, office.tally.reward))

    def _see_server(self, status: dict[str, Any]) -> None:
        rounds = status["rounds"]
        self.refused = rounds["refused"]
        self.rounds = rounds["passed"] + rounds["refused"] + rounds["failed"]
        self.waiting = status["ready_trajectories"]
        self.released = status["adapter"]["version"] if status["adapter"] else 0
        settled = not rounds["running"] and self.released == rounds["passed"]
        self.idle = settled and self.waiting < status["round_trajectories"]


def done_learning(show: Show, options: argparse.Namespace) -> bool:
    """Whether the users are content, or it went on long enough."""
    if show.rounds >= options.rounds or show.seconds > MAX_SECONDS:
        return True
    content = all(o.tally.reward >= TARGET_REWARD and o.tally.episodes > 1000 for o in show.offices)
    return content and not options.control and min(show.versions) >= ADAPTERS_AT_LEAST


async def live(show: Show, edges: list[Part], *, server: Part, options: argparse.Namespace) -> None:
    """Let the users work until the model is good, kill an edge on the way if asked, and wait for the last adapter."""
    stop = asyncio.Event()
    each = CONVERSATIONS // len(edges)
    killed = not options.kill
    with Live(show.table(), console=show.console, refresh_per_second=1) as screen:
        async with asyncio.TaskGroup() as group:
            for office in show.offices:
                group.create_task(office.work(stop, concurrency=each))
            while not stop.is_set():
                await asyncio.sleep(1.0)
                await asyncio.to_thread(show.see, edges, server)
                screen.update(show.table())
                if not killed and show.versions[0] >= 2:
                    killed = True
                    await asyncio.to_thread(kill_and_restart, edges[0], show)
                if done_learning(show, options):
                    stop.set()
        await settle(show, edges, server=server)
        screen.update(show.table())


def kill_and_restart(edge: Part, show: Show) -> None:
    """kill -9 the edge while it serves, and start it again."""
    show.console.print(f"[bold]kill -9 {edge.name}[/bold], then starting it again")
    edge.kill()
    edge.start()


async def settle(show: Show, edges: list[Part], *, server: Part) -> None:
    """Wait until the server has nothing left to learn from and every edge runs its newest adapter."""
    deadline, settled_at = time.monotonic() + 60, time.monotonic()
    while time.monotonic() < deadline:
        await asyncio.to_thread(show.see, edges, server)
        if not show.idle or any(version != show.released for version in show.versions):
            settled_at = time.monotonic()
        elif time.monotonic() - settled_at > 2 * SETTLE_S:
            return
        await asyncio.sleep(0.5)
    raise StageError(f"edges run adapters {show.versions}, the server released {show.released}")


async def measure(offices: list[Office]) -> tuple[Score, Score]:
    """Held-out reward on every edge together: sampled, then greedy."""
    sampled = [await office.evaluate(per_pair=PER_PAIR) for office in offices]
    greedy = [await office.evaluate(per_pair=1, greedy=True) for office in offices]
    return worst(sampled), worst(greedy)


def worst(scores: list[Score]) -> Score:
    """The lowest score, so that two devices are no better than the weaker one."""
    return min(scores, key=lambda score: score.reward)


def rows(
    show: Show, edges: list[Part], *, before: tuple[Score, Score], after: tuple[Score, Score]
) -> list[tuple[str, str]]:
    """The table at the end."""
    states = [edge.get("/v1/status") for edge in edges]
    near, apart = slowest_calls(show)

    def text(pair: tuple[Score, Score]) -> str:
        sampled, greedy = pair
        mean = f"{sampled.reward:.3f} ± {sampled.standard_error:.3f}"
        return f"{mean} sampled ({sampled.episodes} episodes), {greedy.reward:.2f} greedy"

    return [
        ("held-out reward before", text(before)),
        ("held-out reward after", text(after)),
        ("episodes learned from", str(sum(o.tally.episodes for o in show.offices))),
        ("steps kept", str(sum(s["steps"] for s in states))),
        ("rounds", f"{show.rounds} ({show.refused} refused by the gate)"),
        ("adapters swapped in", ", ".join(f"{len(c.swaps)} on {c.name}" for c in show.curves)),
        ("adapter in use", ", ".join(str(s["adapter_version"]) for s in states)),
        ("bytes sent to the server", f"{sum(s['sent_bytes'] for s in states):,}"),
        ("failed calls", str(sum(o.tally.failed for o in show.offices))),
        ("slowest call", f"{near:.2f} s within 2 s of a swap, {apart:.2f} s apart from swaps"),
        ("seconds", f"{show.seconds:.0f}"),
    ]


def slowest_calls(show: Show) -> tuple[float, float]:
    """The longest call (s) that ended within 2 s of a swap, and the longest of the others."""
    near, apart = 0.0, 0.0
    for ended, seconds in (timing for office in show.offices for timing in office.tally.timings):
        if any(abs(ended - swap) <= 2.0 for swap in show.swap_times):
            near = max(near, seconds)
        else:
            apart = max(apart, seconds)
    return near, apart


def broken_promises(show: Show, *, before: Score, after: Score, options: argparse.Namespace) -> list[str]:
    """What the demo promises and did not hold, one line each."""
    found = []
    if before.reward > BEFORE_AT_MOST:
        found.append(f"held-out reward before is {before.reward:.3f}, over {BEFORE_AT_MOST}")
    if options.control:
        if after.reward - before.reward > CONTROL_GAIN_AT_MOST:
            found.append(f"shuffled rewards gained {after.reward - before.reward:.3f}")
    elif after.reward < (least := wanted_after(before, options)):
        found.append(f"held-out reward after is {after.reward:.3f}, under {least:.3f}")
    if min(len(c.swaps) for c in show.curves) < ADAPTERS_AT_LEAST and not options.control:
        found.append(f"only {[len(c.swaps) for c in show.curves]} adapters were swapped in")
    if len(set(show.versions)) > 1:
        found.append(f"the edges ended on different adapters: {show.versions}")
    failed = sum(o.tally.failed for o in show.offices)
    if failed and not options.kill:
        found.append(f"{failed} agent calls failed")
    near, apart = slowest_calls(show)
    if near > max(PAUSE_S, 2 * apart) and not options.kill:
        found.append(
            f"an agent call took {near:.1f} s while an adapter was swapped in, at most {apart:.1f} s otherwise"
        )
    return found


def wanted_after(before: Score, options: argparse.Namespace) -> float:
    """What held-out reward the demo promises in the end."""
    if options.flip:
        return before.reward + FLIPPED_GAIN_AT_LEAST
    return TALKED_AT_LEAST if options.talk else AFTER_AT_LEAST


def lost_steps(show: Show, edges: list[Part]) -> int:
    """How many steps whose feedback was acknowledged are not in the pool of their edge."""
    lost = 0
    for edge, office in zip(edges, show.offices, strict=True):
        kept = set(edge.run("pool", "ids", "--json", expect_json=True))
        lost += len(set(office.tally.acknowledged) - kept)
    return lost


async def play(options: argparse.Namespace, console: Console) -> int:
    """Set the stage, run the loop, show the result; the exit code."""
    folder = options.folder
    tasks_file = folder / "gate-tasks.jsonl"
    tasks_file.write_text("".join(json.dumps(task) + "\n" for task in world.gate_tasks()))
    if options.bits:
        console.print(f"quantising the model to {options.bits} bits, for the edges and the trainer alike")
        options.model = quantise(options.model, folder / "model", bits=options.bits)
    console.print("starting the server: keys, TLS, database, SuperLink, trainer")
    server = make_server(folder, options.model, settings=server_settings(tasks_file, control=options.control))
    edges: list[Part] = []
    try:
        server.start()
        for n in range(options.devices):
            edges.append(join_edge(folder, server, name=f"edge{n + 1}", model=options.model, console=console))
        offices = [make_office(e, seed=options.seed + n, options=options) for n, e in enumerate(edges)]
        show = Show(console, offices, [report.Curve(e.name) for e in edges], versions=[0] * len(edges))
        console.print("measuring the held-out questions before anything was learned")
        before = await measure(offices)
        console.print(f"before: {before[0].reward:.3f} sampled, {before[1].reward:.2f} greedy")
        await live(show, edges, server=server, options=options)
        after = await measure(offices)
        for office in offices:
            await office.client.close()
        return finish(show, edges, before=before, after=after, options=options)
    finally:
        for part in [*edges, server]:
            part.stop()


def make_office(edge: Part, *, seed: int, options: argparse.Namespace) -> Office:
    """The users of an edge, as the options want them."""
    talks = Talker(random.Random(seed), flip=options.flip) if options.talk else None
    return Office(f"http://127.0.0.1:{edge.port}/v1", edge.token(), seed=seed, shuffle=options.control, talks=talks)


def join_edge(folder: Path, server: Part, *, name: str, model: Path, console: Console) -> Part:
    """Set up an edge, start it, join by invitation, and set the level, by the commands that its owner would use."""
    console.print(f"setting up {name}: model, keys, encrypted pool; joining by invitation; privacy level full")
    edge = make_edge(folder, model, name=name, settings=EDGE_SETTINGS)
    edge.start()
    invitation = server.run("invite", "--json", expect_json=True)["invitation"]
    edge.run("join", invitation, "--yes")
    edge.run("privacy", "set", "full", "--yes")
    return edge


def finish(
    show: Show,
    edges: list[Part],
    *,
    before: tuple[Score, Score],
    after: tuple[Score, Score],
    options: argparse.Namespace,
) -> int:
    """Print the table, write the report, and say what did not hold."""
    final = rows(show, edges, before=before, after=after)
    lost = lost_steps(show, edges)
    if not options.talk:  # who only talks is told of no step
        final.append(("acknowledged steps lost", str(lost)))
    table = Table(show_header=False, title="shuffled rewards (control)" if options.control else "the loop closed")
    for row in final:
        table.add_row(*row)
    show.console.print(table)
    path = options.folder / "report.html"
    report.write(path, show.curves, before=before[0].reward, after=after[0].reward, rows=final)
    show.console.print(f"report: {path}")
    broken = broken_promises(show, before=before[0], after=after[0], options=options)
    if lost:
        broken.append(f"{lost} acknowledged steps are not in the pool")
    for line in broken:
        show.console.print(f"[red]not held:[/red] {line}")
    return 1 if broken else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--devices", type=int, choices=(1, 2), default=1, help="how many edges (default 1)")
    parser.add_argument("--bits", type=int, choices=(3, 4, 5, 6, 8), help="quantise the model first, as mlx-lm does")
    parser.add_argument("--control", action="store_true", help="shuffle the rewards: nothing should be learned")
    parser.add_argument(
        "--talk", action="store_true", help="the user never rates: thanks, corrections, repeated questions teach"
    )
    parser.add_argument(
        "--flip",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="with --talk: say the opposite of what is meant so often",
    )
    parser.add_argument("--kill", action="store_true", help="kill -9 the first edge on the way and check what it kept")
    parser.add_argument("--rounds", type=int, help="stop after this many (default 40, with --control 12)")
    parser.add_argument("--model", type=Path, default=MODEL, help="the model folder (default: the demo's own)")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the questions asked (default: the clock)"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="where everything lies (default .demo)")
    options = parser.parse_args(arguments)
    if options.flip and not options.talk:
        parser.error("--flip needs --talk")
    options.rounds = options.rounds or (CONTROL_ROUNDS if options.control else MAX_ROUNDS)
    return options


def main() -> int:
    """Run the demo; 0 if every promise held."""
    options = parse(sys.argv[1:])
    options.folder = options.folder.absolute()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return asyncio.run(play(options, console))
    except StageError as error:
        console.print(f"[red]demo:[/red] {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())

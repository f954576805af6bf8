"""`doctor`: what is well with this edge, what is not, and how to mend it.

Each check is a function from the home to its findings; add one to `CHECKS`. A check changes nothing, asks no network
but this edge, and shows no secret.
"""

from __future__ import annotations

import hmac
import json
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
import typer

from clawloop_edge.cli.context import Json, command, console, count, home_of, print_json, print_table
from clawloop_edge.cli.service import ask
from clawloop_shared.errors import ClawloopError

if TYPE_CHECKING:
    from clawloop_edge.gateway.settings import GatewaySettings
    from clawloop_edge.home import EdgeHome
    from clawloop_edge.pool.records import StepCount
    from clawloop_edge.pool.store import Pool

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_CONNECT = "see Connect in docs/openclaw.md"
_LOG = "look into the log of `clawloop-edge serve`"
MENDS = {
    "temperature 0": "let the agent sample: a temperature above 0",
    "truncating sampler": "take top_p, top_k and min_p out of the agent's configuration",
    "unknown traffic": "OpenClaw asks without tools, or in a way that this edge does not know yet; look with `explain`",
    "the engine stopped": _LOG,
    "no logprob for every token": "the server behind the engine must return token ids and logprobs",
}
"""what to do about steps that may not be learned from, by why not"""
_SERVER_MENDS = {
    "away": "is the server running, and this device online? It is tried again by itself",
    "refused": "ask the server's operator; then leave, and join again with a new invitation",
    "waiting": "tell the server's operator these words; sync begins by itself",
    "taken": "leave with one of the two, and join again with a new invitation",
    "clock off": "set the clock (System Settings, Date & Time); sync goes on by itself",
}
"""what to do about the states of the node that need somebody"""
_MAIN = "main"
_UNKNOWN = "unknown"


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    """nothing to do"""
    WARN = "warn"
    """it works, and somebody should look"""
    FAIL = "fail"
    """it does not work"""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at: how it is, why, and how to mend it. `facts` are for programs."""

    check: str
    state: State
    reason: str
    mend: str = ""
    facts: dict[str, Any] = {}


Check = Callable[["EdgeHome"], Iterator[Finding]]


def check_home(home: EdgeHome) -> Iterator[Finding]:
    """The configuration can be read, and nobody else can read what lies beside it."""
    name = "home"
    home.load_config()
    if stat.S_IMODE(home.folder.stat().st_mode) & 0o077:
        yield _warn(name, f"others may look into {home.folder}", mend=f"chmod 700 {home.folder}")
    else:
        yield _ok(name, f"{home.config_file} is read")


def check_token(home: EdgeHome) -> Iterator[Finding]:
    """The token is there, and its owner's alone."""
    name, file = "token", home.token_file
    if not file.is_file():
        yield _warn(name, f"there is no {file} yet", mend=f"it is made by `{command(home, 'serve')}`")
        return
    facts = file.stat()
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        yield _fail(name, f"others may read {file}", mend=f"remove {file}: a new token is made; then tell your agent")
    elif not file.read_text().strip():
        yield _fail(name, f"{file} is empty", mend=f"remove {file}: a new token is made; then tell your agent")
    else:
        yield _ok(name, f"{file} is yours alone")


def check_model(home: EdgeHome) -> Iterator[Finding]:
    """The model's folder is there."""
    config, name = home.load_config(), "model"
    path = config.model.path
    if not path and config.model.kind == "upstream":
        yield _warn(name, f"{config.upstream.url} has the model", mend="nothing is learned: name its folder in `setup`")
        return
    folder, again = Path(path).expanduser(), command(home, "setup --model FOLDER")
    if not (folder / "config.json").is_file():
        yield _fail(name, f"{path or 'no folder'} is no model folder", mend=again)
    elif config.model.kind == "mlx" and not any(folder.glob("*.safetensors")):
        yield _fail(name, f"{folder} has no weights", mend=f"fetch the model again, then {again}")
    else:
        yield _ok(name, f"{folder} is there")


def check_pool(home: EdgeHome) -> Iterator[Finding]:
    """The pool opens; how many of its steps may be learned from, and why others may not; what goes, and what went."""
    from clawloop_edge.opening import open_pool
    from clawloop_edge.pool.moving import broken_off

    with open_pool(home, writer=False) as pool:
        stats, counts = pool.stats(), pool.step_counts()
        room, forgetting = _room(home, pool), list(_forgetting(home, pool))
    yield _ok("pool", f"opens: {stats.steps} steps in {stats.sessions} sessions, {stats.file_bytes >> 20} MiB")
    yield _encrypted(stats.encryption)
    if broken_off(home.folder):
        again = command(home, f"pool move-keys --to {home.load_config().pool.key}")
        yield _warn("keys", "a move of the pool's keys broke off, so they lie in two places", mend=again)
    yield _steps(home, counts, kept=stats.steps)
    yield room
    yield from forgetting


def _encrypted(how: str) -> Finding:
    """What encrypts the pool."""
    from clawloop_shared.database import encrypts

    if encrypts():
        return _ok("encryption", how)
    return _warn(
        "encryption", how, mend="pool backup FILE, then pip install sqlcipher3, then pool restore FILE --replace"
    )


def _room(home: EdgeHome, pool: Pool) -> Finding:
    """What retention lets go now, and whether there is room for more."""
    from clawloop_edge.pool.retention import plan

    name, settings, free = "room", home.load_config().retention, shutil.disk_usage(home.folder).free
    with pool.read() as database:
        found = plan(database, settings, now_ms=time.time_ns() // 1_000_000, free_bytes=free)
    size = sum(each.size_bytes for each in found.leaving)
    facts = {"free_bytes": free, "leaving": len(found.leaving), "leaving_bytes": size}
    if found.lacking_bytes:
        reason = f"{free >> 20} MiB of disk are left, {found.lacking_bytes >> 20} too few: nothing more is kept"
        mend = f"free some space, or lower [retention] free_floor_bytes in {home.config_file}"
        return _warn(name, reason, mend=mend, facts=facts)
    if not found.leaving:
        return _ok(name, f"{free >> 30} GiB of disk are left, and nothing is old enough to go", facts=facts)
    counts = Counter(each.reason for each in found.leaving)
    why = ", ".join(f"{count} for {reason}" for reason, count in counts.items())
    return _ok(name, f"{len(found.leaving)} sessions ({size >> 20} MiB) go within the hour: {why}", facts=facts)


def _forgetting(home: EdgeHome, pool: Pool) -> Iterator[Finding]:
    """What is left to do of what was forgotten."""
    from clawloop_edge.pool.finishing import unfinished
    from clawloop_edge.privacy.deletions import Deletions, DeletionState

    name = "forgetting"
    if left := unfinished(pool):
        mend = f"end other programs that read the pool; it is tried again by the edge: {command(home, 'serve')}"
        yield _warn(name, f"not finished: {', '.join(left)}", mend=mend)
    found = Counter(deletion.state for deletion in Deletions(pool).all())
    waiting, stranded = found[DeletionState.WAITING], found[DeletionState.STRANDED]
    if waiting or stranded:
        reason = f"{count(waiting, 'request')} to delete wait for a server's signed word, {stranded} cannot be sent"
        yield _warn(name, reason, mend=command(home, "privacy deletions"))


def check_privacy(home: EdgeHome) -> Iterator[Finding]:
    """What may leave, and why that is less than was chosen; what stayed at home though its level lets it out."""
    from clawloop_edge.opening import open_pool
    from clawloop_edge.privacy.consent import ConsentLog
    from clawloop_edge.privacy.outbox import Outbox

    with open_pool(home, writer=False) as pool:
        consent = ConsentLog(pool)
        state, left_out = consent.state(), Outbox(pool, consent).left_out()
    name, facts = "privacy", {"level": state.level, "chosen": state.chosen, "left_out": left_out}
    with suppress(ClawloopError):  # whether the edge can be asked is the service's check
        if redaction := ask(home).get("redaction"):
            yield _warn(name, redaction, mend=f"{_LOG}; or choose another level", facts=facts)
    if state.level is not state.chosen and not state.paused_until_ms:
        reason = f"{state.chosen} was chosen, but {state.reason}: nothing leaves"
        yield _warn(name, reason, mend=command(home, f"privacy set {state.chosen}"), facts=facts)
        return
    stayed = "".join(f"; stayed at home: {count} {reason}" for reason, count in left_out.items())
    yield _ok(name, f"level {state.level}{f', {state.reason}' if state.paused_until_ms else ''}{stayed}", facts=facts)


def _steps(home: EdgeHome, counts: list[StepCount], *, kept: int) -> Finding:
    name, counted = "steps", sum(count.steps for count in counts)
    trainable = sum(count.steps for count in counts if not count.untrainable)
    main = [count for count in counts if count.kind == _MAIN]
    facts = {"steps": counted, "trainable": trainable, "counts": msgspec.to_builtins(counts)}
    reason = f"{trainable} of {counted} may be learned from"
    if counted != kept:
        return _warn(name, f"{counted} counted, {kept} kept", mend=command(home, "pool verify"), facts=facts)
    if not counted:
        return _ok(name, "nothing was kept yet", facts=facts)
    if main and all(count.untrainable for count in main):
        mend = MENDS.get(main[0].untrainable, "see the reasons below")
        return _warn(name, f"{reason}; no ordinary turn: {main[0].untrainable}", mend=mend, facts=facts)
    unknown = sum(count.steps for count in counts if count.kind == _UNKNOWN)
    if unknown:
        return _warn(name, f"{reason}; {unknown} unknown", mend=MENDS["unknown traffic"], facts=facts)
    return _ok(name, reason, facts=facts)


def check_learning(home: EdgeHome) -> Iterator[Finding]:
    """Where deltas may leave, this device learns; or what it waits for."""
    from clawloop_edge.learn.runs import Runs
    from clawloop_edge.opening import open_pool
    from clawloop_edge.privacy.consent import ConsentLog

    name, settings = "learning", home.load_config().learn
    with open_pool(home, writer=False) as pool:
        level, history = ConsentLog(pool).level(), Runs(pool).history()
    if not level.learns_at_home:
        yield _ok(name, f"level {level}: nothing is learned at home")
        return
    if not settings.enabled:
        mend = f"set [learn] enabled = true in {home.config_file}"
        yield _warn(name, f"level {level} lets out what is learned here, and it is switched off", mend=mend)
        return
    facts: dict[str, Any] = {}
    with suppress(ClawloopError):  # whether the edge can be asked is the service's check
        facts = (ask(home) if home.token_file.is_file() else {}).get("learning") or {}
    missing = "; ".join(facts.get("missing") or ()) or "the edge does not run, or has no server"
    made = [each for each in history if each.item_id]
    if history and not history[-1].item_id:
        yield _warn(name, f"the last try came to nothing: {history[-1].reason}", mend=command(home, "learn history"))
    elif not made:
        yield _warn(name, f"it never learned so far: {missing}", mend=command(home, "learn status"), facts=facts)
    else:
        yield _ok(name, f"{count(len(made), 'delta')} made lately", facts=facts)


def check_scorers(home: EdgeHome) -> Iterator[Finding]:
    """The scorers that are configured can work, and those of a running edge do."""
    from clawloop_edge.scoring import check_scorers as problems_of

    config, name = home.load_config(), "scorers"
    running: dict[str, Any] = {}
    with suppress(ClawloopError):  # whether the edge can be asked is the service's check
        running = ask(home).get("scorers", {}) if home.token_file.is_file() else {}
    problems = problems_of(config.signals, folder=home.folder, port=config.gateway.port)
    for scorer, problem in problems.items():
        if problem:
            yield _fail(name, f"{scorer}: {problem}", mend=f"mend [signals] in {home.config_file}: docs/judging.md")
        elif found := running.get(scorer, {}).get("problem"):
            waiting = running[scorer].get("waiting", 0)
            reason = f"{scorer} failed last: {found}; {count(waiting, 'case')} waiting"
            yield _warn(name, reason, mend=f"{_LOG}; docs/judging.md")
    if not any(problems.values()):
        yield _ok(name, ", ".join(problems) or "none: only what users and programs say is heard")


def check_service(home: EdgeHome) -> Iterator[Finding]:
    """The edge answers, is ready, and keeps what passes."""
    name, gateway = "service", home.load_config().gateway
    at = f"{gateway.host}:{gateway.port}"
    status: dict[str, Any] = ask(home) if home.token_file.is_file() else {"running": False}
    if "process" in status:
        reason = f"no answer at {at}: starting or stopping (process {status['process']})"
        yield _fail(name, reason, mend=f"look again in a moment, or {_LOG}")
    elif not status["running"]:
        yield _fail(name, f"nothing answers at {at}", mend=command(home, "serve"))
    elif status["state"] != "ready":
        yield _fail(name, f"{at} is not ready: {status['state']}", mend=_mend_of(home, status["state"]))
    else:
        yield _ok(name, f"{at} is ready, serves adapter {status.get('adapter_version', 0)}")
        yield from _lost(status.get("not_kept", 0))


def _mend_of(home: EdgeHome, state: str) -> str:
    """What to do about an edge that answers and is not ready."""
    config = home.load_config()
    if state.startswith("stopping"):
        return f"when it has ended: {command(home, 'serve')}"
    if state.startswith("engine gone") and config.model.kind == "upstream":
        return f"start the server at {config.upstream.url}, or check [upstream] url in {home.config_file}"
    return _LOG


def _lost(steps: int) -> Iterator[Finding]:
    if steps:
        reason = f"{steps} steps could not be kept since the start"
        yield _warn("keeping", reason, mend="free disk space; look into the log")


def check_server(home: EdgeHome) -> Iterator[Finding]:
    """How the running edge stands with the server that was joined."""
    name = "server"
    status: dict[str, Any] = ask(home) if home.token_file.is_file() else {"running": False}
    if not status["running"] or not status.get("server"):
        return  # nobody to ask, which is the service's check; or no server was joined
    state, detail = status.get("server_state", ""), status.get("server_detail", "")
    reason = f"{status['server']}: {state}{f', {detail}' if detail else ''}"
    mend = _SERVER_MENDS.get(state, "")
    if mend or detail:
        yield _warn(name, reason, mend=mend or _LOG)
    else:
        yield _ok(name, reason)


def check_openclaw(home: EdgeHome) -> Iterator[Finding]:
    """OpenClaw, if this user has it, talks to this edge, at the right path and with the right token."""
    name, file = "openclaw", _openclaw_file()
    if not file.is_file():
        yield _ok(name, f"no {file}: nothing to look at")
        return
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        yield _warn(name, f"{file} cannot be read as JSON", mend=f"look yourself: {_CONNECT}")
        return
    gateway = home.load_config().gateway
    providers = _at(config, "models", "providers")
    mine = {key: p for key, p in providers.items() if _points_at(_at(p).get("baseUrl"), gateway)}
    if not mine:
        yield _warn(name, f"no provider in {file} points at {gateway.host}:{gateway.port}", mend=_CONNECT)
        return
    for key, provider in mine.items():
        yield from _provider(home, f"{name}: {key}", provider)
    primary = _at(config, "agents", "defaults").get("model")
    primary = primary.get("primary") if isinstance(primary, dict) else primary
    if str(primary).partition("/")[0] not in mine:
        yield _warn(name, f"its agents' model is {primary}, which is not of this edge", mend=_CONNECT)


def _provider(home: EdgeHome, name: str, provider: dict[str, Any]) -> Iterator[Finding]:
    url, api, key = str(provider["baseUrl"]), provider.get("api"), provider.get("apiKey")
    if (api == "anthropic-messages") == url.rstrip("/").endswith("/v1"):
        wanted = "without /v1" if api == "anthropic-messages" else "with /v1 at its end"
        yield _fail(name, f"baseUrl {url} does not fit the API {api}", mend=f"write the baseUrl {wanted}")
    token = home.token() if home.token_file.is_file() else ""
    if isinstance(key, str) and "$" not in key and not hmac.compare_digest(key.encode(), token.encode()):
        yield _fail(name, "its apiKey is not this edge's token", mend=f"put the content of {home.token_file} there")
    else:
        yield _ok(name, f"points at this edge ({api})")


def _openclaw_file() -> Path:
    """Where OpenClaw's configuration is: what its own environment variables say, else its folder in the user's home."""
    chosen = os.environ.get("OPENCLAW_CONFIG_PATH", "").strip()
    folder = os.environ.get("OPENCLAW_STATE_DIR", "").strip() or "~/.openclaw"
    return Path(chosen or f"{folder}/openclaw.json").expanduser()


def _points_at(url: object, gateway: GatewaySettings) -> bool:
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        return parts.port == gateway.port and parts.hostname in {*_LOOPBACK, gateway.host, *gateway.allowed_hosts}
    except ValueError:
        return False


def _at(value: object, *names: str) -> dict[str, Any]:
    """The object under these names, empty if there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


CHECKS: tuple[Check, ...] = (
    check_home,
    check_token,
    check_model,
    check_pool,
    check_privacy,
    check_learning,
    check_scorers,
    check_service,
    check_server,
    check_openclaw,
)
"""All that `doctor` looks at, in this order."""


def examine(home: EdgeHome) -> Iterator[Finding]:
    """Run every check; one that cannot be done is a failure of its own."""
    for check in CHECKS:
        try:
            yield from check(home)
        except (ClawloopError, OSError) as error:
            reason = str(error) if isinstance(error, ClawloopError) else f"{type(error).__name__}: {error.strerror}"
            yield _fail(check.__name__.removeprefix("check_"), reason)


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Look whether all is well: home, model, pool, service, OpenClaw, and what may be learned from. Exit 1 if not."""
    found = list(examine(home_of(context).require()))
    failed = any(finding.state is State.FAIL for finding in found)
    if as_json:
        print_json({"ok": not failed, "findings": found})
    else:
        rows = [(f.check, f.state, f.reason, f.mend) for f in found]
        print_table(("check", "is", "because", "to mend it"), rows, empty="")
        _print_counts(next((f.facts["counts"] for f in found if "counts" in f.facts), []))
    if failed:
        raise typer.Exit(1)


def _print_counts(counts: list[dict[str, Any]]) -> None:
    if not counts:
        return
    rows = [
        (c["steps"], c["kind"], c["app"], c["untrainable"] or "may be learned from", MENDS.get(c["untrainable"], ""))
        for c in counts
    ]
    console.print("steps by kind, program and reason:")
    print_table(("steps", "kind", "program", "learned from", "to mend it"), rows, empty="")


def _ok(check: str, reason: str, *, facts: dict[str, Any] | None = None) -> Finding:
    return Finding(check=check, state=State.OK, reason=reason, facts=facts or {})


def _warn(check: str, reason: str, *, mend: str, facts: dict[str, Any] | None = None) -> Finding:
    return Finding(check=check, state=State.WARN, reason=reason, mend=mend, facts=facts or {})


def _fail(check: str, reason: str, *, mend: str = "") -> Finding:
    return Finding(check=check, state=State.FAIL, reason=reason, mend=mend)


def register(app: typer.Typer) -> None:
    app.command()(doctor)

"""What the edge says of a drive: its steps by its command line, its counts, its answers over HTTP."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec

from demoworld.stage import BIN, Part
from openclaw_drive.agent import DriveError
from openclaw_drive.check import Decode, Finding, Kept

HTTP_TIMEOUT_S = 30
EXPLAIN_TIMEOUT_S = 1200
PROCESSES = 2
Reason = tuple[str, str]
"""the kind of a step, and why it may not be learned from; empty if it may"""


def read_sessions(edge: Part, names: Iterable[str], *, model: Path | None) -> dict[str, tuple[Kept, ...]]:
    """The steps of each session; with `model`, scored again by the edge, and by transformers and torch.

    Raises:
        DriveError: `explain` failed; what it said is on the terminal.
    """
    ids = {
        name: [row["step_id"] for row in edge.run("sessions", "show", name, "--json", expect_json=True)]
        for name in names
    }
    steps = _explained(edge, [step_id for each in ids.values() for step_id in each], *(["--rescore"] if model else []))
    kept = {step.step_id: step for step in (with_reference(model, steps) if model else steps)}
    return {name: tuple(kept[step_id] for step_id in each) for name, each in ids.items()}


def _explained(edge: Part, ids: Sequence[str], *options: str) -> list[Kept]:
    """What `explain` says of steps, by several processes at a time: scoring 5,000 tokens keeps a core busy for 13 s."""
    shares = [share for first in range(PROCESSES) if (share := ids[first::PROCESSES])]
    found: list[Any] = []
    with ExitStack() as running:
        for process in [running.enter_context(_explaining(edge, share, *options)) for share in shares]:
            output, _ = process.communicate(timeout=EXPLAIN_TIMEOUT_S)
            if process.returncode:
                raise DriveError(f"clawloop-edge explain ended with {process.returncode}")
            told = json.loads(output)
            found += told if isinstance(told, list) else [told]
    return msgspec.convert(found, list[Kept])


@contextmanager
def _explaining(edge: Part, ids: Sequence[str], *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(BIN / edge.command), "--home", str(edge.home), "explain", *ids, *options, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def with_reference(model: Path, steps: Sequence[Kept]) -> list[Kept]:
    """The steps with what transformers and torch say of their logprobs."""
    from openclaw_drive.reference import largest_differences

    asked = [(s.prompt_ids, s.response_ids, s.response_logprobs, s.temperature) for s in steps]
    found = largest_differences(model, asked)
    return [msgspec.structs.replace(s, reference_difference=d) for s, d in zip(steps, found, strict=True)]


def sessions_of(edge: Part) -> dict[str, int]:
    """How many steps each session has."""
    return {s["session_id"]: s["steps"] for s in edge.run("sessions", "list", "--json", expect_json=True)}


def prompts(edge: Part) -> Counter[str]:
    """How many prompts came about how, as the edge counts them for Prometheus."""
    request = Request(f"http://127.0.0.1:{edge.port}/metrics", headers={"Authorization": f"Bearer {edge.token()}"})
    with urlopen(request, timeout=HTTP_TIMEOUT_S) as reply:
        lines = reply.read().decode().splitlines()
    head = 'clawloop_prompts_total{how="'
    named = (line.removeprefix(head).partition('"} ') for line in lines if line.startswith(head))
    return Counter({how: int(float(count)) for how, _, count in named})


def doctors_counts(edge: Part) -> Counter[Reason]:
    """How many steps of which kind may be learned from, or for which reason may not, as `doctor` counts them."""
    found = edge.run("doctor", "--json", expect_json=True)["findings"]
    (facts,) = [finding["facts"] for finding in found if finding["check"] == "steps"]
    return Counter({(c["kind"], c["untrainable"]): c["steps"] for c in facts["counts"]})


def check_doctor(counts: Counter[Reason], steps: Sequence[Kept]) -> Finding:
    """`doctor` counts what is there."""
    wanted = Counter((step.kind, step.untrainable) for step in steps)
    name = "`doctor` counts what may be learned from, and why the rest may not"
    return Finding(name, () if counts == wanted else (f"counted {dict(counts)}, expected {dict(wanted)}",))


def check_list(listed: dict[str, int], steps: Sequence[Kept]) -> Finding:
    """`sessions list` has the sessions of these steps, with the right number of steps each."""
    wanted = Counter(step.session_id for step in steps)
    name = "`sessions list` names these sessions and their steps"
    return Finding(name, () if listed == wanted else (f"listed {listed}, expected {dict(wanted)}",))


def check_http(edge: Part, step_id: str) -> list[Finding]:
    """Over HTTP: no answer without the token, and a feedback on a kept step is kept with it."""
    feedback = {"step_id": step_id, "value": 1.0}
    refused = call(edge, "/v1/feedback", feedback, token="wrong")
    taken = call(edge, "/v1/feedback", feedback, token=edge.token())
    signals = edge.run("explain", step_id, "--json", expect_json=True)["signals"]
    found = any(s["target_id"] == step_id and s["value"] == 1.0 for s in signals)
    return [
        Finding("a wrong token is answered 401", () if refused == 401 else (f"answered {refused}",)),
        Finding("feedback on a step is kept", () if taken == 200 and found else (f"answered {taken}, kept: {found}",)),
    ]


def call(edge: Part, path: str, body: dict[str, Any], *, token: str) -> int:
    """POST `body` as JSON; the status of the answer."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = Request(f"http://127.0.0.1:{edge.port}{path}", data=json.dumps(body).encode(), headers=headers)
    try:
        with urlopen(request, timeout=HTTP_TIMEOUT_S) as reply:
            return int(reply.status)
    except HTTPError as error:
        return error.code


def read_decoder(model: Path) -> tuple[Decode, str]:
    """How a model's own tokenizer file turns ids into text, end token included, and the text of that end token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    end = json.loads((model / "tokenizer_config.json").read_bytes())["eos_token"]
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)), str(end)

"""The play: which turns are driven through which edge, and what is asked of the edge afterwards."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec

from demoworld.stage import Part, make_edge
from openclaw_drive.agent import DriveError, OpenClaw, Turn
from openclaw_drive.check import Conversation, Decode, Finding, Kept
from openclaw_drive.transcript import Transcript, read_transcript

TOOL_WORD = "marble-42"
"""not in OpenClaw's own prompt: of a word that is (`clawloop`), a small model copies what follows it there (0 of 12)"""
GREETING, TOOL_ORDER, THANKS = "hello", f"Use the exec tool with command: echo {TOOL_WORD}", "thank you"
HTTP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Drive:
    """One drive of `agent` with everything in `folder`; `say` takes lines of progress."""

    agent: OpenClaw
    folder: Path
    model: Path
    say: Callable[[str], object]

    def play(self, *, tries: int) -> tuple[list[Conversation], list[Finding]]:
        """Four turns and more of one conversation, one of another; what both sides keep of them; checks of the edge.

        The model samples, so each turn may be tried `tries` times, the tool turn in a fresh conversation each time. If
        the model never manages it, a scripted engine plays it in a conversation of its own.
        """
        with self._edge("edge", settings={}) as edge:
            talks, called = self._order_tool(tries)
            if not called:
                talks.append(self._ask([], "plain", GREETING, tries=tries))
                talks[-1] = self._ask(talks[-1], "plain", GREETING, tries=tries)
            for message in (THANKS, GREETING):
                talks[-1] = self._ask(talks[-1], talks[-1][0].session_key, message, tries=tries)
            talks.append(self._ask([], "other", GREETING, tries=tries))
            conversations = [self._both_sides(edge, talk) for talk in talks]
            further = [*check_http(edge, conversations[0].steps[0].step_id), check_list(edge, conversations)]
        if not called:
            self.say(f"the model did not call the tool in {tries} tries: a SCRIPTED engine plays that turn")
            conversations.append(self._scripted_tool_turn())
        return conversations, further

    def _order_tool(self, tries: int) -> tuple[list[list[Turn]], bool]:
        """Conversations of a greeting and the order, until one has run the tool; and whether the last one has."""
        talks = []
        for attempt in range(1, tries + 1):
            name = f"tool-{attempt}"
            talks.append([*self._ask([], name, GREETING, tries=tries), self._turn(name, TOOL_ORDER)])
            if self._ran_tool(talks[-1][-1]):
                return talks, True
        return talks, False

    def _ask(self, talk: list[Turn], session_key: str, message: str, *, tries: int) -> list[Turn]:
        """`talk` with the turns that it took to get an answer to `message`.

        Raises:
            DriveError: no answer in any try.
        """
        taken = list(talk)
        for _ in range(tries):
            taken.append(self._turn(session_key, message))
            if not taken[-1].failed:
                return taken
        raise DriveError(f"OpenClaw got no answer to {message!r} in {tries} tries; see {self.agent.errors}")

    def _ran_tool(self, turn: Turn) -> bool:
        results = self._transcript(turn.session_id).results
        return "exec" in turn.tools and any(TOOL_WORD in r.text and not r.is_error for r in results)

    def _scripted_tool_turn(self) -> Conversation:
        call = json.dumps({"name": "exec", "arguments": {"command": f"echo {TOOL_WORD}"}})
        script = self.folder / "script.json"
        script.write_text(json.dumps([f"<tool_call>\n{call}\n</tool_call>", f"The result is: {TOOL_WORD}"]))
        with self._edge("scripted-edge", settings={"model": {"kind": "scripted", "script": str(script)}}) as edge:
            return self._both_sides(edge, [self._turn("scripted", TOOL_ORDER)], scripted=True)

    @contextmanager
    def _edge(self, name: str, *, settings: dict[str, dict[str, object]]) -> Iterator[Part]:
        """A running edge that OpenClaw is pointed at; stopped at the end."""
        edge = make_edge(self.folder, self.model, name=name, settings=settings)
        self.say(f"{name} on port {edge.port}")
        edge.start()
        try:
            self.agent.point_at(f"http://127.0.0.1:{edge.port}/v1", token=edge.token())
            yield edge
        finally:
            edge.stop()

    def _turn(self, session_key: str, message: str) -> Turn:
        turn = self.agent.turn(session_key, message)
        if turn.failed:
            self.say(f"  {session_key}: {message!r} -> OpenClaw gave up ({turn.seconds:.0f} s)")
            return turn
        ran = f", ran {', '.join(turn.tools)}" if turn.tools else ""
        self.say(f"  {session_key}: {message!r} -> {shortened(turn.reply)}{ran} ({turn.seconds:.0f} s)")
        return turn

    def _transcript(self, session_id: str) -> Transcript:
        try:
            return read_transcript(self.agent.database, session_id)
        except (sqlite3.Error, json.JSONDecodeError, KeyError) as error:
            raise DriveError(f"{self.agent.database} is not the transcript of OpenClaw 2026.9.6: {error!r}") from error

    def _both_sides(self, edge: Part, turns: list[Turn], *, scripted: bool = False) -> Conversation:
        """OpenClaw's transcript and the edge's steps of one conversation; sampled steps are scored again."""
        name, session_id = turns[0].session_key, turns[0].session_id
        self.say(f"  reading what was kept of {name}{'' if scripted else ', and scoring it again'}")
        again = [] if scripted else ["--rescore"]
        steps = [
            msgspec.convert(edge.run("explain", row["step_id"], *again, "--json", expect_json=True), Kept)
            for row in edge.run("sessions", "show", session_id, "--json", expect_json=True)
        ]
        if not scripted:
            steps = with_reference(self.model, steps)
        return Conversation(name, tuple(turns), self._transcript(session_id), tuple(steps), scripted)


def with_reference(model: Path, steps: Sequence[Kept]) -> list[Kept]:
    """The steps with what transformers and torch say of their logprobs."""
    from openclaw_drive.reference import largest_differences

    asked = [(s.prompt_ids, s.response_ids, s.response_logprobs, s.temperature) for s in steps]
    found = largest_differences(model, asked)
    return [msgspec.structs.replace(s, reference_difference=d) for s, d in zip(steps, found, strict=True)]


def shortened(text: str, *, chars: int = 60) -> str:
    """`text` as one short line, in quotes."""
    return repr(text if len(text) <= chars else text[: chars - 1] + "…")


def check_list(edge: Part, conversations: Sequence[Conversation]) -> Finding:
    """`sessions list` names exactly these conversations, with the right number of steps each."""
    listed = {s["session_id"]: s["steps"] for s in edge.run("sessions", "list", "--json", expect_json=True)}
    wanted = {c.session_id: len(c.steps) for c in conversations}
    name = "`sessions list` names these sessions and their steps"
    return Finding(name, () if listed == wanted else (f"listed {listed}, expected {wanted}",))


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

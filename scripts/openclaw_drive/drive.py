"""The play: which turns OpenClaw is asked, by which API and through what, and both sides of it afterwards."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from demoworld.stage import Part, make_edge
from openclaw_drive import daemon
from openclaw_drive.agent import DriveError, OpenClaw, Order, Turn
from openclaw_drive.check import COMPACTION, HEARTBEAT, Conversation, Finding, Kept, Talk
from openclaw_drive.config import MAX_TOKENS, Api
from openclaw_drive.daemon import Daemon
from openclaw_drive.evidence import (
    Reason,
    check_doctor,
    check_http,
    check_list,
    doctors_counts,
    prompts,
    read_sessions,
    sessions_of,
)
from openclaw_drive.judging import CORRECTION, NEXT_STATE, Judged, Judgement, check_judgements

TOOL_WORD = "lantern"
"""not in OpenClaw's own prompt: of a word that is (`clawloop`), a small model copies what follows it there (0 of 12).
A plain word it copies always (27 of 27), digits it garbles (`marble-42`: 16 of 27)"""
GREETING, TOOL_ORDER, THANKS = "hello", f"Use the exec tool with command: echo {TOOL_WORD}", "thank you"
SCORER_TIMEOUT_S = 20.0
"""how long the edge may take to judge an answer by what came next"""
DAEMON = "daemon"
"""the part of a drive that goes through OpenClaw's daemon; the others are named after their API"""


@dataclass(frozen=True)
class Played:
    """Both sides of all conversations, the steps of no conversation, and what the edge that sampled says of them: how
    prompts came about, what `doctor` counts, further checks."""

    conversations: list[Conversation]
    apart: list[Kept]
    prompts: Counter[str]
    counts: Counter[Reason]
    findings: list[Finding]


@dataclass(frozen=True)
class Drive:
    """One drive of `agent` with everything in `folder`; `say` takes lines of progress.

    The model samples, so each turn may be tried `tries` times, a tool turn in a fresh conversation each time.
    """

    agent: OpenClaw
    folder: Path
    model: Path
    tries: int
    say: Callable[[str], object]

    def play(self, apis: Sequence[Api], *, through_daemon: bool) -> Played:
        """A conversation by each API, several through the daemon; what both sides keep of them.

        Where the model never manages the tool call, a scripted engine plays that turn in a conversation of its own.
        """
        with self._edge("edge", settings={}) as edge:
            talks = [talk for api in apis for talk in self._locally(edge, api)]
            judged = Judged()
            if through_daemon:
                through, judged = self._through_daemon(edge)
                talks += through
                self._await_correction(edge, judged)
            played = self._both_sides(edge, talks)
            played.findings.extend(check_judgements(played.conversations, judged))
        for part in [*apis, *([DAEMON] if through_daemon else [])]:
            if not any(self._ran_tool(turn) for talk in talks if talk.part == part for turn in talk.turns):
                self.say(f"the model did not call the tool in {self.tries} tries: a SCRIPTED engine plays {part}")
                played.conversations.append(self._scripted_tool_turn(part))
        return played

    def _locally(self, edge: Part, api: Api) -> list[Talk]:
        """Conversations of a greeting and the order, until one has run the tool; then the last one's thanks."""
        self.say(f"{api}, by openclaw agent --local")
        self.agent.point_at(edge, api)
        talks: list[list[Turn]] = []
        for attempt in range(1, self.tries + 1):
            name = f"{api}-{attempt}"
            talks.append([*self._ask(name, GREETING), self._turn(name, TOOL_ORDER)])
            if self._ran_tool(talks[-1][-1]):
                break
        talks[-1] += self._ask(talks[-1][0].session_key, THANKS)
        return [Talk(api, tuple(turns)) for turns in talks]

    def _through_daemon(self, edge: Part) -> tuple[list[Talk], Judged]:
        """Two conversations at a time, the last one summarised; one of the dashboard's, woken in between and judged."""
        self.say("starting OpenClaw's daemon")
        with daemon.running(self.agent, edge) as running:
            talks = self._pairs()
            name = talks[-1][0].session_key
            self.say(f"  {name}: {'summarised' if running.compact(name) else 'OpenClaw made no summary'}")
            talks[-1] += self._at_once([name], THANKS)
            dashboard, judged = self._dashboard(running, "dashboard:1")
        *plain, summarised = [Talk(DAEMON, tuple(turns)) for turns in talks]
        talked = [
            *plain,
            replace(summarised, asides=frozenset({COMPACTION})),
            Talk(DAEMON, tuple(dashboard), frozenset({HEARTBEAT})),
        ]
        return talked, judged

    def _pairs(self) -> list[list[Turn]]:
        """Two conversations at a time of a greeting and the order, until one has run the tool."""
        talks: list[list[Turn]] = []
        for attempt in range(1, self.tries + 1):
            names = [f"{DAEMON}-{attempt}-{side}" for side in ("a", "b")]
            greeted, ordered = self._at_once(names, GREETING), self._at_once(names, TOOL_ORDER)
            talks += [list(pair) for pair in zip(greeted, ordered, strict=True)]
            if any(map(self._ran_tool, ordered)):
                break
        return talks

    def _dashboard(self, running: Daemon, name: str) -> tuple[list[Turn], Judged]:
        """A greeting and a reaction to it, for which OpenClaw wakes the model; what is said then is still of the
        greeting's answer. Thanks, a word for their answer, and a message that corrects it."""
        greeted = self._told(running.chat(Order(name, GREETING)))
        greeting = self._answer(greeted)
        running.wake(greeted)
        self.say(f"  {name}: the model answered to a reaction")
        bad = self._command(running, greeted, "/bad too short")
        thanked = self._told(running.chat(Order(name, THANKS)))
        thanks = self._answer(thanked)
        good = self._command(running, thanked, "/good well said")
        corrected = self._told(running.chat(Order(name, CORRECTION)))
        judgements = (
            Judgement(greeting, good=True, words=f"reaction {daemon.REACTION}"),
            Judgement(greeting, good=False, words="too short"),
            Judgement(thanks, good=True, words="well said"),
        )
        return [greeted, thanked, corrected], Judged(judgements, (bad, good), corrected=thanks)

    def _command(self, running: Daemon, turn: Turn, text: str) -> str:
        reply = running.command(turn, text)
        self.say(f"  {turn.session_key}: {text!r} -> {shortened(reply)}")
        return reply

    def _answer(self, turn: Turn) -> str:
        """The completion id of the last answer that was asked for."""
        said = [said for said in self.agent.transcript(turn.session_id).said if not said.heartbeat]
        if not said:
            raise DriveError(f"OpenClaw has no answer on record in {turn.session_key}")
        return said[-1].response_id

    def _await_correction(self, edge: Part, judged: Judged) -> None:
        """Wait until the edge has read what came after the corrected answer, or it takes too long."""
        deadline = time.monotonic() + SCORER_TIMEOUT_S
        while time.monotonic() < deadline:
            signals = edge.run("explain", judged.corrected, "--json", expect_json=True)["signals"]
            if any(signal["source"] == NEXT_STATE for signal in signals):
                return
            time.sleep(0.5)
        self.say(f"no {NEXT_STATE} signal within {SCORER_TIMEOUT_S:.0f} s")

    def _scripted_tool_turn(self, part: str) -> Conversation:
        call = json.dumps({"name": "exec", "arguments": {"command": f"echo {TOOL_WORD}"}})
        script = self.folder / "script.json"
        script.write_text(json.dumps([f"<tool_call>\n{call}\n</tool_call>", f"The result is: {TOOL_WORD}"]))
        name = f"scripted-{part}"
        with self._edge(f"{name}-edge", settings={"model": {"kind": "scripted", "script": str(script)}}) as edge:
            if part == DAEMON:
                with daemon.running(self.agent, edge):
                    turns = self._at_once([name], TOOL_ORDER)
            else:
                self.agent.point_at(edge, Api(part))
                turns = [self._turn(name, TOOL_ORDER)]
            kept = read_sessions(edge, sessions_of(edge), model=None)
            return self._conversation(Talk(part, tuple(turns), scripted=True), kept)

    @contextmanager
    def _edge(self, name: str, *, settings: dict[str, dict[str, object]]) -> Iterator[Part]:
        """A running edge; stopped at the end."""
        settings = {"gateway": {"default_max_tokens": MAX_TOKENS}, **settings}
        edge = make_edge(self.folder, self.model, name=name, settings=settings)
        self.say(f"{name} on port {edge.port}")
        edge.start()
        try:
            yield edge
        finally:
            edge.stop()

    def _ask(self, session_key: str, message: str) -> list[Turn]:
        """The turns that it took to get an answer.

        Raises:
            DriveError: no answer in any try.
        """
        taken = []
        for _ in range(self.tries):
            taken.append(self._turn(session_key, message))
            if not taken[-1].failed:
                return taken
        raise DriveError(f"OpenClaw got no answer to {message!r} in {self.tries} tries; see {self.agent.errors}")

    def _turn(self, session_key: str, message: str) -> Turn:
        return self._told(self.agent.turn(Order(session_key, message)))

    def _at_once(self, session_keys: Sequence[str], message: str) -> list[Turn]:
        return [self._told(turn) for turn in self.agent.turns_at_once([Order(key, message) for key in session_keys])]

    def _told(self, turn: Turn) -> Turn:
        ran = f", ran {', '.join(turn.tools)}" if turn.tools else ""
        reply = "OpenClaw gave up" if turn.failed else shortened(turn.reply)
        self.say(f"  {turn.session_key}: {turn.message!r} -> {reply}{ran} ({turn.seconds:.0f} s)")
        return turn

    def _ran_tool(self, turn: Turn) -> bool:
        results = self.agent.transcript(turn.session_id).results
        return "exec" in turn.tools and any(TOOL_WORD in r.text and not r.is_error for r in results)

    def _both_sides(self, edge: Part, talks: Sequence[Talk]) -> Played:
        listed, counts = sessions_of(edge), doctors_counts(edge)
        self.say(f"reading what was kept, {sum(listed.values())} steps, and scoring it again")
        kept = read_sessions(edge, listed, model=self.model)
        conversations = [self._conversation(talk, kept) for talk in talks]
        names = {talk.session_id for talk in talks}
        steps = [step for each in kept.values() for step in each]
        if not steps:
            raise DriveError(f"the edge kept nothing; see {edge.log}")
        findings = [check_doctor(counts, steps), check_list(listed, steps), *check_http(edge, steps[0].step_id)]
        apart = [step for step in steps if step.session_id not in names]
        return Played(conversations, apart, prompts(edge), counts, findings)

    def _conversation(self, talk: Talk, kept: Mapping[str, tuple[Kept, ...]]) -> Conversation:
        """Both sides of a talk."""
        return Conversation(talk, self.agent.transcript(talk.session_id), kept.get(talk.session_id, ()))


def shortened(text: str, *, chars: int = 60) -> str:
    """`text` as one short line, in quotes."""
    return repr(text if len(text) <= chars else text[: chars - 1] + "…")

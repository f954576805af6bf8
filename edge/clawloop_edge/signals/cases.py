"""Which cases new steps make, and what is in a case. Reads one snapshot of the pool; writes nothing, knows no clock.

A session is a tree: a step's predecessor is its parent, or that one's, until one is of the main line. Of a run, what is
judged is the branch that ends in its last step, so that attempts which a retry replaced are not judged with it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clawloop_edge.pool.reading import Reading
from clawloop_edge.pool.records import Json, KeptStep, StepLink
from clawloop_edge.sessions import openclaw, tree
from clawloop_edge.sessions.classify import Kind
from clawloop_edge.signals.docket import Entry, Taken
from clawloop_edge.signals.protocol import Case, Moment
from clawloop_shared.records import Target

MAX_STEPS = 64
"""of one case: the last ones"""
MAX_TOKENS = 500_000
"""prompts and responses of one case together, but for its last step: what it may take in memory"""
MAX_EARLIER = 20
_DEPTH = 16
"""side requests between a step and the main line that it goes on from, at most"""
_NEIGHBOURS = 8
ReadMetadata = Callable[[Reading, str], Json]
"""what a caller said of a trajectory"""


def take(reading: Reading, link: StepLink, *, ended_ms: int, untrainable: bool) -> Taken:
    """The cases that a new step makes. `ended_ms` is when its run counts as left alone; with `untrainable` runs are
    judged too of which nothing may be learned."""
    taken = Taken(seq=link.seq)
    if link.kind != Kind.MAIN:
        return taken
    before = _before(reading, link)
    for done in _followed(reading, link, before=before):
        taken.followed.append((done.session_id, done.run_id))
        if untrainable or reading.may_learn(done):
            taken.entries.append(_run_entry(done, Moment.FOLLOWED, next_id=link.step_id))
    if before is not None and before.run_id == link.run_id and (untrainable or before.trainable):
        taken.entries.append(
            _entry(before, Moment.CONTINUED, target=Target.STEP, target_id=before.step_id, next_id=link.step_id)
        )
    if untrainable or reading.may_learn(link):
        taken.entries.append(_run_entry(link, Moment.ENDED, due_ms=ended_ms))
    return taken


def build(reading: Reading, entry: Entry, *, metadata_of: ReadMetadata) -> Case | None:
    """What an entry stands for; None if it is not here any more."""
    last = reading.kept(entry.step_id)
    if last is None:
        return None
    trajectory_id = last.step.trajectory_id
    steps = [last]
    if entry.target is Target.RUN:
        steps = _capped(_branch(reading, last))
    elif entry.target is Target.TRAJECTORY:
        steps = _capped(_main_steps(reading, last))
    following, next_id = list[Json](), ""
    if entry.next_id:
        after = reading.kept(entry.next_id)
        if after is None:
            return None
        following, next_id = messages_after(last, after), entry.next_id
    if entry.moment is not Moment.CONTINUED:
        following = [*_told_beside(reading, last), *following]
    return Case(
        moment=entry.moment,
        target=entry.target,
        target_id=entry.target_id,
        steps=steps,
        following=following,
        following_step_id=next_id,
        earlier=earlier_turns(steps[0].messages),
        metadata=metadata_of(reading, trajectory_id) if trajectory_id else {},
    )


def _told_beside(reading: Reading, last: KeptStep) -> list[Json]:
    """What wake-ups between a step and the next turn told the agent of, as its own context: a reaction wakes it."""
    link = reading.link(last.step.step_id)
    found: list[Json] = []
    for each in reading.links_after(link, limit=_NEIGHBOURS) if link else ():
        if each.kind == Kind.MAIN:
            break
        woken = reading.kept(each.step_id) if each.kind == Kind.HEARTBEAT else None
        found += [m for m in woken.messages[-2:] if _is_context(m)] if woken else []
    return found


def _is_context(message: Json) -> bool:
    parts = tree.parts_of(message.get("content")) if message.get("role") == "user" else []
    return bool(parts) and openclaw.is_internal(parts[0])


def messages_after(step: KeptStep, after: KeptStep) -> list[Json]:
    """Of the messages that a later step was sent, those that came after an earlier one's reply.

    By the history word for word, else by the reply's tool calls, else by its text. Where the reply does not stand in
    them (as after a compaction), what came after the last reply of all.
    """
    turns = tree.turns_of(after.messages)
    chain = tree.chain(turns)
    known = tree.chain(tree.turns_of(step.messages))
    begun = known[-1] if known else tree.ROOT
    replies = [step.reply, {**step.reply, "tool_calls": []}]  # where it was delivered verbatim, it comes back as text
    wanted = {tree.reply_hash(begun, reply) for reply in replies}
    own = {tree.call_id_key(str(call.get("id", ""))) for call in step.reply.get("tool_calls") or []}
    alike = {tree.turns_of([reply])[0].digest for reply in replies}
    places = [at for at, turn in enumerate(turns) if turn.role == "assistant"][::-1]
    tests: tuple[Callable[[int], bool], ...] = (
        lambda at: chain[at] in wanted,
        lambda at: bool(own.intersection(turns[at].call_ids)),
        lambda at: turns[at].digest in alike,
        lambda at: True,
    )
    found = next((at for test in tests for at in places if test(at)), None)
    return after.messages[turns[found].index + 1 :] if found is not None else after.messages


def earlier_turns(messages: Sequence[dict[str, Any]]) -> list[str]:
    """What the user said before the last turn of theirs, oldest first, as they typed it."""
    return _user_turns(messages)[:-1][-MAX_EARLIER:]


def _user_turns(messages: Sequence[dict[str, Any]]) -> list[str]:
    turns: list[list[str]] = [[]]
    for message in messages:
        if message.get("role") == "user":
            turns[-1] += tree.user_texts(message.get("content"))
        elif message.get("role") == "assistant" and turns[-1]:
            turns.append([])
    return ["\n".join(texts) for texts in turns if texts]


def _before(reading: Reading, link: StepLink) -> StepLink | None:
    """The step of the main line that a step goes on from, in its session."""
    for _ in range(_DEPTH):
        found = reading.link(link.parent_id) if link.parent_id else None
        if found is None or found.session_id != link.session_id:
            return None
        if found.kind == Kind.MAIN:
            return found
        link = found
    return None


def _followed(reading: Reading, link: StepLink, *, before: StepLink | None) -> Iterator[StepLink]:
    """The runs that are over because this step is here: the one that it goes on from, and one that it does over."""
    if before is not None and before.run_id != link.run_id and not before.trajectory_id:
        yield before
    if before is not None and before.run_id == link.run_id:
        return  # it opens no turn
    beside = reading.main_before(link, within=_NEIGHBOURS)
    if beside is None or beside.run_id == link.run_id or beside.parent_id != link.parent_id or beside.trajectory_id:
        return
    asked, again = reading.kept(beside.step_id), reading.kept(link.step_id)
    if asked and again and _user_turns(asked.messages) == _user_turns(again.messages):
        yield beside


def _run_entry(last: StepLink, moment: Moment, *, next_id: str = "", due_ms: int = 0) -> Entry:
    """The case of a step's trajectory, or else of its run."""
    if last.trajectory_id:
        return _entry(
            last, moment, target=Target.TRAJECTORY, target_id=last.trajectory_id, next_id=next_id, due_ms=due_ms
        )
    return _entry(last, moment, target=Target.RUN, target_id=last.run_id, next_id=next_id, due_ms=due_ms)


def _entry(
    last: StepLink, moment: Moment, *, target: Target, target_id: str, next_id: str = "", due_ms: int = 0
) -> Entry:
    return Entry(
        moment=moment,
        target=target,
        target_id=target_id,
        session_id=last.session_id,
        step_id=last.step_id,
        next_id=next_id,
        due_ms=due_ms,
    )


def _branch(reading: Reading, last: KeptStep) -> Iterator[KeptStep]:
    """The steps of a run that lead to its last one, from that back."""
    yield last
    link = reading.link(last.step.step_id)
    while link is not None:
        link = _before(reading, link)
        if link is None or link.run_id != last.step.run_id:
            return
        found = reading.kept(link.step_id)
        if found is not None:
            yield found


def _main_steps(reading: Reading, last: KeptStep) -> Iterator[KeptStep]:
    """The steps of a trajectory, from the last one back."""
    for step_id in reading.trajectory_step_ids(last.step.trajectory_id, limit=MAX_STEPS * 2):
        found = last if step_id == last.step.step_id else reading.kept(step_id)
        if found is not None and found.kind == Kind.MAIN:
            yield found


def _capped(latest_first: Iterator[KeptStep]) -> list[KeptStep]:
    """So many of the last steps as a case may have, in the order in which they were made."""
    steps: list[KeptStep] = []
    tokens = 0
    for kept in latest_first:
        tokens += len(kept.step.prompt_ids) + len(kept.step.response_ids)
        if steps and (tokens > MAX_TOKENS or len(steps) == MAX_STEPS):
            break
        steps.append(kept)
    return steps[::-1]

"""What each privacy level means, in the words that its owner is shown. A changed text asks for a new consent. Pure."""

from clawloop_edge.privacy.ladder import Ladder, Rung
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level

POLICY_VERSION = 4
"""of the texts together; 3: devices learn at home; 4: what epsilon counts, and what it does not"""
LEARNS_SINCE = 3
"""what was agreed to before meant that nothing of the levels of deltas leaves but what does at `metrics`"""
VERSIONS = dict.fromkeys(Level, 2) | {Level.PRIVATE_DELTAS: 4, Level.DELTAS: 4}
"""the version of the policy in which each level came to mean what it does: a consent to another level still holds"""
VALID_MS = 365 * 24 * 3600 * 1000
"""a consent is asked for again after a year"""
GOES_ON = "A conversation that goes on takes along what was said in it before."
"""said wherever more may leave than until then"""

_CONTACT = (
    "The server sees when this device is connected and from which network address, this level, a fingerprint of its "
    "model, the number of its adapter and whether it could use the last one, the version of this program, and how many "
    "items wait to be sent. Adapters come back."
)
_LEARNS = (
    "What leaves at `metrics`, where learning on this device stands, and what it learned: when no agent has called for "
    "a while and the device is on power, it learns from what is kept from now on and was judged, and the change of the "
    "adapter (its LoRA factors) is sent, with the hash of the adapter that it began from, how many turns (with their "
    "tool calls) it was learned from"
)
_OUTBOX = (
    "Everything waits in the outbox first (a day, unless you set another time), where you can read it and take it out. "
    "What was learned from it cannot be unlearned."
)

TEXTS = {
    Level.OFF: "Nothing leaves this device; the server is not even told that it is there. (What you ask the server for "
    "by a command of your own still goes out: joining, and having deleted what it has.)",
    Level.METRICS: f"No word of what was said leaves. {_CONTACT}",
    Level.PRIVATE_DELTAS: f"{_LEARNS}, and the size and noise that it was given. No word of what was said leaves. "
    "Before it leaves, the change is cut to a fixed size and mixed with noise that hides what it was learned from, "
    "within a budget: all noised changes of one model that this device ever sends can move the odds between any two "
    "guesses at what was said here by a factor of e to the power of epsilon at most (about 3,000 at epsilon 8, 2.7 at "
    "1), but for a chance of 1 in 100,000. Not hidden by the noise, and not counted in epsilon: that a change was sent "
    "and when, how many turns it was learned from, its rank, and the task that it answers. Epsilon is 8 unless you set "
    "another; when it is spent, nothing more is learned. With few devices so much noise teaches nothing: `privacy "
    "budget` tells from how many on it is of any use. "
    f"{GOES_ON} {_OUTBOX}",
    Level.DELTAS: f"{_LEARNS}, and the mean of how these were judged. The change leaves as it is, and parts of "
    "what was said can be recovered from it: more of it the fewer turns it was learned from, and a single short one "
    "almost whole. It is made of 8 at least, unless you set another number. "
    f"{GOES_ON} {_OUTBOX}",
    Level.REDACTED: "What leaves at `metrics`, and the trainable steps that are kept from now on: what you and "
    "your agent said, the tools' results, and how they were judged. Before that, secrets and personal data that are "
    "found in them are blotted out, and the names that programs gave to conversations are replaced. No search finds "
    f"everything: names, addresses in plain words and unusual secrets may stay in. {GOES_ON} {_OUTBOX}",
    Level.FULL: "What leaves at `metrics`, and the trainable steps that are kept from now on, as they are: what "
    "you and your agent said, the tools' results, and how they were judged. Nothing is blotted out: passwords and "
    f"private matters in them leave too. {GOES_ON} {_OUTBOX}",
}
"""what is said of each level"""

_UP_TO_DATE = "keep the adapter of this device up to date"
_IMPROVE = "improve the model for all devices that learn with this server"
PURPOSES: dict[Level, list[str]] = {
    Level.OFF: [],
    Level.METRICS: [_UP_TO_DATE],
    Level.PRIVATE_DELTAS: [_UP_TO_DATE, _IMPROVE],
    Level.DELTAS: [_UP_TO_DATE, _IMPROVE],
    Level.REDACTED: [_UP_TO_DATE, _IMPROVE],
    Level.FULL: [_UP_TO_DATE, _IMPROVE],
}
DATA: dict[Level, list[str]] = {
    Level.OFF: [],
    Level.METRICS: ["counters"],
    Level.PRIVATE_DELTAS: ["counters", "state of learning", "noised changes of the adapter"],
    Level.DELTAS: ["counters", "state of learning", "changes of the adapter", "mean rewards"],
    Level.REDACTED: ["counters", "redacted tokens", "logprobs", "redacted signals"],
    Level.FULL: ["counters", "tokens", "logprobs", "signals"],
}


def as_meant(ladder: Ladder, version: int) -> Ladder:
    """What a ladder allows that was agreed to under a version of the policy. Nobody agreed to deltas before there were
    any."""
    if version >= LEARNS_SINCE:
        return ladder
    meant = (Level.METRICS if rung.level.learns_at_home else rung.level for rung in ladder.rungs)
    return Ladder.of(Rung(rung.after_seq, level) for rung, level in zip(ladder.rungs, meant, strict=True))


def policy_sha256(level: Level) -> str:
    """The hash of what is shown for `level`."""
    return sha256(f"{VERSIONS[level]}\n{TEXTS[level]}".encode())

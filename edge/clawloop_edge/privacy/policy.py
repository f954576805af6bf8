"""What each privacy level means, in the words that its owner is shown. A changed text asks for a new consent. Pure."""

from clawloop_edge.errors import ConsentError
from clawloop_shared.errors import ClawloopError
from clawloop_shared.files import sha256
from clawloop_shared.levels import Level

POLICY_VERSION = 1
VALID_MS = 365 * 24 * 3600 * 1000
"""a consent is asked for again after a year"""

TEXTS = {
    Level.OFF: "Nothing leaves this device.",
    Level.METRICS: "Only counters leave this device: its level, its model line, its adapter version, how many items "
    "wait, and the version of this program. Nothing that was said.",
    Level.FULL: "The trainable steps that are kept from now on leave this device as they are: what you and your agent "
    "said, the tools' results, and how they were judged. The server learns from them. Secrets in them leave too. "
    "A conversation that goes on takes along what was said in it before.",
}
"""the levels that are built, and what is said of each"""

DATA = {
    Level.OFF: [],
    Level.METRICS: ["counters"],
    Level.FULL: ["counters", "tokens", "logprobs", "signals"],
}


def policy_text(level: Level) -> str:
    """What `level` lets out, in plain words.

    Raises:
        ConsentError: the level is not built yet.
    """
    if level not in TEXTS:
        built = ", ".join(TEXTS)
        raise ConsentError(f"level {level} is not built yet; choose one of {built}")
    return TEXTS[level]


def policy_sha256(level: Level) -> str:
    """The hash of what was shown for `level`; empty for a level that this version does not know how to explain."""
    try:
        return sha256(f"{POLICY_VERSION}\n{policy_text(level)}".encode())
    except ClawloopError:
        return ""

"""What each privacy level means, in the words that its owner is shown. A changed text asks for a new consent. Pure."""

from clawloop_shared.files import sha256
from clawloop_shared.levels import Level

POLICY_VERSION = 2
VALID_MS = 365 * 24 * 3600 * 1000
"""a consent is asked for again after a year"""
GOES_ON = "A conversation that goes on takes along what was said in it before."
"""said wherever more may leave than until then"""

_CONTACT = (
    "The server sees when this device is connected and from which network address, this level, a fingerprint of its "
    "model, the number of its adapter and whether it could use the last one, the version of this program, and how many "
    "items wait to be sent. Adapters come back."
)
_NOT_YET = (
    "This version does not learn on this device yet, so for now what leaves is what leaves at `metrics`: no word of "
    "what was said. When a later version does, you are asked again. Then"
)
_OUTBOX = (
    "Everything waits in the outbox first (a day, unless you set another time), where you can read it and take it out. "
    "What was learned from it cannot be unlearned."
)

TEXTS = {
    Level.OFF: "Nothing leaves this device; the server is not even told that it is there. (What you ask the server for "
    "by a command of your own still goes out: joining, and having deleted what it has.)",
    Level.METRICS: f"No word of what was said leaves. {_CONTACT}",
    Level.PRIVATE_DELTAS: f"{_NOT_YET} changes of the adapter would leave, cut to size and mixed with noise, so that "
    "they hide what they were learned from.",
    Level.DELTAS: f"{_NOT_YET} changes of the adapter would leave as they are. Parts of what was said can be recovered "
    "from such changes.",
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
    Level.PRIVATE_DELTAS: [_UP_TO_DATE],
    Level.DELTAS: [_UP_TO_DATE],
    Level.REDACTED: [_UP_TO_DATE, _IMPROVE],
    Level.FULL: [_UP_TO_DATE, _IMPROVE],
}
DATA: dict[Level, list[str]] = {
    Level.OFF: [],
    Level.METRICS: ["counters"],
    Level.PRIVATE_DELTAS: ["counters"],
    Level.DELTAS: ["counters"],
    Level.REDACTED: ["counters", "redacted tokens", "logprobs", "redacted signals"],
    Level.FULL: ["counters", "tokens", "logprobs", "signals"],
}


def policy_sha256(level: Level) -> str:
    """The hash of what is shown for `level`."""
    return sha256(f"{POLICY_VERSION}\n{TEXTS[level]}".encode())

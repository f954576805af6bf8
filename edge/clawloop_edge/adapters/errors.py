"""Why an offered adapter is refused; all grow from clawloop_shared's AdapterInvalid.

AdapterInvalid
├── WrongLine        made for another base, quantisation, tokenizer or template
├── Expired          its manifest may no longer be used
├── OldVersion       not newer than what this device has already seen: a replay or a step back
├── ProbeFailed      base plus adapter do not compute what the manifest promises
├── NotInLog         the server's log of released adapters does not have it
├── LogForked        that log is shorter than, or another than, the one that was seen before
├── LogMissing       it came without the log, and one was seen before
├── LogStopped       one of these three was so before, and the owner has not said what to do
└── LogBehind        the server's proof does not begin where this device is; it may try again
"""

from clawloop_shared.errors import AdapterInvalid


class WrongLine(AdapterInvalid):
    """Made for another base, quantisation, tokenizer or template."""


class Expired(AdapterInvalid):
    """Its manifest may no longer be used."""


class OldVersion(AdapterInvalid):
    """Not newer than what this device has already seen."""


class ProbeFailed(AdapterInvalid):
    """Base plus adapter do not compute what the manifest promises."""


class NotInLog(AdapterInvalid):
    """The server's log of released adapters does not have it."""


class LogForked(AdapterInvalid):
    """The server's log is shorter than the one that was seen before, or another."""


class LogMissing(AdapterInvalid):
    """It came without a log, and this server had one before."""


class LogStopped(AdapterInvalid):
    """The log did not fit what was seen before, and the owner has not said what to do."""


class LogBehind(AdapterInvalid):
    """The server's proof does not begin at the size that this device knows; it may try again."""

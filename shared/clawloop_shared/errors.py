"""The errors of clawloop_shared, and the root that both sides' own trees grow from.

    ClawloopError                a known failure: its text says what is wrong, the value, and the next step
    ├── InvalidError             what was given is wrong; giving it again will not help
    │   ├── RecordError          a step, signal or trajectory breaks its own rules
    │   │   └── LogprobError     a step lacks a logprob, or has one that is none
    │   ├── WireError            bytes that are not a message of ours, or too large
    │   ├── SignatureInvalid     a signature does not belong to these bytes and this key
    │   ├── AdapterInvalid       an adapter's files, names, shapes or values are not what they must be
    │   ├── SumError             a part of a secure sum is not what it must be
    │   ├── ProofInvalid         a proof does not show what it is to show of a log
    │   └── ConfigError          a configuration file or value is wrong
    └── UncheckedError           it could not be checked (a key or file is missing); treated as a refusal
        ├── KeyMissing           the key that should open or verify this is not there
        └── StorageError         a database or file could not be read or written

"Invalid" and "unchecked" are different things to say to a person, and both fail closed.
"""


class ClawloopError(Exception):
    """A known failure. The command line prints its text as one line and exits 1."""


class InvalidError(ClawloopError):
    """What was given is wrong."""


class RecordError(InvalidError):
    """A step, signal or trajectory breaks its own rules."""


class LogprobError(RecordError):
    """A step lacks the logprob of a token that was sampled, or has a number there that is none."""


class WireError(InvalidError):
    """Bytes that are not a message of ours, or are too large."""


class SignatureInvalid(InvalidError):
    """A signature does not belong to these bytes and this key."""


class AdapterInvalid(InvalidError):
    """An adapter's files, names, shapes or values are not what they must be."""


class SumError(InvalidError):
    """A part of a secure sum is not what it must be; whoever was given it takes no further part."""


class ProofInvalid(InvalidError):
    """A proof does not show that an entry is in a log, or that a log goes on from an older one."""


class ConfigError(InvalidError):
    """A configuration file or value is wrong."""


class UncheckedError(ClawloopError):
    """It could not be checked, so it is refused."""


class KeyMissing(UncheckedError):
    """The key that should open or verify this is not there."""


class StorageError(UncheckedError):
    """A database or file could not be read or written."""

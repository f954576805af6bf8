"""The edge's own errors; they grow from clawloop_shared.errors.

ClawloopError
├── EngineError              the model cannot answer this call
│   ├── PromptTooLong        the prompt does not fit the model's context
│   ├── EngineBusy           too much is in flight; try again later
│   ├── EngineGone           the engine's thread is not running
│   └── UnknownVersion       no adapter of that version is loaded
├── InvalidError
│   ├── RequestError         what an HTTP client sent is wrong (a 4xx in the caller's own shape)
│   ├── QueryError           what was asked for cannot be looked for
│   ├── ExportInvalid        a file is no whole export of a pool
│   ├── ReceiptInvalid       a server's receipt is not for this device, or not for what was sent
│   ├── CallRefused          client.py: the edge refused a call of the Python API
│   └── AdapterInvalid       adapters/errors.py: WrongLine, Expired, OldVersion, ProbeFailed, NotInLog, LogForked ...
├── UncheckedError
│   ├── PoolError            the pool refuses (wrong home, locked, damaged)
│   │   ├── UnknownTarget    a signal judges what is not kept here
│   │   ├── PoolFull         there is no room for what is new
│   │   └── AnchorError      the pool is not the one that its anchor knows
│   ├── EdgeAway             client.py: the edge does not answer
│   └── RedactionError       what must not leave could not be looked for, so nothing leaves
├── NodeError                node/transport.py: the server and this device cannot work together
│   ├── ServerAway           the server cannot be reached now
│   └── NodeRefused          the server does not know this device's key
├── ScorerFailed             a scorer could not judge this time
│   └── NotScorable          nor will it, however often this case is asked for
├── LearnFailed              nothing can be learned at home from this
│   └── NotLearnable         nor could it, however often it is tried
└── ConsentError             the privacy level does not allow it
"""

from clawloop_shared.errors import ClawloopError, InvalidError, UncheckedError


class EngineError(ClawloopError):
    """The model cannot answer this call."""


class PromptTooLong(EngineError):
    """The prompt and the tokens asked for do not fit the model's context."""


class EngineBusy(EngineError):
    """Too much is in flight."""


class EngineGone(EngineError):
    """The engine's thread is not running."""


class UnknownVersion(EngineError):
    """No adapter of that version is loaded."""


class RequestError(InvalidError):
    """What an HTTP client sent is wrong. `param` names the field, if one is to blame."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class QueryError(InvalidError):
    """What was asked for cannot be looked for."""


class ReceiptInvalid(InvalidError):
    """A server's receipt is not for this device, or not for what was sent."""


class ExportInvalid(InvalidError):
    """A file is no whole export of a pool."""


class PoolError(UncheckedError):
    """The pool refuses."""


class UnknownTarget(PoolError):
    """A signal judges something that this pool does not have."""


class PoolFull(PoolError):
    """There is no room for what is new."""


class AnchorError(PoolError):
    """The pool is not the one that its anchor knows: older, another, or the anchor itself is gone or changed."""


class ConsentError(ClawloopError):
    """The privacy level does not allow it."""


class LearnFailed(ClawloopError):
    """Nothing can be learned at home from this."""


class NotLearnable(LearnFailed):
    """Nor could it, however often it is tried: it is what the task or the data are."""


class RedactionError(UncheckedError):
    """What must not leave could not be looked for, so nothing leaves."""


class ScorerFailed(ClawloopError):
    """A scorer could not judge this time; no signal comes of it."""


class NotScorable(ScorerFailed):
    """This one case cannot be judged, however often it is asked for."""

"""The edge's own errors; they grow from clawloop_shared.errors.

ClawloopError
├── EngineError              the model cannot answer this call
│   ├── PromptTooLong        the prompt does not fit the model's context
│   ├── EngineBusy           too much is in flight; try again later
│   ├── EngineGone           the engine's thread is not running
│   └── UnknownVersion       no adapter of that version is loaded
├── InvalidError
│   ├── RequestError         what an HTTP client sent is wrong (a 4xx in the caller's own shape)
│   └── AdapterInvalid       adapters/errors.py: WrongLine, Expired, OldVersion, ProbeFailed
├── UncheckedError
│   └── PoolError            the pool refuses (wrong home, locked, damaged)
│       └── UnknownTarget    a signal judges what is not kept here
├── NodeError                node/transport.py: the server and this device cannot work together
│   ├── ServerAway           the server cannot be reached now
│   └── NodeRefused          the server does not know this device's key
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


class PoolError(UncheckedError):
    """The pool refuses."""


class UnknownTarget(PoolError):
    """A signal judges something that this pool does not have."""


class ConsentError(ClawloopError):
    """The privacy level does not allow it."""

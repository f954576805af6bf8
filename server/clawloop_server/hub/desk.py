"""What a desk (joining, forgetting) says to a caller, before it becomes HTTP."""

import msgspec


class DeskAnswer(msgspec.Struct, frozen=True):
    """An HTTP status, and either the reply's bytes or what to tell the person."""

    status: int
    body: bytes = b""
    message: str = ""
    retry_after_s: int = 0

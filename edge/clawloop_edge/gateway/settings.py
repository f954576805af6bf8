"""The gateway's settings: where it listens, how much a client may send, and how much it remembers."""

from typing import Annotated

import msgspec
from msgspec import Meta

_Count = Annotated[int, Meta(ge=1)]


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where agents reach the edge, and how much they may send.

    `allowed_hosts` are further names under which a client may call it (loopback names and `host` always may).
    `default_max_tokens` holds where a client names no limit of its own. Conversations of late are remembered up to
    `memory_entries` steps and `memory_bytes`; older ones are found in the pool. A stream whose first token takes longer
    than `headers_after_s` begins without it, and one in which nothing was said for `keep_alive_s` is pinged. A client
    that does not read for `stalled_client_s`, or whose headers or body take longer than `body_timeout_s`, is let go.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65_535)] = 8100
    allowed_hosts: list[str] = []
    max_body_bytes: _Count = 16 << 20
    default_max_tokens: _Count = 4096
    default_temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    retry_after_s: int = 2
    headers_after_s: Annotated[float, Meta(ge=0, le=3_600)] = 5.0
    keep_alive_s: Annotated[float, Meta(gt=0, le=3_600)] = 15.0
    stalled_client_s: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    body_timeout_s: Annotated[float, Meta(gt=0, le=3_600)] = 60.0
    memory_entries: int = 2000
    memory_bytes: int = 24 << 20
    drain_s: Annotated[float, Meta(ge=0, le=3_600)] = 30.0

"""How long the pool keeps, and how much. The configuration's `[retention]`; described in docs/configuration.md."""

from typing import Annotated

import msgspec
from msgspec import Meta


class RetentionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When whole sessions go by themselves. 0 anywhere: no such limit.

    One goes once it was not used for `days`; the oldest go while the pool takes more than `max_bytes`, or the disk has
    less than `free_floor_bytes` left. One that takes `session_max_bytes` grows no further.
    """

    days: Annotated[float, Meta(ge=0, le=36_500)] = 30.0
    max_bytes: Annotated[int, Meta(ge=0)] = 2 << 30
    session_max_bytes: Annotated[int, Meta(ge=0)] = 64 << 20
    free_floor_bytes: Annotated[int, Meta(ge=0)] = 5 << 30

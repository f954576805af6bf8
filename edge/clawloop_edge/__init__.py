"""The edge: what runs on the owner's Mac, between the agent and the model.

A step walks forward: gateway → sessions → engine → recorder → pool → outbox → node; an adapter walks back:
node → adapters → engine.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clawloop_edge.client import Client
else:

    def __getattr__(name: str) -> Any:
        """`Client`, loaded by whoever asks for it: the command line has no use for it."""
        if name != "Client":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from clawloop_edge.client import Client

        return Client


__all__ = ["Client"]

"""What OpenClaw needs to know of the edge of this home: its address, its token's file, how much its model takes."""

from __future__ import annotations

import ipaddress
import json
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from clawloop_edge.home import EdgeHome
from clawloop_edge.openclaw.entries import Edge
from clawloop_shared.errors import ConfigError

_ANSWER_S = 10.0


def edge_of(home: EdgeHome, *, context_tokens: int | None) -> Edge:
    """The edge of this home; its token is made if there is none yet. `context_tokens` of its model if they are known.

    Raises:
        ConfigError: it does not listen on loopback, or how much its model takes cannot be found out.
    """
    settings = home.load_config()
    gateway = settings.gateway
    host = loopback(gateway.host)
    home.token()
    context = context_tokens or _told(home, host, port=gateway.port) or _written(settings.model.path)
    if not context:
        raise ConfigError("how many tokens the model takes is not known; start the edge, or give --context")
    named = f"[{host}]" if ":" in host else host
    return Edge(
        url=f"http://{named}:{gateway.port}",
        token_file=str(home.token_file),
        context_tokens=context,
        max_tokens=min(gateway.default_max_tokens, context),
    )


def loopback(host: str) -> str:
    """The loopback address under which an edge that listens on `host` is reached.

    Raises:
        ConfigError: there is none.
    """
    if host == "localhost":
        return host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    if address is not None and address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    if address is None or not address.is_loopback:
        raise ConfigError(f"the edge listens on {host} alone; set [gateway] host to 127.0.0.1, for OpenClaw beside it")
    return host


def _told(home: EdgeHome, host: str, *, port: int) -> int:
    """What the running edge says; 0 if none runs there, or another program does."""
    connection = HTTPConnection(host, port, timeout=_ANSWER_S)  # no proxy may see the token
    try:
        connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {home.token()}"})
        models = json.loads(connection.getresponse().read())["data"]
        return max((model.get("context_length", 0) for model in models), default=0)
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError):
        return 0
    finally:
        connection.close()


def _written(folder: str) -> int:
    """What stands in the model's folder; 0 if nothing does."""
    file = Path(folder) / "config.json"
    if not folder or not file.is_file():
        return 0
    config: dict[str, Any] = json.loads(file.read_bytes())
    sizes = [part.get("max_position_embeddings") for part in (config, config.get("text_config") or {})]
    return next((size for size in sizes if isinstance(size, int) and size > 0), 0)

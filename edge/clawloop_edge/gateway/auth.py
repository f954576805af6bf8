"""Who may call: a token, and only by a name of this machine.

The host and origin checks stop a web page from reaching the gateway through a name that it rebinds to loopback.
"""

import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from clawloop_edge.errors import RequestError

_LOOPBACK_NAME = "localhost"


class Guard:
    """Checks headers against the token and the names under which the gateway may be called."""

    def __init__(self, token: str, *, hosts: Iterable[str]) -> None:
        if not token:
            raise ValueError("the gateway needs a token")
        self._token = token.encode()
        self._hosts = {host.lower().strip("[]") for host in hosts} - {""}  # an empty name is that of `Origin: null`

    def check_names(self, headers: Mapping[str, str]) -> None:
        """Return if the request was sent to this machine, and by no page of another one.

        Raises:
            RequestError: a foreign `Host` or `Origin` (403).
        """
        if not self._is_ours(_name(f"//{headers.get('Host', '')}")):
            raise RequestError("this Host is not served; call the gateway by its loopback address", status=403)
        origin = headers.get("Origin")
        if origin is not None and not self._is_ours(_name(origin)):
            raise RequestError("pages of this Origin may not call the gateway", status=403)

    def check_token(self, headers: Mapping[str, str]) -> None:
        """Return if the request carries the token, as bearer or as `x-api-key`.

        Raises:
            RequestError: it does not (401).
        """
        scheme, _, credential = headers.get("Authorization", "").partition(" ")
        given = credential.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token):
            raise RequestError(
                "wrong or missing token; send the content of the edge's token file as `Authorization: Bearer`",
                status=401,
                code="invalid_api_key",
            )

    def _is_ours(self, name: str) -> bool:
        if name == _LOOPBACK_NAME or name in self._hosts:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _name(address: str) -> str:
    """The host name in a URL, lower case; empty if there is none."""
    if "@" in address:
        return ""
    try:
        return (urlsplit(address).hostname or "").removesuffix(".")
    except ValueError:
        return ""

"""Who may call: a token, and only by a name of this machine.

The host and origin checks stop a web page from reaching the gateway through a name that it rebinds to loopback.
"""

import base64
import binascii
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

    def check_names(self, headers: Mapping[str, str], *, target: str | None = None) -> None:
        """Return if the request was sent to this machine, and by no page of another one. `target` is the name in its
        request line, if it has one there.

        Raises:
            RequestError: a foreign `Host` or `Origin` (403).
        """
        named = {_name(f"//{headers.get('Host', '')}"), (target or _LOOPBACK_NAME).lower()}
        if not all(map(self._is_ours, named)):
            raise RequestError("this Host is not served; call the gateway by its loopback address", status=403)
        origin = headers.get("Origin")
        if origin is not None and not self._is_ours(_name(origin)):
            raise RequestError("pages of this Origin may not call the gateway", status=403)

    def has_token(self, headers: Mapping[str, str]) -> bool:
        """Whether the request carries the token: as bearer, as password of HTTP Basic, or as `x-api-key`.

        Basic is what clients send by themselves for a URL like `http://clawloop:TOKEN@127.0.0.1:8100`. It is taken and
        never asked for: a browser would remember it and send it along with what any page asks.
        """
        scheme, _, credential = headers.get("Authorization", "").partition(" ")
        match scheme.lower():
            case "bearer":
                given = credential.strip().encode("utf-8", "surrogateescape")
            case "basic":
                given = _password(credential.strip())
            case _:
                given = headers.get("x-api-key", "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._token)

    def check_token(self, headers: Mapping[str, str]) -> None:
        """Return if the request carries the token.

        Raises:
            RequestError: it does not (401).
        """
        if not self.has_token(headers):
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


def _password(credential: str) -> bytes:
    """The password of HTTP Basic (RFC 7617); empty if there is none."""
    try:
        return base64.b64decode(credential, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _name(address: str) -> str:
    """The host name in a URL, lower case; empty if there is none."""
    if "@" in address:
        return ""
    try:
        return (urlsplit(address).hostname or "").removesuffix(".")
    except ValueError:
        return ""

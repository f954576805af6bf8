"""Calls of the server's own HTTPS API: joining, standing, new keys, leaving, and asking it to forget. Trusted is the CA
that the invitation named.

Nothing is taken from the environment: no proxy, no other certificates, and no redirect is followed.
"""

import http.client
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from threading import Event, Timer
from urllib.parse import urlsplit

import msgspec

from clawloop_edge.node.sockets import cut_socket
from clawloop_edge.node.transport import NodeError, ServerAway
from clawloop_shared.errors import WireError

_TRY_LATER = frozenset({HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS})
_REASON_CHARS = 300
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME"""
_OUT_OF_TIME = frozenset({9, 10})
"""OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED"""
_RETRY_DIGITS = 9


class HubRefused(NodeError):
    """The server says no to this call, with its reason and the HTTP status."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class HubBusy(ServerAway):
    """The server cannot do it now. `retry_after_s` is what it asks for; 0: it does not say."""

    def __init__(self, message: str, *, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def post(
    url: str,
    path: str,
    *,
    ca_pem: str,
    body: bytes,
    max_bytes: int,
    timeout_s: float = 30.0,
    any_time: bool = False,
) -> bytes:
    """What the server at `url` answers; one that is longer than `max_bytes` is cut one byte behind. All of it takes at
    most twice `timeout_s`, however slowly the server speaks. `any_time`: its certificate counts whatever the clock here
    says; for what is signed besides, and is to tell that the clock is wrong.

    Raises:
        WireError: address or certificate make no sense.
        NodeError: another server answers there.
        ServerAway: nobody answers; HubBusy: it cannot now.
        HubRefused: the server says no.
    """
    where = urlsplit(url)
    if where.scheme != "https" or not where.hostname:
        raise WireError(f"{url!r} is no server's address; it begins with https://")
    try:
        context, port = ssl.create_default_context(cadata=ca_pem), where.port or 443
    except (ssl.SSLError, ValueError) as error:
        raise WireError(f"the certificate or port of {url} is damaged ({error}); ask for a new invitation") from error
    if any_time:
        context.verify_flags |= _NO_CHECK_TIME
    connection = http.client.HTTPSConnection(where.hostname, port, timeout=timeout_s, context=context)
    try:
        connection.connect()
        with _at_most(timeout_s, connection):
            connection.request("POST", path, body, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            status, retry, data = response.status, response.getheader("Retry-After", ""), response.read(max_bytes + 1)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _OUT_OF_TIME:
            raise NodeError(f"{url}: {error.verify_message} by the clock here; is that right?") from error
        raise NodeError(
            f"{url} is not the server of the invitation: {error.verify_message}; if its operator says that it is, "
            "leave, and join again with a new invitation"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerAway(f"cannot reach {url}: {error}; is the server running?") from error
    finally:
        connection.close()
    if status == HTTPStatus.OK:
        return data
    if status in _TRY_LATER:
        retry_after_s = int(retry) if retry.isdecimal() and len(retry) <= _RETRY_DIGITS else 0
        raise HubBusy(f"{url} is not ready: {_reason(data)}", retry_after_s=retry_after_s)
    raise HubRefused(f"{url} refused ({status}): {_reason(data)}", status=status)


@contextmanager
def _at_most(timeout_s: float, connection: http.client.HTTPSConnection) -> Iterator[None]:
    """Cut a connection that is used for longer; a socket's own timeout begins anew with each byte.

    Raises:
        TimeoutError: it was.
    """
    late, opened = Event(), connection.sock  # the connection itself lets go of its socket before all was read

    def cut() -> None:
        late.set()
        cut_socket(opened)

    watch = Timer(timeout_s, cut)
    watch.daemon = True
    watch.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not late.is_set():
            raise
    finally:
        watch.cancel()
    if late.is_set():
        raise TimeoutError(f"no whole answer within {timeout_s:g} s")


def _reason(data: bytes) -> str:
    """What the server says is wrong: in one line, of a length that a list or a log can show."""
    try:
        found = msgspec.json.decode(data, type=dict[str, dict[str, str]])
        said = " ".join(found["error"]["message"].split())
        return "".join(c if c.isprintable() else "\ufffd" for c in said)[:_REASON_CHARS]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError):
        return "no reason given"

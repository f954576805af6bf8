"""Talking to an OpenAI-compatible server: one session, server-sent events as they arrive, and errors of ours.

Knows neither chats nor tokens. Follows no redirect and no proxy of the environment. A server's own message is passed on
only as far as it is bounded and without the key; its headers never are.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
from yarl import URL

from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.errors import EngineBusy, EngineError, EngineGone, RequestError
from clawloop_shared.errors import ConfigError

T = TypeVar("T")
MAX_LINE_BYTES = 8 << 20
"""of one event; the first of vLLM's holds the prompt's ids"""
MAX_REPLY_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10
_MAX_MESSAGE = 500
_KEEP_ALIVE_S = 4.0
"""below the 5 s after which uvicorn, vLLM's server, closes an idle connection: a request must not meet that"""
_DRAIN_S = 1.0
_RETRY_S = 2.0
_MOST_TOKENS = 1 << 31
_OPENAI = "api.openai.com"


class _Error(msgspec.Struct):
    message: str = ""
    param: Any = None
    code: Any = None


class _ErrorBody(msgspec.Struct):
    """OpenAI's `error` object; some servers put its fields at the top, FastAPI says `detail`."""

    error: _Error | str | None = None
    message: str = ""
    detail: Any = None


class ModelCard(msgspec.Struct, frozen=True):
    """One entry of `/v1/models`; vLLM says how long its context is, and which base an adapter has."""

    id: str
    max_model_len: int | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[ModelCard]


class Upstream:
    """One server. Make it on a running event loop, and `close` it."""

    def __init__(self, settings: UpstreamSettings) -> None:
        """Raises ConfigError: no usable address, or a key file that cannot be read."""
        self.base = base_url(settings.url)
        self.is_openai = self.base.host == _OPENAI
        self.in_flight = 0
        self.trouble = ""
        """why the server cannot be reached now; empty if it can, as far as was seen"""
        self._key = _read_key(settings.key_file)
        self._read_timeout_s = settings.read_timeout_s
        self._urls: dict[str, URL] = {}
        self._closed = False
        self._watch: asyncio.Task[None] | None = None
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "clawloop"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=settings.max_connections, keepalive_timeout=_KEEP_ALIVE_S),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.read_timeout_s
            ),
        )

    @property
    def alive(self) -> bool:
        """Whether calls are taken, and the last of them reached the server."""
        return not (self._closed or self.trouble)

    async def post(self, path: str, body: bytes) -> aiohttp.ClientResponse:
        """The response to a request, its body not read yet; `path` is below the base URL, or with a `/` the server's.

        Raises:
            RequestError: the server refuses the request (4xx), with its words.
            EngineBusy: it has too much to do (429, 503).
            EngineGone: it cannot be reached, or this engine was closed.
            EngineError: anything else that is no answer.
        """
        if self._closed:
            raise EngineGone("the upstream engine was closed")
        response = await self._send("POST", path, body)
        if response.status == 200:
            return response
        try:
            raise await self._refusal(response)
        finally:
            response.close()

    async def ask(self, path: str, body: Any, kind: type[T]) -> T:
        """The whole JSON reply to a request. Raises like `post`, and EngineError if it is not of this kind."""
        async with await self.post(path, msgspec.json.encode(body)) as response:
            return decode(await self.whole(response), msgspec.json.Decoder(kind))

    async def models(self) -> list[ModelCard]:
        """What the server serves. Raises like `post`."""
        response = await self._send("GET", "models", None)
        async with response:
            if response.status != 200:
                raise await self._refusal(response)
            return decode(await self.whole(response), msgspec.json.Decoder(_Models)).data

    async def whole(self, response: aiohttp.ClientResponse) -> bytes:
        """A reply's body. Raises EngineError if it is cut off or too large."""
        found = bytearray()
        with self.reading():
            while data := await response.content.readany():
                found += data
                if len(found) > MAX_REPLY_BYTES:
                    raise EngineError(f"the upstream server's reply has more than {MAX_REPLY_BYTES} bytes")
        return bytes(found)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turns what may go wrong while a body is read into EngineError."""
        try:
            yield
        except (aiohttp.ClientError, OSError) as error:
            if self._closed:
                raise self._gone(error) from error
            if isinstance(error, TimeoutError):
                raise self._silence() from error
            raise EngineError(f"the upstream server cut its reply off ({type(error).__name__})") from error

    def failure(self, error: Any) -> EngineError:
        """An `error` object in the middle of a stream."""
        message = error.get("message") if isinstance(error, dict) else error
        words = self._bounded(message) if isinstance(message, str) else ""
        return EngineError(f"the upstream server failed: {words or 'no reason given'}")

    async def close(self) -> None:
        """Close all connections; requests in flight fail."""
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
        await self._session.close()

    async def _send(self, method: str, path: str, body: bytes | None) -> aiohttp.ClientResponse:
        url = self._url(path)
        for last in (False, True):
            try:
                response = await self._session.request(method, url, data=body, allow_redirects=False)
            except aiohttp.ServerDisconnectedError as error:
                # once more, as the server may have closed an idle connection that was just about to be used
                if last or self._closed:
                    raise self._gone(error) from error
            except aiohttp.SocketTimeoutError as error:
                raise self._silence() from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise self._gone(error) from error
            else:
                self.trouble = ""
                return response
        raise AssertionError("unreachable")

    def _silence(self) -> EngineError:
        return EngineError(f"the upstream server said nothing for {self._read_timeout_s:g} s")

    def _gone(self, error: BaseException) -> EngineGone:
        if self._closed:
            return EngineGone("the upstream engine was closed while this call was in flight")
        why = type(error).__name__
        if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.strerror:
            why = error.os_error.strerror
        self.trouble = f"cannot reach the upstream server at {self.base.origin()}: {why}"
        if self._watch is None or self._watch.done():
            self._watch = asyncio.get_running_loop().create_task(self._until_back())
        return EngineGone(f"{self.trouble}; start it, or set [upstream] url")

    async def _until_back(self) -> None:
        while self.trouble:
            await asyncio.sleep(_RETRY_S)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with self._session.get(self._url("models"), allow_redirects=False):
                    self.trouble = ""

    async def _refusal(self, response: aiohttp.ClientResponse) -> Exception:
        status = response.status
        if status in (401, 403):  # its message may show a part of the key
            return EngineError(f"the upstream server refuses this edge's key ({status}); check [upstream] key_file")
        if 300 <= status < 400:
            return EngineError(f"the upstream server redirects ({status}); set [upstream] url to where it leads")
        found = bytearray()
        with self.reading():
            while len(found) < _MAX_ERROR_BYTES and (data := await response.content.readany()):
                found += data
        error = _read_error(bytes(found))
        words = self._bounded(error.message)
        if status in (429, 503):
            return EngineBusy(f"the upstream server is busy ({status}): {words or 'try again in a moment'}")
        if 400 <= status < 500:
            param, code = (value if isinstance(value, str) else None for value in (error.param, error.code))
            message = words or f"the upstream server refuses the request ({status})"
            return RequestError(message, status=status, param=param, code=code)
        return EngineError(f"the upstream server failed ({status}): {words or 'no reason given'}")

    def _bounded(self, message: str) -> str:
        if self._key:
            message = message.replace(self._key, "[key]")
        return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."

    def _url(self, path: str) -> URL:
        found = self._urls.get(path)
        if found is None:
            found = self._urls[path] = root_of(self.base) / path[1:] if path.startswith("/") else self.base / path
        return found


class EventReader:
    """The data of server-sent events as they arrive, to `[DONE]` or the end of the body.

    Each `data` line is an event of its own, as all OpenAI-compatible servers write them.
    """

    def __init__(self, upstream: Upstream, response: aiohttp.ClientResponse) -> None:
        self._upstream, self._content = upstream, response.content
        self.done = False
        """whether the server said `[DONE]`"""
        self._held = b""
        self._over = False

    async def next(self) -> list[bytes]:
        """The events that arrived together, at least one; none when no more come.

        Raises:
            EngineError: the connection broke, was silent for too long, or sent an endless line.
        """
        while not self._over:
            with self._upstream.reading():
                data = await self._content.readany()
            if len(self._held) + len(data) > MAX_LINE_BYTES:  # a single read is far smaller
                raise EngineError(f"the upstream server sent a line of more than {MAX_LINE_BYTES} bytes")
            lines = (self._held + data).split(b"\n")
            self._held = lines.pop() if data else b""
            found = [line[5:].strip() for line in lines if line.startswith(b"data:")]
            self._over = not data
            if found and b"[DONE]" in found:
                found = found[: found.index(b"[DONE]")]
                self._over = self.done = True
                await self._drain()
            if found:
                return found
        return []

    async def _drain(self) -> None:
        """Read what little may follow: a connection that was read to its end serves again."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
            async with asyncio.timeout(_DRAIN_S):
                while await self._content.readany():
                    pass


def decode(data: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A reply as the decoder's type. NaN, which JSON does not have and some servers write, is understood; half a
    character, as where a server cuts its text between UTF-16's two halves, becomes U+FFFD.

    Raises:
        EngineError: it is not JSON, or of another shape. What it says is not repeated.
    """
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        try:
            return msgspec.convert(_mended(json.loads(data)), decoder.type)
        except (ValueError, RecursionError):
            raise EngineError(f"the upstream server's reply is not what the API says: {_place(error)}") from error


def token_count(said: int | None) -> int:
    """A count of tokens, within what it can be, whatever a server says; 0 if it says nothing."""
    return min(max(said or 0, 0), _MOST_TOKENS)


def _mended(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list():
            return [_mended(item) for item in value]
        case dict():
            return {_mended(name): _mended(item) for name, item in value.items()}
    return value


def _place(error: Exception) -> str:
    return str(error) if isinstance(error, msgspec.ValidationError) else "no JSON"


def base_url(text: str) -> URL:
    """The base URL of a server; `/v1` where only the server is named.

    Raises:
        ConfigError: it is none, or holds a password.
    """
    try:
        url = URL(text.strip().rstrip("/"))
    except ValueError as error:
        raise ConfigError(f"[upstream] url = {text!r}: {error}") from error
    if url.user or url.password:
        raise ConfigError("[upstream] url holds a user or a password; put the key into a file and name it as key_file")
    if url.scheme not in ("http", "https") or not url.host or url.query_string or url.fragment:
        raise ConfigError(f"[upstream] url = {text!r}; it is a base URL like http://127.0.0.1:8000/v1")
    return url / "v1" if url.path in ("", "/") else url


def root_of(base: URL) -> URL:
    """The server's own root, below which vLLM has what is not OpenAI's."""
    return base.parent if base.name == "v1" else base


def _read_key(name: str) -> str:
    if not name:
        return ""
    try:
        key = Path(name).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"[upstream] key_file = {name!r} cannot be read: {type(error).__name__}") from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"[upstream] key_file = {name!r} holds no key; it is one line of printable ASCII")
    return key


def _read_error(data: bytes) -> _Error:
    try:
        body = msgspec.json.decode(data, type=_ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Error()
    if isinstance(body.error, _Error):
        return body.error
    return _Error(body.error or body.message or (body.detail if isinstance(body.detail, str) else ""))

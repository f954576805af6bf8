"""Asking a model to judge: at an HTTP address, or the one that the edge serves.

Knows addresses, keys and sizes; knows no question. An address that is not of this machine is a third party: it must be
allowed (`remote`), it is asked by TLS alone, only what the border clears goes there, and each time the border is told.
What was asked is no call of an agent: nothing of it is kept, and nothing is learned from it.
"""

import ipaddress
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import msgspec
from yarl import URL

from clawloop_edge.engine.aside import LocalModel, Question, visible
from clawloop_edge.errors import EngineError, NotScorable, RedactionError, RequestError, ScorerFailed
from clawloop_edge.pool.records import Json
from clawloop_edge.signals.model_settings import LOCAL, AskedSettings, EndpointSettings
from clawloop_edge.signals.protocol import Case
from clawloop_shared.errors import ConfigError

if TYPE_CHECKING:
    from clawloop_edge.signals.registry import Deps

MAX_REPLY_BYTES = 1 << 20
CONNECT_S = 10.0
_THINK_END = "</think>"
_FORM_REFUSED = (400, 404, 422, 501)


class Border(Protocol):
    """What may go to another machine (privacy/abroad.py)."""

    async def cleared(self, texts: Sequence[str], *, session_id: str, app: str) -> list[str] | None:
        """The texts as they may go: as they are, or redacted; None if they may not.

        Raises:
            RedactionError: they would have to be redacted, and cannot be now.
        """
        ...

    async def crossed(self, host: str, body: bytes) -> None:
        """Write down, before it goes, that this goes to `host`."""
        ...


class Asked(Protocol):
    """A model that can be asked."""

    remote: bool
    """whether it is on another machine"""

    async def ask(self, question: Question) -> str:
        """Its answer, without thoughts.

        Raises:
            ScorerFailed: none this time.
        """
        ...

    async def close(self) -> None:
        """End what is open."""
        ...


class LocalAsked:
    """The model that this edge serves, without what it learned here: it shall not judge by its own lessons."""

    remote = False

    def __init__(self, model: LocalModel) -> None:
        self._model = model

    async def ask(self, question: Question) -> str:
        """Its answer, once it has nothing else to do. Raises ScorerFailed."""
        try:
            return await self._model.ask(msgspec.structs.replace(question, version=0))
        except (EngineError, RequestError) as error:
            raise ScorerFailed(f"the local model gives no answer: {error}") from error
        except TimeoutError as error:
            raise ScorerFailed("the local model gave no answer in time") from error

    async def close(self) -> None:
        """It is the edge's; it stays."""


class Endpoint:
    """One HTTP address that takes and gives JSON. Connects when it is first asked."""

    def __init__(self, url: URL, settings: EndpointSettings, *, where: str, deps: "Deps") -> None:
        """`where` names the settings in messages.

        Raises:
            ConfigError: an address that is not allowed, or no key where one is named.
        """
        self.url, self.remote = url, not is_loopback(url)
        if self.remote:
            _check_remote(url, settings, where=where, border=deps.border)
        elif url.port == deps.port:
            raise ConfigError(
                f"[{where}] url is this edge's own gateway, which keeps what it is asked; use url = 'local'"
            )
        self._border = deps.border if self.remote else None
        self._key = _read_key(settings, where)
        self._timeout = aiohttp.ClientTimeout(total=settings.timeout_s, sock_connect=CONNECT_S)
        self._session: aiohttp.ClientSession | None = None

    async def post(self, body: Json) -> tuple[int, bytes]:
        """The status and the body of what it answers; other than 200 to 299 only where the request itself is refused.

        Raises:
            ScorerFailed: it cannot be reached, is late, refuses the key, redirects, fails, or says too much.
        """
        data = msgspec.json.encode(body)
        if self._border is not None:
            await self._border.crossed(str(self.url.host), data)
        try:
            async with self._open().post(self.url, data=data, allow_redirects=False) as response:
                _check_status(response.status, self._name)
                return response.status, await _bounded(response, self._name)
        except TimeoutError as error:
            raise ScorerFailed(f"{self._name} gave no answer in time") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ScorerFailed(f"{self._name} cannot be asked: {type(error).__name__}") from error

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()

    @property
    def _name(self) -> str:
        return f"{self.url.host}:{self.url.port}"

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Content-Type": "application/json", "User-Agent": "clawloop", "Accept-Encoding": "identity"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            jar = aiohttp.DummyCookieJar()
            self._session = aiohttp.ClientSession(headers=headers, timeout=self._timeout, cookie_jar=jar)
        return self._session


class ChatAsked:
    """A model behind an OpenAI-compatible `/chat/completions`."""

    def __init__(self, endpoint: Endpoint, settings: AskedSettings) -> None:
        self._endpoint, self._model = endpoint, settings.model
        self._forms = settings.schema == "auto"
        self.remote = endpoint.remote

    async def ask(self, question: Question) -> str:
        """Its answer. A server that refuses the schema is asked without one from then on. Raises ScorerFailed."""
        forced = self._forms and question.schema is not None
        status, data = await self._endpoint.post(self._body(question, forced=forced))
        if forced and status in _FORM_REFUSED:
            self._forms = False
            status, data = await self._endpoint.post(self._body(question, forced=False))
        if status >= 300:
            raise ScorerFailed(f"the judging server refuses the request ({status}); check its url and model")
        return _content(data)

    async def close(self) -> None:
        """Close its connections."""
        await self._endpoint.close()

    def _body(self, question: Question, *, forced: bool) -> Json:
        body: Json = {
            "model": self._model,
            "messages": question.messages,
            "temperature": question.temperature,
            "max_tokens": question.max_tokens,
        }
        if forced:
            form = {"name": "answer", "schema": question.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body


class Clearing:
    """What of a case may be shown to a model that is asked."""

    def __init__(self, border: Border | None, *, remote: bool) -> None:
        self._border = border if remote else None

    async def texts(self, case: Case, texts: Sequence[str]) -> list[str]:
        """The texts as they may be shown.

        Raises:
            NotScorable: they may not leave this machine.
            ScorerFailed: they cannot be redacted now.
        """
        if self._border is None:
            return list(texts)
        last = case.answer
        try:
            shown = [visible(text) for text in texts]
            found = await self._border.cleared(shown, session_id=last.step.session_id, app=last.app)
        except RedactionError as error:
            raise ScorerFailed(f"what would be asked cannot be redacted now: {error}") from error
        if found is None:
            raise NotScorable("what would be asked may not leave this machine: its session is limited, or not redacted")
        return found


def open_asked(settings: AskedSettings, deps: "Deps", *, where: str) -> Asked:
    """The model that these settings name; `where` is their name in the configuration.

    Raises:
        ConfigError: there is none, it may not be asked, or its key is not there.
    """
    if settings.url == LOCAL:
        if deps.engine is None:
            raise ConfigError(f"[{where}] url = 'local', and no model is served here; name an OpenAI-compatible server")
        return LocalAsked(LocalModel(deps.engine, within_s=settings.timeout_s))
    base = checked_url(settings.url, where)
    if not settings.model:
        raise ConfigError(f"[{where}] url is set and model is not; name the model to ask there")
    url = base if base.path.endswith("/chat/completions") else _based(base) / "chat" / "completions"
    return ChatAsked(Endpoint(url, settings, where=where, deps=deps), settings)


def checked_url(text: str, where: str) -> URL:
    """An address in the form that can be asked.

    Raises:
        ConfigError: it is none, or holds a password.
    """
    try:
        url = URL(text.strip().rstrip("/"))
    except ValueError as error:
        raise ConfigError(f"[{where}] url is no address: {error}") from error
    if url.user or url.password or url.query_string or url.fragment:
        raise ConfigError(f"[{where}] url holds more than an address; put the key into a file and name it as key_file")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"[{where}] url = {text!r}; it is `local`, or an address like http://127.0.0.1:8000/v1")
    return url


def is_loopback(url: URL) -> bool:
    """Whether an address is of this machine, by its own word: names other than `localhost` may lead anywhere."""
    host = (url.host or "").rstrip(".").lower()
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _based(base: URL) -> URL:
    return base / "v1" if base.path in ("", "/") else base


def _check_remote(url: URL, settings: EndpointSettings, *, where: str, border: Border | None) -> None:
    if not settings.remote:
        raise ConfigError(
            f"[{where}] url leads to {url.host}, not to this machine: what you and your agent say would go there; "
            "if you want that, set remote = true (docs/judging.md says what is sent)"
        )
    if url.scheme != "https":
        raise ConfigError(
            f"[{where}] url would send what is judged to {url.host} in the clear; use https://, or a tunnel that ends "
            "on 127.0.0.1"
        )
    if border is None:
        raise ConfigError(
            f"[{where}] url leads to {url.host}, and nothing here can tell what may go there; use `local`"
        )


def _read_key(settings: EndpointSettings, where: str) -> str:
    """Raises ConfigError: both places are named, or the named one has no key."""
    if settings.key_env and settings.key_file:
        raise ConfigError(f"[{where}] names key_env and key_file; a key is in one of them")
    if settings.key_env:
        key, place = os.environ.get(settings.key_env, "").strip(), f"key_env = {settings.key_env!r}"
    elif settings.key_file:
        key, place = _key_in(Path(settings.key_file).expanduser(), where), f"key_file = {settings.key_file!r}"
    else:
        return ""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"[{where}] {place} holds no key; it is one line of printable ASCII")
    return key


def _key_in(path: Path, where: str) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"[{where}] key_file = {str(path)!r} cannot be read: {type(error).__name__}") from error
    if mode & 0o077:
        raise ConfigError(f"[{where}] key_file = {str(path)!r} can be read by others ({mode:04o}); chmod 600 it")
    return text


def _check_status(status: int, name: str) -> None:
    """Raises ScorerFailed: this answer says nothing of the request itself."""
    if status in (401, 403):
        raise ScorerFailed(f"{name} refuses this edge's key ({status}); check key_env or key_file")
    if 300 <= status < 400:
        raise ScorerFailed(f"{name} redirects ({status}); set url to where it leads")
    if status in (408, 425, 429) or (status >= 500 and status not in _FORM_REFUSED):
        raise ScorerFailed(f"{name} cannot answer now ({status})")


async def _bounded(response: aiohttp.ClientResponse, name: str) -> bytes:
    found = bytearray()
    while data := await response.content.readany():
        found += data
        if len(found) > MAX_REPLY_BYTES:
            raise ScorerFailed(f"{name} answered with more than {MAX_REPLY_BYTES} bytes")
    return bytes(found)


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def _content(data: bytes) -> str:
    """What a completion says, without thoughts. Raises ScorerFailed: it is none."""
    try:
        choices = msgspec.json.decode(data, type=_Completion).choices
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ScorerFailed("the judging server's answer is no chat completion; check its url") from error
    text = (choices[0].message.content or "") if choices else ""
    return text.rpartition(_THINK_END)[2]


def object_in(answer: str, *, most_chars: int = 20_000) -> Any:
    """The one JSON object that an answer is, perhaps in a fence; None if it is anything else. Takes no NaN."""
    text = answer.strip()[:most_chars]
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0].strip()
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _no_number(name: str) -> None:
    raise ValueError(name)

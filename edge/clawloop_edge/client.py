"""The Python API of white-box offline mode: a program that holds the tokens itself talks to the edge that runs.

    with Client() as edge:
        trajectory = edge.trajectory(group="sums", group_size=2)
        drawn = edge.generate(prompt_ids, max_tokens=64)
        edge.submit_steps([trajectory.step(prompt_ids, drawn, is_last=True)])
        trajectory.complete(reward=1.0)

Blocking, and safe to share between threads: every call has a connection of its own, to a loopback address, past any
proxy. Knows no tokenizer, no model and no database. docs/offline.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote, unquote, urlsplit

import msgspec

from clawloop_edge.home import EdgeHome
from clawloop_shared.errors import ConfigError, InvalidError, UncheckedError

Json = dict[str, Any]
ChannelName = Literal["train", "val"]
T = TypeVar("T")
_BUSY = 503
_MAX_WAIT_S = 30.0
"""the longest pause before a busy edge is asked again, whatever it says"""


class CallRefused(InvalidError):
    """The edge refused a call; the text is its own. `status` is that of HTTP, `param` the field that is to blame."""

    def __init__(self, message: str, *, status: int, code: str = "", param: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class EdgeAway(UncheckedError):
    """The edge does not answer, or something else does at its address."""


class SamplingOptions(TypedDict, total=False):
    """How `generate` samples. `top_p`, `top_k` and `min_p` cut the distribution: such steps are not learned from."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    model: str


class Generated(msgspec.Struct, frozen=True):
    """What was sampled: ids, the logprob (nats) of each, and why it ended: `stop` or `length`."""

    token_ids: list[int]
    log_probs: list[float]
    stop_reason: str


class SubmittedStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step that a program made of what `generate` gave it. `prompt_uid` is its group, if it has one."""

    trajectory_uid: str
    prompt_ids: list[int]
    response_ids: list[int]
    step_index: int = 0
    prompt_uid: str = ""
    rollout_log_probs: list[float] | None = None
    reward: float | None = None
    is_last: bool = False
    metadata: Json | None = None


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """One answer. `step_id` names it in feedback; `trainable` is `yes`, or `no (why)`; `raw` is all that was said."""

    step_id: str
    content: str
    tool_calls: list[Json]
    finish_reason: str
    trainable: str
    raw: Json


class Completed(msgspec.Struct, frozen=True):
    """The end of a trajectory: how many steps it has, the reward that was given, and its channel."""

    steps: int
    reward: float | None
    channel: str


class Judged(msgspec.Struct, frozen=True):
    """A judgement that is on disk."""

    signal_id: str
    target: str
    target_id: str
    value: float


class ComputedReward(msgspec.Struct, frozen=True):
    """What the edge's scorer says: a reward in [-1, 1], None where it has no opinion, and what it says of that."""

    reward: float | None = msgspec.field(name="reward_score")
    info: Json = msgspec.field(name="reward_extra_info", default_factory=dict)


class _Failure(msgspec.Struct):
    message: str = ""
    code: str | None = None
    param: str | None = None


class _Refusal(msgspec.Struct):
    error: _Failure


class _Begun(msgspec.Struct):
    trajectory_uid: str


class _Accepted(msgspec.Struct):
    accepted: int


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[Json] = []


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    id: str
    choices: list[_Choice]


class _Reply(msgspec.Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Client:
    """Talks to one edge. Without `url` and `token` it finds the one of `home`, or of this user's own home.

    `timeout_s` is for one call; a busy edge is asked again up to `retries` times, after the pause that it names.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        home: Path | str | None = None,
        timeout_s: float = 600.0,
        retries: int = 5,
    ) -> None:
        """Find the edge; nothing is sent yet.

        Raises:
            ConfigError: no edge was set up in that home, or the URL is none.
        """
        if url is None or token is None:
            found = EdgeHome.at(Path(home) if home is not None else None)
        if url is None:
            gateway = found.require().load_config().gateway
            url = f"http://{gateway.host}:{gateway.port}"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of an edge; it is like http://127.0.0.1:8100")
        self._token = token or unquote(parts.password or "") or found.require().token()
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._timeout_s, self._retries = timeout_s, retries
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open between calls; here for `with`, and for what may be held one day."""

    def generate(self, prompt_ids: Sequence[int], **sampling: Unpack[SamplingOptions]) -> Generated:
        """Continue `prompt_ids` by the current policy.

        Raises:
            CallRefused: the ids or the options are not taken, or the edge stayed busy.
            EdgeAway: the edge does not answer.
        """
        body = {"prompt_ids": list(prompt_ids), "sampling_params": sampling}
        return self._said("/generate", body, Generated)

    def trajectory(
        self,
        *,
        group: str = "",
        group_size: int | None = None,
        channel: ChannelName = "train",
        metadata: Json | None = None,
    ) -> Trajectory:
        """Begin a trajectory. `group` is what it is compared with, `group_size` how many of them there will be.

        Raises:
            CallRefused, EdgeAway: as in `generate`.
        """
        begun = self._said("/init_trajectory", None, _Begun)
        made = Trajectory(self, begun.trajectory_uid, group=group)
        facts = {"channel": channel, "metadata": metadata, "group_size": group_size}
        self._call(f"{made.path}/v1/register_trajectory", {k: v for k, v in facts.items() if v is not None})
        return made

    def submit_steps(self, steps: Sequence[SubmittedStep], *, channel: ChannelName = "train") -> int:
        """Hand in steps, all or none; how many are on disk now. Those that `generate` did not give are kept, and never
        learned from.

        Raises:
            CallRefused, EdgeAway: as in `generate`; 409: a step of that number is there, with other tokens.
        """
        return self._said(f"/submit_steps?channel={channel}", {"steps": list(steps)}, _Accepted).accepted

    def compute_reward(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], *, dataset_fields: Json | None = None
    ) -> ComputedReward:
        """What the edge's own scorer says of a response, by what is known of its task; nothing is kept.

        Raises:
            CallRefused: as in `generate`; 503: the edge has no scorer for this.
            EdgeAway: the edge does not answer.
        """
        body = {"prompt_ids": list(prompt_ids), "response_ids": list(response_ids)}
        return self._said("/compute_reward", {**body, "dataset_fields": dataset_fields or {}}, ComputedReward)

    def feedback(
        self,
        *,
        value: float,
        step_id: str = "",
        trace_id: str = "",
        session_id: str = "",
        trajectory_id: str = "",
        weight: float | None = None,
        source: str = "",
        comment: str = "",
    ) -> Judged:
        """Judge one step, run, session or trajectory by a `value` in [-1, 1], at any later time.

        Raises:
            CallRefused: as in `generate`; 404: what is judged is not kept.
            EdgeAway: the edge does not answer.
        """
        named = {"step_id": step_id, "trace_id": trace_id, "session_id": session_id, "trajectory_id": trajectory_id}
        said = {**named, "source": source, "comment": comment, "weight": weight}
        body = {"value": value, **{name: word for name, word in said.items() if word not in ("", None)}}
        return self._said("/v1/feedback", body, Judged)

    def _said(self, path: str, body: Any, shape: type[T]) -> T:
        return self._read(self._call(path, body).body, shape)

    def _read(self, data: bytes, shape: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=shape)
        except msgspec.DecodeError as error:
            raise EdgeAway(f"{self.url} answers, but not as an edge does ({error}); check the address") from error

    def _call(self, path: str, body: Any) -> _Reply:
        """POST, and again while the edge says that it is busy."""
        data = b"" if body is None else msgspec.json.encode(body)
        for left in range(self._retries, -1, -1):
            reply = self._post(path, data)
            if reply.status < 400:
                return reply
            pause = reply.headers.get("retry-after", "")
            if reply.status != _BUSY or not pause.isdigit() or not left:
                break
            time.sleep(min(float(pause), _MAX_WAIT_S))
        raise self._refusal(reply)

    def _refusal(self, reply: _Reply) -> CallRefused:
        try:
            said = msgspec.json.decode(reply.body, type=_Refusal).error
        except msgspec.DecodeError:
            said = _Failure(f"{self.url} answered with status {reply.status}, and not as an edge does")
        return CallRefused(said.message, status=reply.status, code=said.code or "", param=said.param or "")

    def _post(self, path: str, data: bytes) -> _Reply:
        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout_s)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        try:
            connection.request("POST", path, body=data, headers=headers)
            response: HTTPResponse = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return _Reply(response.status, found, response.read())
        except (OSError, HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise EdgeAway(
                f"the edge at {self.url} does not answer ({reason}); start it with clawloop-edge serve"
            ) from error
        finally:
            connection.close()


class Trajectory:
    """One trajectory that was begun. An agent is told `base_url`; it needs no token there, only the URL."""

    def __init__(self, client: Client, trajectory_id: str, *, group: str = "") -> None:
        self._client, self.trajectory_id, self.group = client, trajectory_id, group
        self.path = f"/{trajectory_id}/{quote(group, safe='') or '1'}"
        """below the edge's URL; `1` stands for no group"""

    @property
    def base_url(self) -> str:
        """For clients of OpenAI's API."""
        return f"{self._client.url}{self.path}/v1"

    def chat(self, messages: Sequence[Json], **options: Any) -> ChatReply:
        """One call of the model with OpenAI's messages, as the next step; `options` are further fields of the request.

        Raises:
            CallRefused, EdgeAway: as in `Client.generate`.
        """
        body = {"model": "clawloop", "messages": list(messages), **options}
        reply = self._client._call(f"{self.path}/v1/chat/completions", body)
        said, raw = self._client._read(reply.body, _Completion), self._client._read(reply.body, Json)
        first = said.choices[0]
        return ChatReply(
            step_id=said.id,
            content=first.message.content or "",
            tool_calls=first.message.tool_calls,
            finish_reason=first.finish_reason or "",
            trainable=reply.headers.get("x-clawloop-trainable", ""),
            raw=raw,
        )

    def step(
        self, prompt_ids: Sequence[int], drawn: Generated, *, index: int = 0, is_last: bool = False
    ) -> SubmittedStep:
        """What `generate` gave for a prompt, as step `index` of this trajectory, for `Client.submit_steps`."""
        return SubmittedStep(
            trajectory_uid=self.trajectory_id,
            prompt_uid=self.group,
            step_index=index,
            prompt_ids=list(prompt_ids),
            response_ids=drawn.token_ids,
            rollout_log_probs=drawn.log_probs,
            is_last=is_last,
        )

    def complete(self, reward: float | None = None) -> Completed:
        """End it. Without a reward it is not learned from until something judges it: that is no reward of 0.

        Raises:
            CallRefused, EdgeAway: as in `Client.generate`.
        """
        body = {} if reward is None else {"reward": reward}
        return self._client._said(f"{self.path}/v1/complete_trajectory", body, Completed)

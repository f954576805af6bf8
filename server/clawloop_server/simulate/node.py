"""One node of the Fleet API, asynchronous, so that a few processes can hold a thousand of them.

It says on the wire what the edge's embedded node says: the same calls in the same order, signed alike, over a TLS
connection of its own. Everything private of flwr that it uses is in `_flwr`. Knows no message of ours.
"""

import asyncio
import base64
import ssl
from typing import Any

import aiohttp
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_server.errors import FleetError
from clawloop_shared.messages import JOIN_PATH, RECORD, SMALL_PAYLOAD_BYTES

_PROTOBUF = "application/protobuf"
_STYPE = "clawloop.wire"
_OBJECT_WAIT_S = 30.0
_CALLS = {
    "activate-node": "ActivateNodeResponse",
    "deactivate-node": "DeactivateNodeResponse",
    "send-node-heartbeat": "SendNodeHeartbeatResponse",
    "pull-messages": "PullMessagesResponse",
    "pull-object": "PullObjectResponse",
    "confirm-message-received": "ConfirmMessageReceivedResponse",
    "push-messages": "PushMessagesResponse",
    "push-object": "PushObjectResponse",
}


class CallFailed(FleetError):
    """A call came to nothing; `kind` is what it is counted as."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def load_flwr() -> Any:
    """flwr's parts as attributes of one namespace, with its telemetry, update check and console output off."""
    from clawloop_server.fleet.control import quiet_flwr

    quiet_flwr()
    from clawloop_server.simulate import _flwr

    return _flwr


class Node:
    """A connection with a key. `calls` counts what was asked, by name."""

    def __init__(
        self, url: str, tls: ssl.SSLContext, *, flwr: Any, heartbeat_s: float, keep_s: float, timeout_s: float = 30.0
    ) -> None:
        """`keep_s`: how long an idle connection is kept, as httpx's pool keeps the edge's for 5 s."""
        self._url, self._flwr, self._heartbeat_s = url.rstrip("/"), flwr, heartbeat_s
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._public: bytes = flwr.public_key_to_bytes(self._key.public_key())
        self._tls, self._timeout = tls, aiohttp.ClientTimeout(total=timeout_s)
        self._http = self._session(aiohttp.TCPConnector(ssl=tls, limit=0, keepalive_timeout=keep_s))
        self._version = dict(flwr.RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())
        self._node: Any = None
        self.calls: dict[str, int] = {}

    @property
    def public_pem(self) -> str:
        """Its key, as a join request has it."""
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self._key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=connector, timeout=self._timeout, auto_decompress=False)

    async def forget_connections(self) -> None:
        """Make a new connection for each request from now on."""
        await self._http.close()
        self._http = self._session(aiohttp.TCPConnector(ssl=self._tls, limit=0, force_close=True))

    async def join(self, body: bytes) -> bytes:
        """Ask to be let in. Raises CallFailed."""
        return await self._post(JOIN_PATH, body, {}, name="join")

    async def activate(self) -> int:
        """Become reachable; the node's number. Raises CallFailed."""
        flwr = self._flwr
        request = flwr.ActivateNodeRequest(public_key=self._public, heartbeat_interval=self._heartbeat_s)
        node_id: int = (await self._call("activate-node", request)).node_id
        self._node = flwr.Node(node_id=node_id)
        return node_id

    async def beat(self) -> None:
        """Say that it lives. Raises CallFailed."""
        flwr = self._flwr
        request = flwr.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._heartbeat_s)
        await self._call("send-node-heartbeat", request)

    async def receive(self) -> tuple[str, bytes, Any] | None:
        """The next message: its type, its payload, and what `send` needs. Raises CallFailed."""
        flwr = self._flwr
        found = await self._call("pull-messages", flwr.PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        head, tree = flwr.message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        run_id = head.metadata.run_id
        contents = {}
        for part in flwr.iterate_object_tree(tree):
            contents[part.object_id] = await self._object(run_id, part.object_id)
        await self._call(
            "confirm-message-received",
            flwr.ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=tree.object_id),
        )
        message = flwr.inflate_object_from_contents(tree.object_id, contents)
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return head.metadata.message_type, _payload(message), message

    async def send(self, original: Any, payload: bytes) -> None:
        """Answer a message. Raises CallFailed."""
        flwr, run_id = self._flwr, original.metadata.run_id
        reply = flwr.Message(_record(flwr, payload), reply_to=original)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with flwr.no_object_id_recompute():
            objects = {name: part.deflate() for name, part in flwr.get_all_nested_objects(reply).items()}
            tree = flwr.get_object_tree(reply)
            head = flwr.message_to_proto(flwr.remove_content_from_message(reply))
        request = flwr.PushMessagesRequest(
            node=self._node, messages_list=[head], message_object_trees=[tree], clientapp_runtime_list=[0.0]
        )
        pushed = await self._call("push-messages", request)
        wanted = set(pushed.objects_to_push)
        for name, content in objects.items():
            if name in wanted:
                part = flwr.PushObjectRequest(
                    node=self._node,
                    run_id=run_id,
                    object_id=name,
                    object_content=content,
                    session_id=pushed.session_id,
                )
                if not (await self._call("push-object", part)).stored:
                    raise CallFailed("push-object: not stored")

    async def leave(self) -> None:
        """Say goodbye, as far as that is possible, and free the connection."""
        try:
            if self._node is not None:
                await self._call("deactivate-node", self._flwr.DeactivateNodeRequest(node_id=self._node.node_id))
        finally:
            await self._http.close()

    async def close(self) -> None:
        """Free the connection."""
        await self._http.close()

    async def _object(self, run_id: int, name: str) -> bytes:
        request = self._flwr.PullObjectRequest(node=self._node, run_id=run_id, object_id=name)
        waited_s, wait_s = 0.0, 0.005
        while True:
            found = await self._call("pull-object", request)
            if found.object_available:
                content: bytes = found.object_content
                return content
            if not found.object_found or waited_s > _OBJECT_WAIT_S:
                raise CallFailed("pull-object: not there")
            await asyncio.sleep(wait_s)
            waited_s, wait_s = waited_s + wait_s, min(wait_s * 2, 1.0)

    async def _call(self, name: str, request: Any) -> Any:
        body = request.SerializeToString(deterministic=True)
        answer = getattr(self._flwr, _CALLS[name])()
        answer.ParseFromString(await self._post(f"/v1/fleet/{name}", body, self._signed(), name=name))
        return answer

    async def _post(self, path: str, body: bytes, headers: dict[str, str], *, name: str) -> bytes:
        self.calls[name] = self.calls.get(name, 0) + 1
        kinds = {"content-type": _PROTOBUF, "accept": _PROTOBUF, **headers}
        try:
            async with self._http.post(self._url + path, data=body, headers=kinds, allow_redirects=False) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CallFailed(f"{name}: {type(error).__name__}") from error
        if response.status != 200:
            raise CallFailed(f"{name}: {response.status}")
        return content

    def _signed(self) -> dict[str, str]:
        """The headers of flwr's NodeAuthHttpInterceptor: the time, signed by the node's key."""
        stamp = self._flwr.now().isoformat()
        signature: bytes = self._flwr.sign_message(self._key, stamp.encode("ascii"))
        return {
            **self._version,
            "flwr-public-key": base64.b64encode(self._public).decode("ascii"),
            "flwr-timestamp": stamp,
            "flwr-signature": base64.b64encode(signature).decode("ascii"),
        }


def _record(flwr: Any, payload: bytes) -> Any:
    if len(payload) <= SMALL_PAYLOAD_BYTES:
        return flwr.RecordDict({RECORD: flwr.ConfigRecord({RECORD: payload})})
    array = flwr.Array("uint8", (len(payload),), _STYPE, payload)
    return flwr.RecordDict({RECORD: flwr.ArrayRecord({RECORD: array})})


def _payload(message: Any) -> bytes:
    small, large = message.content.config_records.get(RECORD), message.content.array_records.get(RECORD)
    data = small.get(RECORD) if small is not None else large[RECORD].data if large and RECORD in large else None
    return data if isinstance(data, bytes) else b""

"""The Flower node inside the edge: it speaks the Fleet API through flwr's own client and never runs a FAB.

Everything private of flwr that this driver uses is in this module and `_flwr`, so the version is pinned exactly and
checked before the first import. Two of flwr's habits are left out on purpose, because they end the whole process and
with it the agent: its retry helper and its connection send SIGINT on a 401, and its version interceptor may exit on an
answer of the server. Redirects are not followed.
"""

import importlib.metadata
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_edge.node.join import Membership
from clawloop_edge.node.records import VersionHeaders, payload_of, reply_to
from clawloop_edge.node.sockets import Sockets
from clawloop_edge.node.transport import (
    Answer,
    Incoming,
    NodeError,
    NodeRefused,
    Permit,
    ServerAway,
    Withdrawn,
)
from clawloop_shared.errors import KeyMissing
from clawloop_shared.messages import MAX_PAYLOAD_BYTES

_log = logging.getLogger(__name__)

FLWR_VERSION = "1.41.0"
_HEARTBEAT_S = 30.0
_HEARTBEAT_AT = (0.5, 0.8)
_TIMEOUT_S = 30.0
_GOODBYE_S = 3.0
_RETRY_FOR_S = 20.0
_RETRY_S = (0.1, 2.0)
_TRANSIENT = frozenset({500, 502, 503, 504})
_MAX_OBJECTS = 64
_OBJECT_WAIT_S = 30.0
_CUT = "an answer was broken off: it may no longer leave"


def check_flwr() -> None:
    """Return if the installed flwr is the one that this module was written for.

    Raises:
        NodeError: another version, or none.
    """
    try:
        found = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != FLWR_VERSION:
        raise NodeError(
            f"flwr {found} is installed; sync needs exactly {FLWR_VERSION}: pip install flwr=={FLWR_VERSION}"
        )


def load_flwr() -> Any:
    """flwr's parts as attributes of one namespace, with its telemetry, update check and console output off.

    Raises:
        NodeError: flwr is missing, of another version, or lacks a part.
    """
    check_flwr()
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    try:
        from clawloop_edge.node import _flwr
    except ImportError as error:
        raise NodeError(f"flwr {FLWR_VERSION} lacks a part that sync needs: {error}; install it again") from error
    for name in ("flwr", "flwr-telemetry", "httpx"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.WARNING)
    return _flwr


class FlowerTransport:
    """One node of the fleet. `connect` may be called again after any failure."""

    def __init__(
        self,
        membership: Membership,
        *,
        node_id: int = 0,
        remember: Callable[[int], None] = lambda _: None,
        heartbeat_s: float = _HEARTBEAT_S,
    ) -> None:
        """`node_id` is what `remember` was last told (0: never): with it, a key that we left taken is freed at once."""
        self._membership, self._heartbeat_s = membership, heartbeat_s
        self._node_id, self._remember = node_id or membership.node_id, remember
        self._closing = threading.Event()
        self._sockets = Sockets()
        self._client: Any = None
        self._heart: threading.Thread | None = None
        self._flwr: Any = None
        self._node: Any = None

    def connect(self) -> None:
        """Activate our key at the SuperLink.

        After an unclean death the key stays taken for two heartbeats. It is ours alone, so it is freed and taken again.
        """
        self._flwr = self._flwr or load_flwr()
        self._closing.clear()
        self._client = self._open_client()
        try:
            node_id = self._activate()
        except NodeError:
            self._once("DeactivateNode", self._flwr.DeactivateNodeRequest(node_id=self._node_id))
            node_id = self._activate()
        if node_id != self._node_id:
            self._node_id = node_id
            self._remember(node_id)
        self._node = self._flwr.Node(node_id=node_id)
        self._heart = threading.Thread(target=self._beat, name="clawloop-heartbeat", daemon=True)
        self._heart.start()

    def receive(self) -> Incoming | None:
        """The next message with its payload, or None."""
        response = self._call("PullMessages", self._flwr.PullMessagesRequest(node=self._node))
        if not response.messages_list:
            return None
        head = self._flwr.message_from_proto(response.messages_list[0])
        try:
            message = self._pull(head.metadata.run_id, response.message_object_trees[0])
        except NodeRefused as refused:  # if it is us who are refused, the next question tells
            _log.info("a message of a run that has ended was dropped: %s", refused)
            return None
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return Incoming(head.metadata.message_type, payload_of(message), message)

    def send(self, incoming: Incoming, answer: Answer, *, permit: Permit) -> None:
        """Answer. An answer that the server no longer waits for (its run ended) is dropped: it will ask again."""
        flwr, original = self._flwr, incoming.handle
        run_id = original.metadata.run_id
        reply = reply_to(flwr, original, answer)
        with flwr.no_object_id_recompute():
            objects, tree = flwr.get_all_nested_objects(reply), flwr.get_object_tree(reply)
            head = flwr.remove_content_from_message(reply) if reply.has_content() else reply
            request = flwr.PushMessagesRequest(
                node=self._node,
                messages_list=[flwr.message_to_proto(head)],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
            try:
                _ask(permit)
                pushed = self._call("PushMessages", request)
                self._push(run_id, pushed, objects, permit=permit)
            except NodeRefused as refused:
                _log.info("an answer came too late and was dropped: %s", refused)

    def cut(self) -> None:
        """Reset the connections: what the system has not sent of them yet is thrown away."""
        self._closing.set()
        self._sockets.cut()

    def close(self, *, goodbye: bool = True) -> None:
        """Deactivate the node, so that it may come back at once."""
        self._closing.set()
        client, self._client = self._client, None
        heart, self._heart = self._heart, None
        if client is None:
            return
        try:
            if self._node is not None and goodbye:
                self._goodbye(client, self._node.node_id)
        finally:
            self._node = None
            client.close()
        if heart is not None and heart is not threading.current_thread():
            heart.join(_GOODBYE_S)

    # requests

    def _open_client(self) -> Any:
        flwr, membership = self._flwr, self._membership
        key = _load_key(membership.node_key_pem)
        context = ssl.create_default_context(cadata=membership.ca_pem)
        self._sockets = sockets = Sockets()
        client = flwr.FleetHttpClient(
            f"https://{urlsplit(membership.url).netloc}",
            interceptors=[
                flwr.NodeAuthHttpInterceptor(key, key.public_key()),
                VersionHeaders(flwr, "SuperNode"),
                sockets,
            ],
            verify=context,
            timeout=_TIMEOUT_S,
        )
        client._client.follow_redirects = False
        return client

    def _activate(self) -> int:
        request = self._flwr.ActivateNodeRequest(
            public_key=_load_key(self._membership.node_key_pem)
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
            heartbeat_interval=self._heartbeat_s,
        )
        node_id: int = self._once("ActivateNode", request).node_id
        return node_id

    def _goodbye(self, client: Any, node_id: int) -> None:
        client._client.timeout = _GOODBYE_S
        try:
            client.DeactivateNode(self._flwr.DeactivateNodeRequest(node_id=node_id))
        except (self._flwr.httpx.HTTPError, ValueError) as error:
            _log.info("left without a goodbye: %s", error)

    def _beat(self) -> None:
        client, flwr = self._client, self._flwr
        request = flwr.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=self._heartbeat_s)
        while not self._closing.wait(self._heartbeat_s * random.uniform(*_HEARTBEAT_AT)):
            try:
                client.SendNodeHeartbeat(request)
            except Exception as error:  # noqa: BLE001 - a heart that stops would make the server forget a node that serves
                _log.info("heartbeat: %s", type(error).__name__)

    def _once(self, name: str, request: Any) -> Any:
        client, httpx = self._client, self._flwr.httpx
        if client is None:
            raise ServerAway("the connection was closed")
        if self._sockets.were_cut:
            raise Withdrawn(_CUT)
        try:
            return getattr(client, name)(request)
        except httpx.HTTPStatusError as error:
            raise _judged(name, error.response.status_code) from error
        except httpx.TransportError as error:
            if self._sockets.were_cut:
                raise Withdrawn(_CUT) from error
            raise ServerAway(f"{self._membership.url}: {type(error).__name__} {error}") from error
        except (ValueError, RuntimeError) as error:
            raise ServerAway(f"{self._membership.url} gave an answer that is no Flower message: {error}") from error

    def _call(self, name: str, request: Any) -> Any:
        """A request, tried again while the server restarts: a message taken from it must not be left half done."""
        deadline, wait_s = time.monotonic() + _RETRY_FOR_S, _RETRY_S[0]
        while True:
            try:
                return self._once(name, request)
            except ServerAway:
                if time.monotonic() > deadline or self._closing.wait(wait_s):
                    raise
                wait_s = min(wait_s * 2, _RETRY_S[1])

    # objects

    def _pull(self, run_id: int, tree: Any) -> Any:
        flwr = self._flwr
        wanted = [node.object_id for node in flwr.iterate_object_tree(tree)]
        if len(wanted) > _MAX_OBJECTS:
            raise NodeError(f"the server sent a message of {len(wanted)} objects; the limit is {_MAX_OBJECTS}")
        contents: dict[str, bytes] = {}
        left = MAX_PAYLOAD_BYTES + (1 << 20)
        for object_id in wanted:
            contents[object_id] = self._pull_object(run_id, object_id)
            left -= len(contents[object_id])
            if left < 0:
                raise NodeError(f"the server sent a message over the limit of {MAX_PAYLOAD_BYTES} bytes")
        confirm = flwr.ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=tree.object_id)
        self._call("ConfirmMessageReceived", confirm)
        return flwr.inflate_object_from_contents(tree.object_id, contents)

    def _pull_object(self, run_id: int, object_id: str) -> bytes:
        request = self._flwr.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        deadline, wait_s = time.monotonic() + _OBJECT_WAIT_S, 0.005
        while True:
            response = self._call("PullObject", request)
            if response.object_available:
                content: bytes = response.object_content
                return content
            if not response.object_found or time.monotonic() > deadline or self._closing.wait(wait_s):
                raise ServerAway("a part of a message did not arrive at the server; it will be sent again")
            wait_s = min(wait_s * 2, 1.0)

    def _push(self, run_id: int, pushed: Any, objects: dict[str, Any], *, permit: Permit) -> None:
        wanted = set(pushed.objects_to_push)
        for object_id, held in objects.items():
            if object_id not in wanted:
                continue
            _ask(permit)
            request = self._flwr.PushObjectRequest(
                node=self._node,
                run_id=run_id,
                object_id=object_id,
                object_content=held.deflate(),
                session_id=pushed.session_id,
            )
            if not self._call("PushObject", request).stored:
                raise ServerAway("the server did not keep a part of our answer; it will ask again")


def _ask(permit: Permit) -> None:
    if not permit():
        raise Withdrawn(_CUT)


def _judged(name: str, status: int) -> NodeError:
    if status in (401, 403):
        return NodeRefused(f"the server answered {name} with {status}: this device is not (or no longer) a member")
    if status in _TRANSIENT:
        return ServerAway(f"the server answered {name} with {status}")
    return NodeError(f"the server answered {name} with {status}")


def _load_key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyMissing("the node key of this membership is no EC key; leave and join again")
    return key

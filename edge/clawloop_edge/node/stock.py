"""The stock SuperNode as a second driver: `flower-supernode` as a child of the edge, and the edge as its executor.

A stock SuperNode runs no app itself. It stores what it was sent and waits, on a Runtime API on loopback, for an
executor that fetches the app and runs it. Here there is none but this module: with `--isolation process` the SuperNode
starts no superexec, and of what the Runtime API gives out only the message is read. The app (FAB) is code from the
server, and nothing on this device ever installs or imports it. Why: docs/decisions/0006-learning-together.md.

Slower than `flower` by the SuperNode's own polling (3 s), and it needs a process of 130 MB; it uses other parts of
flwr, so that one driver is left when the other's parts move.
"""

import contextlib
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from cryptography.hazmat.primitives import serialization

from clawloop_edge.node.flower import load_flwr
from clawloop_edge.node.join import Membership
from clawloop_edge.node.leftovers import KEY_FILE
from clawloop_edge.node.records import VersionHeaders, payload_of, reply_to
from clawloop_edge.node.transport import Answer, Incoming, NodeError, Permit, ServerAway, Withdrawn
from clawloop_shared import guard
from clawloop_shared.files import private_folder, publish_secret
from clawloop_shared.messages import MAX_PAYLOAD_BYTES

_log = logging.getLogger(__name__)

_PROGRAM = "flower-supernode"
_START_S = 60.0
_GRACE_S = 5.0
_LOOK_S = 0.1
_CALL_S = 30.0
_BEAT_S = 10.0
_OBJECT_S = 60.0
_LEAVES_S = 600.0
"""how long a reply may take to leave the SuperNode"""
_MAX_OBJECTS = 64
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_NODE_ID = re.compile(rb"SuperNode ID: (\d+)")
_TAIL_BYTES = 2000
_CUT = "an answer was broken off: it may no longer leave"


class _Task(msgspec.Struct, frozen=True):
    """One message under way: the client that holds its token, and what is needed to answer it."""

    client: Any
    message: Any
    context: Any
    node: Any


class StockTransport:
    """One supervised SuperNode. `connect` may be called again after any failure; it starts a new one."""

    def __init__(
        self, membership: Membership, *, folder: Path, remember: Callable[[int], None] = lambda _: None
    ) -> None:
        """`folder` (made, 0700) holds what the SuperNode reads: its key only until it has started."""
        self._membership, self._folder, self._remember = membership, folder, remember
        self._closing, self._were_cut = threading.Event(), False
        self._process: subprocess.Popen[bytes] | None = None
        self._ear: _Ear | None = None
        self._flwr: Any = None
        self._runtime: Any = None
        self._exec: Any = None
        self._address = ""
        self._task: _Task | None = None

    def connect(self) -> None:
        """Start the SuperNode and wait until it is a node of the fleet.

        After an unclean death its key stays taken for a minute; until then it cannot be started (ServerAway).
        """
        self._load()
        self._closing.clear()
        self._were_cut = False
        secret = secrets.token_bytes(32)
        port = _free_port()
        self._address = f"http://127.0.0.1:{port}"
        key = self._start(port, secret)
        try:
            node_id = self._until_active()
        finally:
            key.unlink(missing_ok=True)
        self._remember(node_id)
        signed = self._runtime.SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=[_ACQUIRE])
        self._exec = self._client(signed, component="SuperExec")
        threading.Thread(target=self._beat, name="clawloop-task-heartbeat", daemon=True).start()

    def receive(self) -> Incoming | None:
        """The next message with its payload, or None."""
        self._check_alive()
        request = self._runtime.AcquireTaskRequest(supported_task_types=[self._runtime.TaskType.CLIENT_APP])
        found = self._call(self._exec, "AcquireTask", request)
        if not (found.HasField("task") and found.token):
            return None
        client = self._client(self._runtime.RuntimeTokenHttpInterceptor(found.token), component="flwr-clientapp")
        message, task = self._take(client)
        self._task = task
        return Incoming(message.metadata.message_type, payload_of(message), task)

    def send(self, incoming: Incoming, answer: Answer, *, permit: Permit) -> None:
        """Answer, and wait until the SuperNode has passed all of it on, so that it can be cut until then."""
        flwr, task = self._flwr, incoming.handle
        reply = reply_to(flwr, task.message, answer)
        with flwr.no_object_id_recompute():
            objects, tree = flwr.get_all_nested_objects(reply), flwr.get_object_tree(reply)
            head = flwr.remove_content_from_message(reply) if reply.has_content() else reply
            request = self._runtime.PushAppMessagesRequest(
                messages_list=[flwr.message_to_proto(head)], message_object_trees=[tree]
            )
            _ask(permit)
            pushed = self._call(task.client, "PushMessages", request)
            for object_id in pushed.objects_to_push:
                _ask(permit)
                self._push(task, pushed.session_id, object_id, objects[object_id].deflate())
        self._until_left(task, reply.object_id, permit=permit)
        status = self._runtime.SubStatus.COMPLETED
        self._call(task.client, "PushTaskOutput", self._runtime.PushTaskOutputRequest(sub_status=status, details=""))
        self._task = None
        task.client.close()

    def cut(self) -> None:
        """Kill the SuperNode: the system resets its connections, and what it had not sent is gone with it."""
        self._closing.set()
        self._were_cut = True
        self._kill()

    def close(self, *, goodbye: bool = True) -> None:
        """End the SuperNode; with `goodbye` it tells the server, so that it may come back at once."""
        self._closing.set()
        process, self._process = self._process, None
        task, self._task = self._task, None
        for client in (self._exec, task.client if task else None):
            if client is not None:
                client.close()
        self._exec = None
        if process is None:
            return
        if goodbye and not self._were_cut and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S + 2)
        _kill_group(process)
        process.wait()
        if process.stdin:
            process.stdin.close()

    # the child

    def _load(self) -> None:
        self._flwr = self._flwr or load_flwr()
        try:
            from clawloop_edge.node import _flwr_runtime
        except ImportError as error:
            raise NodeError(f"flwr lacks a part that the stock driver needs: {error}; set [node] driver") from error
        self._runtime = _flwr_runtime

    def _start(self, port: int, secret: bytes) -> Path:
        """Start it; the file with its key, to be removed once it was read."""
        folder = private_folder(self._folder)
        key, authority, auth = folder / KEY_FILE, folder / "ca.pem", folder / "superexec.secret"
        publish_secret(key, _openssh(self._membership.node_key_pem))
        publish_secret(authority, self._membership.ca_pem.encode())
        publish_secret(auth, secret)
        where = urlsplit(self._membership.url)
        command = [
            str(Path(sys.executable).parent / _PROGRAM),
            *("--superlink", f"{_bracketed(where.hostname or '')}:{where.port or 443}"),
            *("--root-certificates", str(authority), "--auth-supernode-private-key", str(key)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(auth)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(_GRACE_S), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_environment(folder),
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            key.unlink(missing_ok=True)
            raise NodeError(f"cannot start {_PROGRAM}: {error}; pip install 'clawloop[edge]'") from error
        self._ear = _Ear(self._process)
        return key

    def _until_active(self) -> int:
        assert self._process is not None
        assert self._ear is not None
        deadline = time.monotonic() + _START_S
        while not self._ear.node_id:
            if self._process.poll() is not None:
                raise ServerAway(f"{_PROGRAM} ended with {self._process.returncode}: {self._ear.tail()}")
            if self._were_cut:
                raise Withdrawn(_CUT)
            if time.monotonic() > deadline or self._closing.is_set():
                raise ServerAway(f"{self._membership.url} did not let {_PROGRAM} in within {_START_S:.0f} s")
            time.sleep(_LOOK_S)
        return self._ear.node_id

    def _check_alive(self) -> None:
        if self._were_cut:
            raise Withdrawn(_CUT)
        process = self._process
        if process is None or process.poll() is not None:
            code = "unknown" if process is None else process.returncode
            raise ServerAway(f"{_PROGRAM} ended with {code}: {self._ear.tail() if self._ear else ''}")

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            _kill_group(process)

    # its Runtime API

    def _client(self, *interceptors: Any, component: str) -> Any:
        versions = VersionHeaders(self._flwr, component)
        client = self._runtime.RuntimeHttpClient(self._address, interceptors=[versions, *interceptors], timeout=_CALL_S)
        client._client.follow_redirects = False
        return client

    def _call(self, client: Any, name: str, request: Any) -> Any:
        httpx = self._flwr.httpx
        if client is None:
            raise ServerAway("the connection was closed")
        try:
            return getattr(client, name)(request)
        except (httpx.HTTPError, ValueError, RuntimeError) as error:
            self._check_alive()
            raise ServerAway(f"the SuperNode did not answer {name}: {type(error).__name__} {error}") from error

    def _take(self, client: Any) -> tuple[Any, _Task]:
        """The task's message. Its app comes with it, since the API gives no choice, and is let go of unread."""
        found = self._call(client, "PullTaskInput", self._runtime.PullTaskInputRequest())
        run_id, node = found.context.run_id, self._flwr.Node(node_id=found.context.node_id)
        pulled = self._call(client, "PullMessages", self._runtime.PullAppMessagesRequest())
        if not pulled.messages_list:
            raise ServerAway("the SuperNode has a task without a message")
        tree = pulled.message_object_trees[0]
        wanted = [one.object_id for one in self._flwr.iterate_object_tree(tree)]
        if len(wanted) > _MAX_OBJECTS:
            raise NodeError(f"the server sent a message of {len(wanted)} objects; the limit is {_MAX_OBJECTS}")
        contents: dict[str, bytes] = {}
        left = 2 * MAX_PAYLOAD_BYTES
        for object_id in wanted:
            contents[object_id] = self._pull(client, node, run_id, object_id)
            left -= len(contents[object_id])
            if left < 0:
                raise NodeError(f"the server sent a message over the limit of {MAX_PAYLOAD_BYTES} bytes")
        confirm = self._flwr.ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=tree.object_id)
        self._call(client, "ConfirmMessageReceived", confirm)
        message = self._flwr.inflate_object_from_contents(tree.object_id, contents)
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, _Task(client, message, found.context, node)

    def _pull(self, client: Any, node: Any, run_id: int, object_id: str) -> bytes:
        request = self._flwr.PullObjectRequest(node=node, run_id=run_id, object_id=object_id)
        deadline = time.monotonic() + _OBJECT_S
        while True:
            response = self._call(client, "PullObject", request)
            if response.object_available:
                content: bytes = response.object_content
                return content
            if not response.object_found or time.monotonic() > deadline or self._closing.wait(_LOOK_S):
                raise ServerAway("a part of a message did not arrive at the SuperNode; it will be sent again")

    def _push(self, task: _Task, session_id: str, object_id: str, content: bytes) -> None:
        request = self._flwr.PushObjectRequest(
            node=task.node,
            run_id=task.context.run_id,
            object_id=object_id,
            object_content=content,
            session_id=session_id,
        )
        if not self._call(task.client, "PushObject", request).stored:
            raise ServerAway("the SuperNode did not keep a part of our answer; the server will ask again")

    def _until_left(self, task: _Task, object_id: str, *, permit: Permit) -> None:
        """The SuperNode deletes a reply when it has sent it (or has failed to: then the server asks again)."""
        request = self._flwr.PullObjectRequest(node=task.node, run_id=task.context.run_id, object_id=object_id)
        deadline = time.monotonic() + _LEAVES_S
        while self._call(task.client, "PullObject", request).object_found:
            _ask(permit)
            if time.monotonic() > deadline:
                raise ServerAway(f"the SuperNode did not pass on an answer within {_LEAVES_S:.0f} s")
            if self._closing.wait(_LOOK_S):
                self._check_alive()
                raise ServerAway("stopped while an answer was being passed on")

    def _beat(self) -> None:
        """Tell the SuperNode that its task is alive, however long a handler takes."""
        closing, request = self._closing, self._runtime.SendTaskHeartbeatRequest()
        while not closing.wait(_BEAT_S):
            task = self._task
            if task is None:
                continue
            try:
                task.client.SendTaskHeartbeat(request)
            except Exception as error:  # noqa: BLE001 - a heart that stops would lose the task; the next beat may work
                _log.info("task heartbeat: %s", type(error).__name__)


class _Ear:
    """Reads what the SuperNode says, so that its pipe never fills: its node id, and its last words."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.node_id = 0
        self._said = b""
        self._process = process
        self._thread = threading.Thread(target=self._hear, name="clawloop-supernode-output", daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                self._said = (self._said + line)[-_TAIL_BYTES:]
                found = _NODE_ID.search(line)
                if found:
                    self.node_id = int(found[1])

    def tail(self) -> str:
        """Its last line with an error, in one line."""
        self._thread.join(1.0)
        lines = [line for line in self._said.decode(errors="replace").splitlines() if line.strip()]
        return " ".join(lines[-3:])[-300:]


def _ask(permit: Permit) -> None:
    if not permit():
        raise Withdrawn(_CUT)


def _openssh(pem: str) -> bytes:
    key = serialization.load_pem_private_key(pem.encode(), password=None)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of ours but what it needs: no proxy, no token, no home of another Flower."""
    return {
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOG_LEVEL": "INFO",
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port

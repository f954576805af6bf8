"""A server as far as Flower's Fleet API goes: it asks what it is told to ask, and can take what it is sent slowly."""

import contextlib
import datetime
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clawloop_edge.node.flower import load_flwr
from clawloop_edge.node.join import Membership
from clawloop_edge.node.records import payload_of, record_of
from clawloop_shared import signing, wire
from clawloop_shared.model_line import ModelLine

_NODE_ID, _RUN_ID = 7, 3
_SMALL_BUFFER = 16 << 10
_BLOCK = 16 << 10


@dataclass
class Heard:
    """One request: its path, its body as far as it came, and when its last byte came."""

    path: str
    length: int
    body: bytearray = field(default_factory=bytearray)
    last_s: float = 0.0


class FakeFleet:
    """Use it as a context. `bytes_per_s` 0: bodies are taken as fast as they come."""

    def __init__(self, folder: Path) -> None:
        self.bytes_per_s = 0
        self.refuses: set[str] = set()
        """calls that are answered 403, as those of a run that has ended are"""
        self.heard: list[Heard] = []
        self.answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.connections = 0
        self._flwr = load_flwr()
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._objects: dict[str, bytes] = {}
        self._tree: Any = None
        self._release = signing.new_key()
        self._device = signing.new_key()
        self._node_key = ec.generate_private_key(ec.SECP384R1())
        self._context, self.ca_pem = _tls(folder)
        self._closing = threading.Event()
        self._socket = socket.socket()

    def __enter__(self) -> "FakeFleet":
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def membership(self) -> Membership:
        """What a device that joined this server keeps."""
        pem = self._node_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Membership(
            device_id="device-1",
            url=f"https://127.0.0.1:{self._socket.getsockname()[1]}",
            ca_pem=self.ca_pem,
            root_key=b"r" * 32,
            release_key=signing.public_key(self._release),
            line=ModelLine(base_sha256="a", tokenizer_sha256="b", template_sha256="c"),
            device_key=self._device,
            node_key_pem=pem.decode(),
            node_id=_NODE_ID,
        )

    def ask(self, kind: str, request: msgspec.Struct) -> None:
        """Send the device a message; its reply comes into `answers`."""
        flwr = self._flwr
        metadata = flwr.message_from_proto(_empty_proto(kind)).metadata
        message = flwr.Message(record_of(flwr, wire.encode(request)), metadata=metadata)
        message.metadata.__dict__["_message_id"] = message.object_id
        with flwr.no_object_id_recompute():
            self._objects |= {key: held.deflate() for key, held in flwr.get_all_nested_objects(message).items()}
            tree = flwr.get_object_tree(message)
        self._asked.put((flwr.message_to_proto(flwr.remove_content_from_message(message)), tree))

    @property
    def pushed_bytes(self) -> int:
        """How many bytes of answers came, whole or not."""
        return sum(len(heard.body) for heard in self.heard if heard.path.endswith("push-object"))

    @property
    def paths(self) -> list[str]:
        """What was called, in order."""
        return [heard.path.rpartition("/")[2] for heard in self.heard]

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError), self._context.wrap_socket(connection, server_side=True) as tls:
            stream = tls.makefile("rb", buffering=0)
            while head := _head(stream):
                path, length = head
                heard = Heard(path, length, last_s=time.monotonic())
                self.heard.append(heard)
                if not self._take(stream, heard):
                    return
                refused = path.rpartition("/")[2] in self.refuses
                answer = b"" if refused else self._answer(path, bytes(heard.body))
                status = b"403 Forbidden" if refused else b"200 OK"
                tls.sendall(b"HTTP/1.1 %s\r\nContent-Type: application/x-protobuf\r\n" % status)
                tls.sendall(b"Content-Length: %d\r\n\r\n" % len(answer) + answer)

    def _take(self, stream: Any, heard: Heard) -> bool:
        while len(heard.body) < heard.length:
            block = min(_BLOCK, heard.length - len(heard.body))
            if self.bytes_per_s:
                block = min(block, max(1, self.bytes_per_s // 50))
            data = stream.read(block)
            if not data:
                return False
            heard.body += data
            heard.last_s = time.monotonic()
            if self.bytes_per_s:
                time.sleep(len(data) / self.bytes_per_s)
        return True

    def _answer(self, path: str, body: bytes) -> bytes:
        from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2

        name = path.rpartition("/")[2]
        if name == "activate-node":
            return bytes(fleet_pb2.ActivateNodeResponse(node_id=_NODE_ID).SerializeToString())
        if name == "pull-messages":
            return self._pulled(fleet_pb2.PullMessagesResponse())
        if name == "pull-object":
            content = self._objects[message_pb2.PullObjectRequest.FromString(body).object_id]
            found = message_pb2.PullObjectResponse(object_found=True, object_available=True, object_content=content)
            return bytes(found.SerializeToString())
        if name == "push-messages":
            request = fleet_pb2.PushMessagesRequest.FromString(body)
            self._tree = request.message_object_trees[0]
            wanted = [node.object_id for node in self._flwr.iterate_object_tree(self._tree)]
            return bytes(fleet_pb2.PushMessagesResponse(objects_to_push=wanted).SerializeToString())
        if name == "push-object":
            return self._pushed(message_pb2.PushObjectRequest.FromString(body))
        if name == "send-node-heartbeat":
            return bytes(heartbeat_pb2.SendNodeHeartbeatResponse(success=True).SerializeToString())
        return b""

    def _pulled(self, response: Any) -> bytes:
        if not self._asked.empty():
            message, tree = self._asked.get()
            response.messages_list.append(message)
            response.message_object_trees.append(tree)
        return bytes(response.SerializeToString())

    def _pushed(self, request: Any) -> bytes:
        from flwr.proto import message_pb2

        self._objects[request.object_id] = request.object_content
        wanted = [node.object_id for node in self._flwr.iterate_object_tree(self._tree)]
        if request.object_id == self._tree.object_id or set(wanted) <= self._objects.keys():
            self._collect(wanted)
        return bytes(message_pb2.PushObjectResponse(stored=True).SerializeToString())

    def _collect(self, wanted: list[str]) -> None:
        if set(wanted) <= self._objects.keys():
            contents = {object_id: self._objects[object_id] for object_id in wanted}
            self.answers.put(payload_of(self._flwr.inflate_object_from_contents(self._tree.object_id, contents)))


def _head(stream: Any) -> tuple[str, int] | None:
    """The path and the body's length of the next request; None if there is none."""
    lines = list(_lines(stream))
    if not lines:
        return None
    names = dict(line.lower().split(": ", 1) for line in lines[1:])
    return lines[0].split(" ")[1], int(names.get("content-length", "0"))


def _lines(stream: Any) -> Iterator[str]:
    while line := stream.readline().decode().strip():
        yield line


def _empty_proto(kind: str) -> Any:
    from flwr.proto import message_pb2

    metadata = message_pb2.Metadata(
        run_id=_RUN_ID, src_node_id=1, dst_node_id=_NODE_ID, ttl=600.0, message_type=kind, created_at=time.time()
    )
    message = message_pb2.Message(metadata=metadata)
    message.content.SetInParent()
    return message


def _tls(folder: Path) -> tuple[ssl.SSLContext, str]:
    """A certificate that signs itself, for a server context, and as the authority that a device trusts."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    both = folder / "server.pem"
    both.write_bytes(
        pem
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(both)
    return context, pem.decode()

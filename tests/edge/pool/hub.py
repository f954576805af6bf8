"""A server as far as it deletes what it is asked to: HTTPS on loopback, with a CA of its own."""

import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from clawloop_edge.privacy.deletions import Server
from clawloop_shared import signing, wire
from clawloop_shared.messages import FORGET_PATH, ForgetReceipt, ForgetRequest, SignedRequest
from clawloop_shared.receipts import open_forget, sign_forgotten

DEVICE_ID = "device-1"


class Hub:
    """What it was asked, and how it answers: `refusals` come first, each a status and a Retry-After (0: none)."""

    def __init__(self, url: str, ca_pem: str) -> None:
        self.private, self.root_key = signing.new_key(), signing.public_key(signing.new_key())
        self.server = Server(
            url=url,
            root_key=self.root_key,
            device_id=DEVICE_ID,
            ca_pem=ca_pem,
            release_key=signing.public_key(self.private),
        )
        self.device_key = b""
        """what requests must be signed with; empty: anything"""
        self.asked: list[ForgetRequest] = []
        self.refusals: list[tuple[int, int]] = []
        self.adapters: list[int] = []
        self.message = "not now"
        self.pause_s = 0.0
        """between two bytes of an answer"""
        self.device_deleted = False
        """whether the operator has deleted the device"""
        self.answers_for = ""
        """another request's id, to lie about"""

    def answer(self, body: bytes) -> bytes:
        """The signed receipt for a request."""
        signed = wire.decode(body, SignedRequest)
        if self.device_key:
            request = open_forget(signed, self.device_key)
        else:
            request = msgspec.json.decode(signed.payload, type=ForgetRequest)
        self.asked.append(request)
        receipt = ForgetReceipt(
            request_id=self.answers_for or request.request_id,
            device_id=DEVICE_ID,
            deleted=len(request.record_ids),
            unknown=0,
            adapters=self.adapters,
            at_ms=5000,
            device_deleted=self.device_deleted,
        )
        return wire.encode(sign_forgotten(receipt, self.private))


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """A hub that listens until the end."""
    key_file, ca_pem = _certificate(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, retry_s = hub.refusals.pop(0) if hub.refusals else (200, 0)
            reply = hub.answer(body) if status == 200 else msgspec.json.encode({"error": {"message": hub.message}})
            assert self.path == FORGET_PATH
            self.send_response(status)
            if retry_s:
                self.send_header("Retry-After", str(retry_s))
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            if not hub.pause_s:
                self.wfile.write(reply)
                return
            with suppress(OSError):  # whoever asked has hung up
                for byte in reply:
                    self.wfile.write(bytes([byte]))
                    time.sleep(hub.pause_s)

        def log_message(self, format: str, *args: object) -> None:
            """Not to the test's output."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(key_file)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        hub = Hub(f"https://127.0.0.1:{listening.server_port}", ca_pem)
        thread = threading.Thread(target=lambda: listening.serve_forever(poll_interval=0.01))
        thread.start()
        yield hub
        listening.shutdown()
        thread.join()


def _certificate(folder: Path) -> tuple[Path, str]:
    """A file of key and certificate for 127.0.0.1, and the certificate alone, which is its own CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test hub")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "hub.pem"
    file.write_bytes(private + pem)
    return file, pem.decode()

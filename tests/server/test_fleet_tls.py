"""The server's certificates hold under strict checking, and are renewed only when they must be."""

import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from clawloop_server.fleet.tls import TlsFiles, ensure_tls, server_context
from clawloop_shared.errors import KeyMissing


def handshake(files: TlsFiles, name: str) -> None:
    """Connect to a server with these files as `name`, checked as strictly as OpenSSL can."""
    client = ssl.create_default_context(cafile=str(files.ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    left, right = socket.socketpair()

    def serve() -> None:
        with server_context(files).wrap_socket(right, server_side=True) as secure:
            secure.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(left, server_hostname=name) as secure:
            secure.send(b"x")
    finally:
        left.close()
        thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "train.example.org", "10.1.2.3"])
def test_a_strict_client_accepts_every_configured_name(tmp_path: Path, name: str) -> None:
    handshake(ensure_tls(tmp_path, ["train.example.org", "10.1.2.3"]), name)


def test_private_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    files = ensure_tls(tmp_path)
    for path in (files.ca_key, files.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_is_made_anew_without_need(tmp_path: Path) -> None:
    files = ensure_tls(tmp_path, ["a.example"])
    before = (files.ca.read_bytes(), files.certificate.read_bytes())
    ensure_tls(tmp_path, ["a.example"])
    assert (files.ca.read_bytes(), files.certificate.read_bytes()) == before


def test_a_new_name_renews_the_server_certificate_under_the_same_authority(tmp_path: Path) -> None:
    authority = ensure_tls(tmp_path).ca.read_bytes()
    files = ensure_tls(tmp_path, ["b.example"])
    assert files.ca.read_bytes() == authority
    handshake(files, "b.example")


def test_a_lost_authority_key_is_named_when_it_is_needed(tmp_path: Path) -> None:
    files = ensure_tls(tmp_path)
    os.unlink(files.ca_key)
    ensure_tls(tmp_path)
    with pytest.raises(KeyMissing, match=r"tls-ca\.key"):
        ensure_tls(tmp_path, ["c.example"])

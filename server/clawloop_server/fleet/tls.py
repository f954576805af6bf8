"""The server's own certificate authority and the certificate of its public port (EC P-256).

Devices trust this authority alone (it is in their invitation), so no public one is needed. Key usages and identifiers
are those that strict checking wants (OpenSSL's X509_STRICT, the default from Python 3.13 on; RFC 5280).
"""

import datetime
import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from clawloop_shared.errors import KeyMissing
from clawloop_shared.files import publish, publish_secret

_CA_DAYS = 3650
_SERVER_DAYS = 397
_RENEW_DAYS = 30
ALWAYS = ("localhost", "127.0.0.1")


@dataclass(frozen=True)
class TlsFiles:
    """Where the four files lie."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The authority's certificate (PEM); part of every invitation."""
        return self.folder / "tls-ca.pem"

    @property
    def ca_key(self) -> Path:
        """The authority's private key (0600)."""
        return self.folder / "tls-ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate (PEM)."""
        return self.folder / "tls-server.pem"

    @property
    def key(self) -> Path:
        """The server's private key (0600)."""
        return self.folder / "tls-server.key"


def ensure_tls(folder: Path, names: Sequence[str] = ()) -> TlsFiles:
    """The TLS files in `folder`: made if there are none, the server's renewed if it ends soon or lacks a name.

    Raises:
        KeyMissing: there is an authority's certificate without its key, so that nothing can be renewed.
    """
    files = TlsFiles(folder)
    if not files.ca.exists():
        _make_ca(files)
    wanted = list(dict.fromkeys([*ALWAYS, *names]))
    if not _good(files, wanted):
        _make_server(files, wanted)
    return files


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For the public port: TLS 1.2 or newer, our certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(files.certificate, files.key)
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For our own calls to the SuperLink: trusts our authority alone."""
    return ssl.create_default_context(cafile=str(files.ca))


def _make_ca(files: TlsFiles) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clawloop server CA")])
    certificate = (
        _builder(name, name, key.public_key(), days=_CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    publish_secret(files.ca_key, _key_pem(key))
    publish(files.ca, certificate.public_bytes(serialization.Encoding.PEM))


def _make_server(files: TlsFiles, names: Sequence[str]) -> None:
    ca_key, ca = _load_ca(files)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "clawloop server")])
    certificate = (
        _builder(subject, ca.subject, key.public_key(), days=_SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    publish_secret(files.key, _key_pem(key))
    publish(files.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _load_ca(files: TlsFiles) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        key = serialization.load_pem_private_key(files.ca_key.read_bytes(), password=None)
        ca = x509.load_pem_x509_certificate(files.ca.read_bytes())
    except (OSError, ValueError) as error:
        raise KeyMissing(
            f"cannot issue a server certificate from {files.folder}: {error}; restore {files.ca_key}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise KeyMissing(f"{files.ca_key} is not the key of {files.ca}; restore the pair from your backup")
    return key, ca


def _good(files: TlsFiles, names: Sequence[str]) -> bool:
    try:
        found = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
    except (OSError, ValueError):
        return False
    held = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return (
        set(held) >= {_general_name(name) for name in names}
        and left > datetime.timedelta(days=_RENEW_DAYS)
        and key.public_key() == found.public_key()
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )

"""An authority and a certificate per role, for trying TLS out: its key lies beside them.

A real deployment has its certificates from an authority of its own, with the same names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from treecast.errors import SettingsError
from treecast.wire.tls import IDENTITY_PREFIX, TlsFiles, server_name

ROLES = ("router", "verifier", "speculator", "client")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
VALID_DAYS = 30

_CLOCK_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs certificates; a new one each time, so that nothing signed by another is accepted."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, name: str = "treecast test authority") -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        builder = _builder(subject, key.public_key(), subject, key.public_key(), VALID_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    def issue(
        self,
        folder: Path,
        role: str,
        hosts: Sequence[str] = LOCAL_HOSTS,
        days: int = VALID_DAYS,
        trusted: Sequence[Authority] = (),
    ) -> TlsFiles:
        """Write `<role>.pem`, `<role>.key` and `ca.pem`, each at once; replaces what is there.

        Args:
            hosts: names and addresses that clients dial a router by.
            trusted: authorities whose certificates are accepted; this one alone if none is named.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        issuer, issuer_key = self.certificate.subject, self.key.public_key()
        subject = _name(f"treecast {role}")
        builder = _builder(subject, key.public_key(), issuer, issuer_key, days)
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(IDENTITY_PREFIX + role)]
        if role != "client":
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
            names.append(x509.DNSName(server_name(role)))
        if role == "router":  # alone: a worker must not pass for one
            names += map(_host, hosts)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        certificate = builder.sign(self.key, hashes.SHA256())
        files = TlsFiles(folder / f"{role}.pem", folder / f"{role}.key", folder / "ca.pem")
        _replace(folder / f"{role}.key", _pem_of_key(key))
        _replace(folder / f"{role}.pem", _pem(certificate))
        trust(folder, trusted or [self])
        return files


def trust(folder: Path, authorities: Sequence[Authority]) -> None:
    """Accept the certificates of these alone: write `ca.pem`, at once."""
    _replace(folder / "ca.pem", b"".join(_pem(one.certificate) for one in authorities))


def make_certificates(folder: Path, hosts: Sequence[str] = LOCAL_HOSTS) -> dict[str, TlsFiles]:
    """A new authority and a certificate for every role.

    Raises:
        SettingsError: the folder cannot be written, or a host is no name.
    """
    authority = Authority.make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {role: authority.issue(folder, role, hosts) for role in ROLES}
        _replace(folder / "ca.key", _pem_of_key(authority.key))
    except (OSError, ValueError) as error:
        raise SettingsError(f"certificates cannot be made in {folder}: {error}") from None
    return files


def _builder(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    """Key identifiers tell authorities of one name apart, as while one takes over from another."""
    now = datetime.now(UTC)
    own_id = x509.SubjectKeyIdentifier.from_public_key(key)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(own_id, False)
        .add_extension(issuer_id, False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _replace(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one; a key is for its owner alone."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    mode = 0o600 if path.suffix == ".key" else 0o644
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    new.replace(path)

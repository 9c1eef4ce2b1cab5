"""TLS on every hop: certificates from files, read anew when they change; roles by certificate.

A process proves its role by its certificate. Callers are known by a URI, spiffe://treecast/ROLE,
which the serving end reads; serving ends by a DNS name, ROLE.treecast, since names are what gRPC's
dialing end compares. So a certificate of a role that serves carries both.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import structlog

from treecast.errors import SettingsError
from treecast.settings import ServiceSettings

IDENTITY_PREFIX = "spiffe://treecast/"
NAME_SUFFIX = ".treecast"
MAX_PEM_BYTES = 1024 * 1024

_URI = "peer_uri"

log = structlog.get_logger()

Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Pem:
    """What the files hold; None for one that is not given."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a process's certificates are; whoever rotates them replaces the files.

    Attributes:
        cert: our certificate with its chain, PEM; None to show none.
        key: its private key, PEM.
        ca: what peers' certificates must be signed by; None for the system's authorities.
    """

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise SettingsError("tls_cert and tls_key must be given together")

    @property
    def stamp(self) -> Stamp:
        """Changes whenever a file does. Raises SettingsError if one cannot be found."""
        try:
            stats = [path.stat() for path in (self.cert, self.key, self.ca) if path]
        except OSError as error:
            raise SettingsError(f"TLS file cannot be read: {error}") from None
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def read(self) -> Pem:
        """The files' contents, checked to fit one another.

        Raises:
            SettingsError: one is unreadable or too large, or key and certificate do not belong
                together, as for a moment while they are replaced one after the other.
        """
        pem = Pem(*(_read(path) for path in (self.cert, self.key, self.ca)))
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password=_refuse_password)
            if pem.ca is not None:
                context.load_verify_locations(cadata=pem.ca.decode())
        except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
            raise SettingsError(
                f"TLS files {self.cert}, {self.key} and {self.ca} do not fit: {error}"
            ) from None
        return pem


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        if (size := path.stat().st_size) > MAX_PEM_BYTES:
            raise SettingsError(f"{path} has {size} bytes; the limit is {MAX_PEM_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"TLS file cannot be read: {error}") from None


def _refuse_password() -> str:
    raise ValueError("the private key is encrypted")


@dataclass(slots=True)
class Tls:
    """Certificates of one process, for its server and its channels. Thread-safe.

    New connections get the files as they are then; those that are open go on. While the files do
    not fit one another the last that did are used.
    """

    files: TlsFiles
    _stamp: Stamp = field(init=False)
    _pem: Pem = field(init=False)

    def __post_init__(self) -> None:
        """Raises SettingsError: the files are unreadable or do not fit."""
        self._stamp = self.files.stamp
        self._pem = self.files.read()

    @property
    def mutual(self) -> bool:
        """Whether we know the authority of our peers, so that their certificates prove roles."""
        return self.files.ca is not None

    def server_credentials(self, require_clients: bool = True) -> grpc.ServerCredentials:
        """For a server whose later connections follow the files.

        Args:
            require_clients: ask callers for certificates, if we know their authority.
        Raises:
            SettingsError: there is no certificate to show.
        """
        if self.files.cert is None:
            raise SettingsError("tls_ca is given without tls_cert; a server needs its certificate")
        asks = require_clients and self.mutual
        served = self.refreshed()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            newest = self.refreshed()
            if newest is served:
                return None
            served = newest
            return _configuration(newest, asks)

        first = _configuration(served, asks)
        # The stubs do not know that None leaves all as it is.
        return grpc.dynamic_ssl_server_credentials(first, fetch, asks)  # type: ignore[arg-type]

    def http_context(self, require_clients: bool = True) -> ssl.SSLContext:
        """For an HTTP server: every handshake gets the files as they are then.

        Args:
            require_clients: as for `server_credentials`; any role's certificate will do.
        Raises:
            SettingsError: there is no certificate to show.
        """
        if self.files.cert is None:
            raise SettingsError("tls_ca is given without tls_cert; a server needs its certificate")
        asks = require_clients and self.mutual
        served, context = self.refreshed(), self._server_context(asks)

        def renew(connection: ssl.SSLObject, name: str | None, first: ssl.SSLContext) -> None:
            nonlocal served, context
            newest = self.refreshed()
            if newest is not served:
                with suppress(OSError):  # replaced again this very moment: the next one has it
                    served, context = newest, self._server_context(asks)
            connection.context = context

        context.sni_callback = renew  # called without a name too
        return context

    def _server_context(self, asks: bool) -> ssl.SSLContext:
        assert self.files.cert is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.files.cert, self.files.key)
        if asks:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.files.ca)
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel that is opened now."""
        pem = self.refreshed()
        return grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert)

    def refreshed(self) -> Pem:
        """The newest contents that fit; the same object while the files stay as they are."""
        try:
            stamp = self.files.stamp
            if stamp != self._stamp:
                self._pem = self.files.read()
                self._stamp = stamp
                log.info("tls.reloaded", cert=str(self.files.cert), ca=str(self.files.ca))
        except SettingsError as error:
            log.warning("tls.not_reloaded", why=error.message)
        return self._pem


def _configuration(pem: Pem, asks: bool) -> grpc.ServerCertificateConfiguration:
    assert pem.key is not None
    assert pem.cert is not None
    return grpc.ssl_server_certificate_configuration(
        [(pem.key, pem.cert)], pem.ca if asks else None
    )


def tls_of(settings: ServiceSettings) -> Tls | None:
    """None if the settings name no file: then everything is plaintext.

    Raises:
        SettingsError: the files are unreadable or do not fit.
    """
    files = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_ca)
    return Tls(files) if files != TlsFiles() else None


def server_name(role: str) -> str:
    """The DNS name that a serving process of this role must have in its certificate."""
    return f"{role}{NAME_SUFFIX}"


def role_of(auth_context: Mapping[str, Iterable[bytes]]) -> str:
    """The role in a caller's certificate; empty if it names none, or more than one."""
    uris = [uri.decode(errors="replace") for uri in auth_context.get(_URI, ())]
    roles = {uri.removeprefix(IDENTITY_PREFIX) for uri in uris if uri.startswith(IDENTITY_PREFIX)}
    return roles.pop() if len(roles) == 1 else ""

"""How a client shows who it is: its API key, and its certificate."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from treecast.errors import InvalidRequest
from treecast.wire.tls import Tls, TlsFiles

KEY_VARIABLE = "TREECAST_API_KEY"
TLS_VARIABLES = ("TREECAST_TLS_CERT", "TREECAST_TLS_KEY", "TREECAST_TLS_CA")

Metadata = tuple[tuple[str, str], ...]


class CallOptions(TypedDict):
    """Of a unary call; `timeout` in seconds, by the name that gRPC gives it."""

    timeout: float
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Access:
    """What goes with every call.

    Attributes:
        metadata: holds the API key, so it is never to be shown.
        tls: None connects in plaintext.
    """

    metadata: Metadata
    tls: Tls | None


def read_access(api_key: str | None, tls: TlsFiles | None) -> Access:
    """As given, else from the environment.

    Raises:
        InvalidRequest: the key has characters that cannot travel.
        SettingsError: the TLS files are unreadable or do not fit.
    """
    key = os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest("API key has characters that are not printable ASCII")
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    files = _files_of_environment() if tls is None else tls
    return Access(metadata, Tls(files) if files != TlsFiles() else None)


def _files_of_environment() -> TlsFiles:
    given = [Path(text) if (text := os.environ.get(name)) else None for name in TLS_VARIABLES]
    return TlsFiles(*given)

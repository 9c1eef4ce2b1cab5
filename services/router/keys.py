"""API keys: who a caller is, and what their key allows. A file holds hashes, never keys."""

from __future__ import annotations

import asyncio
import secrets
import tomllib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from treecast.errors import InvalidRequest, PermissionDenied, SettingsError, Unauthenticated
from treecast.wire.codec.bounds import MAX_PRIORITY

TENANT = "default"
"""Whoever calls a router that has no keys."""

MAX_KEYS = 100_000
MAX_FILE_BYTES = 32 * 1024 * 1024
_MOST_BYTES_INLINE = 32 * 1024
"""Of a file that is read anew on the event loop: a few hundred keys, each some 80 us."""
MAX_HEADER_CHARACTERS = 512

log = structlog.get_logger()

Stamp = tuple[int, int, int] | None
"""Of a file; None of one that is not there."""

TenantName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
Limit = Annotated[int, Field(ge=1, le=2**31)]


class Key(BaseModel):
    """One entry of a keys file, by its names there; a limit that is absent does not bind.

    Attributes:
        sha256: hash of the key, in hexadecimal: keys are random, so it needs no salt.
        max_concurrency: requests at once through one router.
        max_priority: the highest that requests may ask for.
        admin: may drain and resume.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: TenantName
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = "0" * 64
    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    max_concurrency: Limit | None = None
    max_priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = MAX_PRIORITY
    admin: bool = False
    expires: AwareDatetime | None = None

    @property
    def name(self) -> str:
        """Names the key in logs and in Redis; says nothing about it."""
        return self.sha256[:16]

    def check_priority(self, priority: int) -> None:
        """Raises InvalidRequest: requests of this key may not go so far ahead."""
        if priority > self.max_priority:
            raise InvalidRequest(
                f"priority is {priority}; tenant {self.tenant!r} may ask for "
                f"{self.max_priority} at most"
            )

    def check_admin(self) -> None:
        """Raises PermissionDenied: it is no admin's key."""
        if not self.admin:
            raise PermissionDenied(f"this needs an admin's key; tenant {self.tenant!r} has none")


OPEN = Key(tenant=TENANT, admin=True)
"""Every caller of a router without keys."""


def new_key() -> str:
    """A fresh key: 256 random bits."""
    return f"tc_{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    return sha256(key.encode()).hexdigest()


def entry_of(
    key: str,
    tenant: str,
    limits: Mapping[str, int | None],
    *,
    admin: bool = False,
    expires: datetime | None = None,
) -> str:
    """A keys file's entry for a key.

    Args:
        expires: UTC where it has no time zone.
    Raises:
        SettingsError: a value is out of its bounds.
    """
    if expires is not None and expires.tzinfo is None:
        expires = expires.replace(tzinfo=UTC)
    fields: dict[str, object] = {"tenant": tenant, "sha256": hash_key(key), **limits}
    fields |= {"admin": admin or None, "expires": expires}
    parsed = _parse_key({n: v for n, v in fields.items() if v is not None}, "key")
    given = parsed.model_dump(exclude_unset=True)
    lines = [f"{name} = {_toml(value)}" for name, value in given.items()]
    return "\n".join(["[[keys]]", *lines, ""])


def _toml(value: object) -> str:
    """Of what an entry holds; names and hashes have nothing to escape."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value).lower()


def parse_keys(text: str, where: str) -> dict[str, Key]:
    """The `[[keys]]` of a TOML document, by hash.

    Raises:
        SettingsError: it is malformed, or a hash comes twice; names the entry and the field.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where} is not TOML: {error}") from None
    entries = document.pop("keys", [])
    if document or not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise SettingsError(f"{where} must hold [[keys]] alone, at most {MAX_KEYS}")
    keys: dict[str, Key] = {}
    for number, entry in enumerate(entries, 1):
        key = _parse_key(entry, f"{where}: key {number}")
        if key.sha256 in keys:
            raise SettingsError(f"{where}: key {number} repeats the sha256 of another")
        keys[key.sha256] = key
    return keys


def _parse_key(entry: object, where: str) -> Key:
    if not isinstance(entry, dict) or "sha256" not in entry:
        raise SettingsError(f"{where} has no sha256")
    try:
        return Key.model_validate(entry)
    except ValidationError as error:
        fault = error.errors(include_input=False)[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise SettingsError(f"{where}: {field}: {fault['msg']}") from None


class KeyRing:
    """All keys: those of the environment, and those of a file that is read anew when it changes.

    A file that becomes unreadable or malformed leaves the last good keys, and is logged once.
    """

    def __init__(
        self,
        file: Path | None,
        text: str = "",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Raises SettingsError: the file or the text is malformed."""
        self._file = file
        self._now = now
        self._given = parse_keys(text, "api_keys")
        self._stamp = _stamp(file) if file else None
        self._keys: Mapping[str, Key] = self._given | (_read(file) if file else {})

    @property
    def open(self) -> bool:
        """Whether anybody may call, since no keys were given."""
        return self._file is None and not self._given

    def caller(self, authorization: str | None) -> Key:
        """The key that a request came with, `authorization` being "Bearer KEY".

        Raises:
            Unauthenticated: none, not of that form, unknown or expired.
        """
        if self.open:
            return OPEN
        self._reload()
        key = self._keys.get(hash_key(_bearer(authorization)))
        if key is None:
            raise Unauthenticated("API key is unknown")
        if key.expires is not None and key.expires <= self._now():
            raise Unauthenticated(
                f"API key of tenant {key.tenant!r} expired at {key.expires.isoformat()}"
            )
        return key

    def _reload(self) -> None:
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp:
            return
        self._stamp = stamp
        read = partial(_read, self._file)
        if stamp is None or stamp[1] <= _MOST_BYTES_INLINE:
            self._take(stamp, read)
            return
        reading = asyncio.get_running_loop().run_in_executor(None, read)
        reading.add_done_callback(lambda done: self._take(stamp, done.result))

    def _take(self, stamp: Stamp, result: Callable[[], dict[str, Key]]) -> None:
        """Have a read's keys, unless a newer one has begun: that has the last word."""
        if stamp != self._stamp:
            return
        try:
            self._keys = self._given | result()
            log.info("keys.reloaded", file=str(self._file), count=len(self._keys))
        except SettingsError as error:
            log.error("keys.unreadable", why=error.message, kept=len(self._keys))


def _bearer(authorization: str | None) -> str:
    if authorization is None:
        raise Unauthenticated("API key is missing; send metadata authorization: Bearer KEY")
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer" or not key or len(authorization) > MAX_HEADER_CHARACTERS:
        raise Unauthenticated("authorization is not of the form: Bearer KEY")
    return key


def _stamp(file: Path) -> Stamp:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(file: Path) -> dict[str, Key]:
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise SettingsError(f"{file} has {size} bytes; the limit is {MAX_FILE_BYTES}")
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"api_keys_file {file} cannot be read: {error}") from None
    return parse_keys(text, str(file))

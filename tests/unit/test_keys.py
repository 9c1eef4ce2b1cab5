"""API keys: their file, who they let in, and what they say no to."""

from __future__ import annotations

import asyncio
import os
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from treecast.cli.app import app
from treecast.errors import InvalidRequest, PermissionDenied, SettingsError, Unauthenticated
from treecast.services.router.keys import OPEN, KeyRing, entry_of, hash_key, new_key, parse_keys

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def test_entry_reads_back_as_it_was_given_and_holds_no_key() -> None:
    key = new_key()
    limits = {"requests_per_minute": 60, "tokens_per_minute": None, "max_concurrency": 4}
    entry = entry_of(key, "acme", limits, admin=True, expires=NOON)
    assert key not in entry
    [parsed] = parse_keys(entry, "keys").values()
    assert parsed.tenant == "acme"
    assert parsed.sha256 == hash_key(key)
    assert (parsed.requests_per_minute, parsed.tokens_per_minute) == (60, None)
    assert (parsed.max_concurrency, parsed.admin, parsed.expires) == (4, True, NOON)


HASH = "a" * 64
OF_X = f'[[keys]]\ntenant = "x"\nsha256 = "{HASH}"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[keys", r"^keys is not TOML: "),
        ("a = 1", r"^keys must hold \[\[keys\]\] alone, at most 100000$"),
        ('[[keys]]\ntenant = "x"', r"^keys: key 1 has no sha256$"),
        (OF_X + OF_X, r"^keys: key 2 repeats the sha256 of another$"),
        (OF_X.replace('"x"', '"No/Name"'), r"^keys: key 1: tenant: String should match pattern"),
        (OF_X + "requests_per_minute = 0", r"^keys: key 1: requests_per_minute: .* than or equal"),
        (OF_X + "color = 1", r"^keys: key 1: color: Extra inputs are not permitted$"),
        (OF_X + "expires = 2030-01-01", r"^keys: key 1: expires: "),
    ],
)
def test_keys_are_refused_by_entry_and_field_when_malformed(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_keys(text, "keys")


def test_everybody_is_the_default_tenant_when_there_are_no_keys() -> None:
    assert KeyRing(None).caller(None) is OPEN


@pytest.mark.parametrize(
    ("authorization", "message"),
    [
        (None, "API key is missing; send metadata authorization: Bearer KEY"),
        ("Basic abc", "authorization is not of the form: Bearer KEY"),
        ("Bearer ", "authorization is not of the form: Bearer KEY"),
        ("Bearer " + "x" * 600, "authorization is not of the form: Bearer KEY"),
        ("Bearer tc_other", "API key is unknown"),
        ("Bearer tc_old", "API key of tenant 'acme' expired at 2030-01-01T12:00:00+00:00"),
    ],
)
def test_caller_is_refused_when_the_key_is_not_good(
    authorization: str | None, message: str
) -> None:
    ring = KeyRing(None, entry_of("tc_old", "acme", {}, expires=NOON), now=lambda: NOON)
    with pytest.raises(Unauthenticated) as refusal:
        ring.caller(authorization)
    assert refusal.value.message == message


def test_key_is_good_until_it_expires() -> None:
    just_before = NOON - timedelta(seconds=1)
    ring = KeyRing(None, entry_of("tc_a", "acme", {}, expires=NOON), now=lambda: just_before)
    assert ring.caller("bearer tc_a").tenant == "acme"


def test_file_is_read_anew_when_it_changes_and_kept_when_it_breaks(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry_of("tc_one", "one", {}))
    ring = KeyRing(file, entry_of("tc_given", "given", {}))
    assert ring.caller("Bearer tc_one").tenant == "one"
    replace(file, entry_of("tc_two", "two", {}))
    assert ring.caller("Bearer tc_two").tenant == "two"
    with pytest.raises(Unauthenticated):
        ring.caller("Bearer tc_one")
    for broken in ("[[keys", None):
        replace(file, broken)
        assert ring.caller("Bearer tc_two").tenant == "two"
        assert ring.caller("Bearer tc_given").tenant == "given"
    replace(file, "")
    with pytest.raises(Unauthenticated):
        ring.caller("Bearer tc_two")


def replace(file: Path, text: str | None) -> None:
    if text is None:
        file.unlink()
        return
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


async def test_a_large_file_is_read_anew_beside_the_event_loop(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry_of("tc_one", "one", {}))
    ring = KeyRing(file)
    many = "".join(entry_of(f"tc_{number}", "many", {}) for number in range(400))
    replace(file, many)
    assert ring.caller("Bearer tc_one").tenant == "one"  # as before, until it has been read
    async with asyncio.timeout(10):
        while len(ring._keys) < 400:
            await asyncio.sleep(0.01)
    assert ring.caller("Bearer tc_399").tenant == "many"


async def test_keys_stay_revoked_when_a_slow_read_ends_after_a_newer_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(entry_of("tc_one", "one", {}))
    ring = KeyRing(file)
    thread = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(thread)
    replace(file, "".join(entry_of(f"tc_{number}", "many", {}) for number in range(400)))
    ring.caller("Bearer tc_one")
    thread.submit(int).result()  # the large file has been read, and its keys have yet to arrive
    replace(file, entry_of("tc_two", "two", {}))
    assert ring.caller("Bearer tc_two").tenant == "two"
    await asyncio.to_thread(int)
    with pytest.raises(Unauthenticated):
        ring.caller("Bearer tc_399")


def test_start_is_refused_when_the_file_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"api_keys_file .*none\.toml cannot be read"):
        KeyRing(tmp_path / "none.toml")


def test_key_allows_no_more_than_it_says() -> None:
    text = entry_of("tc_a", "acme", {"max_priority": 0})
    key = KeyRing(None, text).caller("Bearer tc_a")
    key.check_priority(0)
    with pytest.raises(
        InvalidRequest, match=r"^priority is 1; tenant 'acme' may ask for 0 at most"
    ):
        key.check_priority(1)
    with pytest.raises(PermissionDenied, match=r"^this needs an admin's key; tenant 'acme' has"):
        key.check_admin()


def test_command_prints_the_key_once_and_appends_its_entry(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    command = ["keys", "new", "acme", "--tokens-per-minute", "1000", "--file", str(file)]
    keys = [CliRunner().invoke(app, command).stdout.strip() for _ in range(2)]
    entries = tomllib.loads(file.read_text())["keys"]
    assert [entry["sha256"] for entry in entries] == [hash_key(key) for key in keys]
    assert entries[0]["tokens_per_minute"] == 1000
    assert file.stat().st_mode & 0o777 == 0o600
    assert not any(key in file.read_text() for key in keys)
    ring = KeyRing(file)
    assert [ring.caller(f"Bearer {key}").tenant for key in keys] == ["acme", "acme"]


def test_command_leaves_the_file_when_the_tenant_is_no_name(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    result = CliRunner().invoke(app, ["keys", "new", "No Name", "--file", str(file)])
    assert result.exit_code == 2
    assert not file.exists()

"""HOST:PORT, and what it is refused for."""

from __future__ import annotations

import pytest

from treecast.address import Address, parse_address
from treecast.errors import InvalidRequest, SettingsError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("router:7070", Address("router", 7070)),
        ("[::1]:65535", Address("::1", 65535)),
        ("dns:///router:7070", Address("router", 7070)),
    ],
)
def test_address_is_read_when_it_has_a_host_and_a_port(text: str, address: Address) -> None:
    assert parse_address(text, "seed", scheme="dns:///") == address
    assert str(address) == text.removeprefix("dns:///")


def test_port_is_put_in_when_it_was_left_open() -> None:
    assert str(parse_address("[::1]:0", "listen").with_port(7070)) == "[::1]:7070"


@pytest.mark.parametrize(
    "text", ["", "host", "7070", "host:", ":1", "host:-1", "host:65536", "host:²", "a/b:1"]
)
def test_address_is_refused_by_name_when_it_is_malformed(text: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        parse_address(text, "listen")
    assert refusal.value.message == (f"listen is {text!r}; it must be host:port, port 0..65535")


def test_refusal_names_the_scheme_and_lowest_port_when_there_are_some() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_address("x:0", "router", lowest_port=1, scheme="dns:///", error=InvalidRequest)
    assert refusal.value.message == (
        "router is 'x:0'; it must be host:port or dns:///name:port, port 1..65535"
    )

"""Where output goes: text for people by rich, JSON for machines on stdout."""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import Enum
from typing import Any

from rich.console import Console

_PIPED_WIDTH = 240
# Peers' names and addresses, such as [fd00::7]:7071, are no markup; colour comes by styles.
_AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}


def stdout() -> Console:
    """For results. Plain when piped, and then wide, so that no table is cut.

    Made anew each time, since tests replace sys.stdout.
    """
    console = Console(**_AS_IT_IS)
    return console if console.is_terminal else Console(**_AS_IT_IS, width=_PIPED_WIDTH)


def stderr() -> Console:
    """For progress, notes and warnings."""
    return Console(**_AS_IT_IS, stderr=True)


def write_text(text: str) -> None:
    """Generated text: as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(document: Any) -> None:
    """One document on one line; dataclasses become objects, enums their names in lower case."""
    print(json.dumps(document, default=_plain, ensure_ascii=False), flush=True)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name.lower()
    raise TypeError(f"{type(value).__name__} has no JSON form")

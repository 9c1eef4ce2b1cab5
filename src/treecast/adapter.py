"""What is known of a LoRA adapter everywhere: its name and the revision of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_ADAPTERS = 32
"""Of one verifier; a hello lists them."""

NAME_FORM = "1 to 64 letters, digits, dots, dashes or underlines"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is served; the same name may stand for other weights elsewhere."""

    name: str
    revision: str


def is_adapter_name(name: str) -> bool:
    """Whether an adapter may be called so."""
    return _NAME.fullmatch(name) is not None


def names_of(adapters: Iterable[Adapter]) -> str:
    """For messages: the names in order, or that there are none."""
    return ", ".join(sorted({one.name for one in adapters})) or "none"


def prefix_salt(tenant: str, adapter: str) -> str:
    """Salt of a text's prefix names: whose text it is, and what computed its keys and values."""
    return f"{tenant}\0{adapter}" if adapter else tenant

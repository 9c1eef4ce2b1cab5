"""What several modes of `treecast bench` make of its options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import typer

from treecast.errors import InvalidRequest

from .up import parse_speculators

if TYPE_CHECKING:
    from treecast.services.local import MeshSettings

OF_ALL_MODES = (
    "prompts", "limit", "max_tokens", "model", "draft", "speculators", "numerics", "dtype",
    "threads", "as_json",
)  # fmt: skip

OF_A_MESH = ("weights", "device", "planner")
"""Beside them, of each mode that starts one."""


def mesh_settings(asked: Mapping[str, Any]) -> MeshSettings:
    """The mesh of a mode that starts one, by `OF_ALL_MODES` and `OF_A_MESH`."""
    from treecast.services.local import MeshSettings

    names = ("model", "draft", "numerics", "device", "dtype", "weights", "planner")
    return MeshSettings(
        speculators=parse_speculators(asked["speculators"]),
        torch_threads=asked["threads"],
        **{name: asked[name] for name in names},
    )


def check_options(context: typer.Context, mode: str, heeded: Collection[str]) -> None:
    """Refuse options that a mode would not heed: a report, say, measures all laws.

    Args:
        mode: its flag.
        heeded: options of this mode, beside those of all.
    Raises:
        InvalidRequest: another one is given on the command line.
    """
    for name in context.params:
        flag = f"--{name.replace('_', '-')}"
        known = flag == mode or name in OF_ALL_MODES or name in heeded
        if not known and is_given(context, name):
            raise InvalidRequest(f"{mode} does not heed {flag}")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def parse_sizes(flag: str, text: str) -> list[int]:
    """Of comma-separated numbers.

    Raises:
        InvalidRequest: none, or one that is no number from 1 to 256.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdecimal() or not 1 <= int(part) <= 256 for part in parts):
        raise InvalidRequest(f"{flag} is {text!r}; numbers from 1 to 256, commas between")
    return [int(part) for part in parts]


def running_at_most(requests: int) -> dict[str, int]:
    """A verifier's flags for so many requests in one step, with room for their trees."""
    return {"max_running": requests, "max_rows": max(128, 2 * requests)}

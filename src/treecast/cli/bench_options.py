"""What several modes of `treecast bench` make of its options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import typer

from treecast.errors import InvalidRequest

from .up import parse_speculators

if TYPE_CHECKING:
    from treecast.services.local import MeshSettings


def mesh_settings(asked: Mapping[str, Any]) -> MeshSettings:
    """The mesh of a mode that starts one by the options that all of them have."""
    from treecast.services.local import MeshSettings

    names = ("model", "draft", "numerics", "device", "dtype", "weights", "planner")
    return MeshSettings(
        speculators=parse_speculators(asked["speculators"]),
        torch_threads=asked["threads"],
        **{name: asked[name] for name in names},
    )


def check_options(context: typer.Context, mode: str, names: Collection[str]) -> None:
    """Refuse options that a mode would not heed: a report, say, measures all laws.

    Raises:
        InvalidRequest: one of `names` is given on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = name.replace("_", "-")
            raise InvalidRequest(f"--{flag} is of the comparison; {mode} does not heed it")

"""One fault after the other over a mesh under load."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence

from .faults import Fault
from .load import Load
from .mesh import ChaosMesh
from .table import Row, row_of

STEADY_STREAMS = 8
"""Streams that end between two faults, so that one is over before the next."""

NO_FAULT = "none"


async def run_faults(
    mesh: ChaosMesh, load: Load, faults: Sequence[Fault], say: Callable[[str], None]
) -> AsyncIterator[Row]:
    """A row for each fault, as soon as all streams that it overlapped have ended."""
    for fault in faults:
        await steady(load)
        say(fault.name)
        yield await run_fault(mesh, load, fault)


async def run_fault(mesh: ChaosMesh, load: Load, fault: Fault) -> Row:
    """Hurt and heal the mesh; judges every stream that ran at any time meanwhile.

    Raises:
        MeshError: the mesh did not get whole again.
    """
    begin_s, in_flight = time.monotonic(), load.in_flight
    await fault.run(mesh)
    await mesh.wait_whole()
    end_s = time.monotonic()
    await load.settle(end_s)
    return row_of(
        fault.name, in_flight, [one for one in load.records if one.overlaps(begin_s, end_s)]
    )


async def steady(load: Load) -> None:
    """Until some more streams have ended."""
    goal = sum(load.counts.values()) + STEADY_STREAMS
    await load.until(lambda: sum(load.counts.values()) >= goal)

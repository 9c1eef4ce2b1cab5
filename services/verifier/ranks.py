"""Which process of a verifier group this is: the one that starts the others, or one of them."""

from __future__ import annotations

import os
import signal

import structlog

from treecast.engine.openmp import spin_briefly
from treecast.engine.sharding.shape import ALONE, Place
from treecast.errors import SettingsError
from treecast.telemetry.logs import configure_logs

from .group import run_group
from .loading import follow_rank
from .server import serve
from .settings import VerifierSettings

log = structlog.get_logger()


async def run(settings: VerifierSettings) -> None:
    """Serve alone, start a group, or be one of its ranks, as settings and environment say.

    Raises:
        SettingsError: a toy cannot be divided, or the environment does not fit the settings.
        ModelError, EngineLost: what ended us, or the group.
    """
    if settings.group == ALONE:
        return await serve(settings)
    if settings.engine == "toy":
        raise SettingsError(f"--engine toy cannot be divided among {settings.group.size} ranks")
    place = Place.from_environment(os.environ, settings.group)
    if place is None:
        return await run_group(settings)
    if place.rank == 0:
        return await serve(settings, place)
    return _follow(settings, place)


def _follow(settings: VerifierSettings, place: Place) -> None:
    """Signals are for rank 0, which drains and then tells us to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    spin_briefly()
    configure_logs("verifier", f"rank-{place.rank}", settings.log_level, settings.log_json)
    log.info("rank.started", rank=place.rank, ranks=place.shape.size)
    follow_rank(settings, place)
    log.info("rank.stopped", rank=place.rank)

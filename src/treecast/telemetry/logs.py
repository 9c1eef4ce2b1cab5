"""Structured events on stderr, through structlog."""

from __future__ import annotations

import logging
import sys

import structlog

from treecast.errors import SettingsError


def configure_logs(role: str, instance_id: str, level: str, as_json: bool) -> None:
    """Set up the process's logs; every event carries role and instance.

    Raises:
        SettingsError: no such level.
    """
    levels = logging.getLevelNamesMapping()
    if level.upper() not in levels:
        raise SettingsError(f"log_level is {level!r}; allowed: debug, info, warning, error")
    renderer = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(levels[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(role=role, instance=instance_id)

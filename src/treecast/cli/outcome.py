"""Exit codes, and how errors end a command: a line on stderr, never a traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from treecast.errors import (
    CorpusError,
    InvalidRequest,
    ModelError,
    NotServed,
    PermissionDenied,
    RetryableError,
    SettingsError,
    TreecastError,
    Unauthenticated,
)

OTHER = 1
INVALID = 2
UNAVAILABLE = 3
INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 done; 1 failed, or texts differ (demo); 2 bad usage or a request that can never "
    "be served; 3 no router, no worker, or overloaded: try again later; 130 interrupted."
)

_INVALID = (
    InvalidRequest,
    SettingsError,
    ModelError,
    CorpusError,
    NotServed,
    Unauthenticated,
    PermissionDenied,
)


def exit_code(error: TreecastError) -> int:
    """The exit code that tells a script what to do about an error."""
    if isinstance(error, _INVALID):
        return INVALID
    return UNAVAILABLE if isinstance(error, RetryableError) else OTHER


class Commands(TyperGroup):
    """Ends every command of the group in one place."""

    def invoke(self, ctx: Any) -> Any:  # typer's context is not part of its public types
        try:
            return super().invoke(ctx)
        except TreecastError as error:
            print(f"treecast: {error.message}", file=sys.stderr)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            print("treecast: interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

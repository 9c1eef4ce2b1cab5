"""`python -m treecast.services.router`: serve until told to stop."""

from __future__ import annotations

import asyncio
import sys

from treecast.errors import TreecastError

from .router import serve
from .settings import RouterSettings


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code: 2 for bad settings."""
    try:
        settings = RouterSettings.load(sys.argv[1:] if argv is None else argv, "treecast-router")
        asyncio.run(serve(settings))
    except TreecastError as error:
        print(f"treecast-router: {error.message}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

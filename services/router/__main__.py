"""`python -m treecast.services.router`: serve until told to stop."""

from __future__ import annotations

from treecast.wire.frames import Role
from treecast.wire.lifecycle import run_service

from .server import serve
from .settings import RouterSettings


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code: 2 for what cannot be started."""
    return run_service(Role.ROUTER, RouterSettings, serve, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m treecast.services.speculator`: load the drafters, serve."""

from __future__ import annotations

from treecast.wire.frames import Role
from treecast.wire.lifecycle import run_service

from .server import serve
from .settings import SpeculatorSettings


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code: 2 for what cannot be started."""
    return run_service(Role.SPECULATOR, SpeculatorSettings, serve, argv)


if __name__ == "__main__":
    raise SystemExit(main())

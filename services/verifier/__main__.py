"""`python -m treecast.services.verifier`: load the model, measure the step, serve."""

from __future__ import annotations

from treecast.wire.frames import Role
from treecast.wire.lifecycle import run_service

from .ranks import run
from .settings import VerifierSettings


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code: 2 for what cannot be started."""
    return run_service(Role.VERIFIER, VerifierSettings, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())

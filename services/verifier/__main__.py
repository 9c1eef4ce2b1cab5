"""`python -m treecast.services.verifier`: load the model, measure the step, serve."""

from __future__ import annotations

import asyncio
import sys

from treecast.errors import TreecastError

from .server import serve
from .settings import VerifierSettings


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    try:
        settings = VerifierSettings.load(
            sys.argv[1:] if argv is None else argv, "treecast-verifier"
        )
        asyncio.run(serve(settings))
    except TreecastError as error:
        print(f"treecast-verifier: {error.message}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m treecast.services.speculator`: load the drafters, serve."""

from __future__ import annotations

import asyncio
import os
import sys

from treecast.errors import TreecastError

from .settings import SpeculatorSettings

# What an OpenMP thread does when it waits for another: give its core away at once. By default it
# spins, and where two processes share their cores the one that is spun for cannot run: a draft's
# pass took 344 ms instead of 12. Read by the OpenMP library when torch is imported.
_IDLE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        settings = SpeculatorSettings.load(arguments, "treecast-speculator")
        os.environ.update(_IDLE_THREADS | dict(os.environ))
        from .server import serve

        asyncio.run(serve(settings))
    except TreecastError as error:
        print(f"treecast-speculator: {error.message}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

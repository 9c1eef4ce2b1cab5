"""The command line: `treecast up|generate|chat|status|models|tune|bench|demo`.

A command's module imports what it needs inside the command, so that `--help` stays quick.
"""

import os


def main() -> None:
    """Entry point of the `treecast` program."""
    # A lost connection is for us to tell, in our words; gRPC's own log lines would mix with them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from .app import app

    app()

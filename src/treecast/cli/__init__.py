"""The command line: `treecast up|generate|chat|status|models|tune|bench|demo`.

A command's module imports what it needs inside the command, so that `--help` stays quick.
"""


def main() -> None:
    """Entry point of the `treecast` program."""
    from .app import app

    app()

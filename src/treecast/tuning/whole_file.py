"""Files that are replaced whole or not at all, with an error that says which one did not fit."""

import os
from pathlib import Path

from treecast.errors import ModelError


def write_whole(file: Path, data: bytes) -> None:
    """Replace a file: a kill or a full disk leaves what was there.

    Raises:
        ModelError: it cannot be written; names the file, its size and the system's reason.
    """
    partial = file.with_name(f".partial-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ModelError(
            f"cannot write {file} ({len(data) / 1e6:.1f} MB): {error.strerror}; "
            "what was there before is whole, and the same command goes on from it"
        ) from error

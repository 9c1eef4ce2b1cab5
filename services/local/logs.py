"""Where the processes of a local mesh write their logs."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

KEPT_MESHES = 20


def new_log_dir(root: Path) -> Path:
    """Make a folder for one mesh, named by time and pid; the oldest beyond 20 are removed."""
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    number = 0
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{folder.name.partition('.')[0]}.{number}")
    folder.mkdir(parents=True)
    for old in sorted(path for path in root.iterdir() if path.is_dir())[:-KEPT_MESHES]:
        shutil.rmtree(old, ignore_errors=True)
    return folder

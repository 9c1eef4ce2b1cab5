"""Where the processes of a local mesh write their logs."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

KEPT_MESHES = 20


def new_log_dir(root: Path) -> Path:
    """Make a folder for one mesh; those of all but the 20 latest are removed."""
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=root))
    by_age = sorted(root.iterdir(), key=_changed_at, reverse=True)
    for old in by_age[KEPT_MESHES:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _changed_at(path: Path) -> int:
    """In nanoseconds; the beginning of time for what another mesh has just removed."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0

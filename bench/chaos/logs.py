"""What the services' logs say of faults of their own: lines at level error."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path


def error_events(log_dir: Path) -> Counter[str]:
    """`<process>: <event>` with how often; a traceback outside the log counts too."""
    events: Counter[str] = Counter()
    for path in sorted(log_dir.glob("*.log")):
        with path.open(errors="replace") as lines:
            for line in lines:
                if (event := _error_event(line)) is not None:
                    events[f"{path.stem}: {event}"] += 1
    return events


def _error_event(line: str) -> str | None:
    if line.startswith("Traceback"):
        return "traceback"
    if '"error"' not in line:
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    if not isinstance(entry, dict) or entry.get("level") not in ("error", "critical"):
        return None
    return str(entry.get("event"))

"""Names that come from peers as labels, of which there are not too many."""

from __future__ import annotations

OTHER = "other"


class BoundedLabels:
    """The first names as they are, any more as "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def bound(self, name: str) -> str:
        """`name`, or "other" once there are too many."""
        if name not in self._names and len(self._names) >= self._limit:
            return OTHER
        self._names.add(name)
        return name

    def release(self, name: str) -> bool:
        """Make room; whether the name was held."""
        held = name in self._names
        self._names.discard(name)
        return held

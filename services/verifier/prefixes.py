"""Who has computed how a text begins: running requests and idle sessions, by block."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

Holder = TypeVar("Holder", bound=Hashable)


class PrefixIndex(Generic[Holder]):
    """Texts by the names of their beginnings; see `treecast.prefix`."""

    def __init__(self) -> None:
        self._holders: dict[bytes, dict[Holder, None]] = {}
        self._names: dict[Holder, Sequence[bytes]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, holder: Holder, names: Sequence[bytes]) -> None:
        """Enter a holder's text, whether computed by now or not; replaces what it had."""
        self.discard(holder)
        self._names[holder] = names
        for name in names:
            self._holders.setdefault(name, {})[holder] = None

    def discard(self, holder: Holder) -> None:
        """Take a holder out. Safe to repeat."""
        for name in self._names.pop(holder, ()):
            holders = self._holders[name]
            del holders[holder]
            if not holders:
                del self._holders[name]

    def longest(self, names: Sequence[bytes]) -> tuple[Holder | None, int]:
        """The holder whose text shares most blocks with this one, the newest of equals.

        Returns:
            The holder, and how many blocks are shared.
        """
        for count in range(len(names), 0, -1):
            if holders := self._holders.get(names[count - 1]):
                return next(reversed(holders)), count
        return None, 0

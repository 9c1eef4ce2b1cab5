"""Who has computed how a text begins: running requests and idle sessions, by block."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from treecast.prefix import prefix_names

Holder = TypeVar("Holder", bound=Hashable)


class PrefixIndex(Generic[Holder]):
    """Texts by their beginnings. A lookup costs a hash for each block of the text asked for."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._holders: dict[bytes, dict[Holder, None]] = {}
        self._names: dict[Holder, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._names)

    def add(self, holder: Holder, tenant: str, tokens: Sequence[int]) -> None:
        """Enter a holder's text, whether computed by now or not; replaces what it had."""
        self.discard(holder)
        names = self._names[holder] = prefix_names(tenant, tokens, self.block_tokens)
        for name in names:
            self._holders.setdefault(name, {})[holder] = None

    def discard(self, holder: Holder) -> None:
        """Take a holder out. Safe to repeat."""
        for name in self._names.pop(holder, ()):
            holders = self._holders[name]
            del holders[holder]
            if not holders:
                del self._holders[name]

    def longest(self, tenant: str, tokens: Sequence[int]) -> tuple[Holder | None, int]:
        """The holder whose text shares most blocks with this one, the newest of equals.

        Returns:
            The holder, and how many tokens are shared: whole blocks.
        """
        names = prefix_names(tenant, tokens, self.block_tokens)
        for count in range(len(names), 0, -1):
            if holders := self._holders.get(names[count - 1]):
                return next(reversed(holders)), count * self.block_tokens
        return None, 0

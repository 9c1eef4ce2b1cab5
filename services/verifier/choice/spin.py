"""One speculator per request, chosen by a bandit, placed by a matching (SPIN)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from treecast.services.verifier.metrics.choice import ChoiceMetrics

from .bandit import RateBandit
from .base import TreePolicy
from .matching import match

if TYPE_CHECKING:
    from treecast.services.verifier.attachments import Attachment, Speculator
    from treecast.services.verifier.requests import Request

_STAY = 1.1
"""A move must promise a tenth more than staying: building KV anew is not free."""
_PATIENCE = 4
"""Matchings by which a switch must have brought its first tree."""


@dataclass(slots=True)
class _Ledger:
    """What one request's rounds gave.

    Attributes:
        drafter: who drafted when the last tokens were committed.
        committed_at: when that was.
        overdue: matchings that a switch under way has outlasted.
    """

    bandit: RateBandit
    drafter: Speculator | None = None
    committed_at: float = 0.0
    overdue: int = 0


@dataclass(frozen=True, slots=True)
class _Board:
    """One decision: what requests would gain where, and the slots there are."""

    handles: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    capacities: tuple[int, ...]


class SpinPolicy(TreePolicy):
    """Each request is drafted by the speculator that is best for it, as far as there is room.

    Every `reassign_steps` steps all requests are matched anew. A move begins only where the new
    speculator has a slot now: both draft while it reads the text, so a swap between two full ones
    waits. A switch that has brought no tree after four matchings is given up. Where slots are
    short, whoever the matching leaves out keeps the slot that it has.

    Source: SPIN (arXiv 2503.15921).
    """

    name: ClassVar[str] = "spin"

    def __init__(
        self,
        metrics: ChoiceMetrics,
        reassign_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(metrics, per_session=1)
        self._reassign_steps = reassign_steps
        self._clock = clock
        self._all = RateBandit()
        self._ledgers: dict[int, _Ledger] = {}
        self._steps = 0

    def choose(
        self, request: Request, free: Sequence[Speculator], taken: Sequence[Speculator]
    ) -> Speculator:
        """A newcomer takes the best that has room; the next matching may move it."""
        bandit = self._ledger(request.handle).bandit
        chosen = max(free, key=lambda s: (bandit.index(_arm(s)), s.free_capacity))
        self._metrics.chose(chosen.link.peer)
        return chosen

    def committed(
        self, request: Request, attachments: Sequence[Attachment], tokens: Sequence[int]
    ) -> None:
        """Credit whoever drafted from one commit to the next."""
        ledger, now = self._ledger(request.handle), self._clock()
        drafter = attachments[0].speculator if attachments else None
        if drafter is not None and drafter is ledger.drafter:
            ledger.bandit.saw(_arm(drafter), len(tokens), now - ledger.committed_at)
        ledger.drafter, ledger.committed_at = drafter, now

    def rearrange(
        self,
        attached: Mapping[int, Sequence[Attachment]],
        speculators: Sequence[Speculator],
        may_draft: Callable[[int, Speculator], bool],
    ) -> Mapping[int, Speculator]:
        """Match all requests anew when it is time."""
        self._steps += 1
        if self._steps % self._reassign_steps or not attached or not speculators:
            return {}
        moves = {
            handle: now[0].speculator
            for handle, now in attached.items()
            if self._is_overdue(handle, switching=len(now) > 1)
        }
        board = self._board(attached, speculators, may_draft)
        for handle, place in zip(board.handles, match(board.values, board.capacities), strict=True):
            if place is None:
                continue
            chosen, now = speculators[place], attached[handle]
            self._metrics.chose(chosen.link.peer)
            if not now or now[0].speculator is not chosen:
                moves[handle] = chosen
        return moves

    def _board(
        self,
        attached: Mapping[int, Sequence[Attachment]],
        speculators: Sequence[Speculator],
        may_draft: Callable[[int, Speculator], bool],
    ) -> _Board:
        """Whoever is switching is left alone, and holds a slot on both sides."""
        settled = tuple(handle for handle, now in attached.items() if len(now) < 2)
        held = [each.speculator for now in attached.values() if len(now) > 1 for each in now]
        return _Board(
            settled,
            tuple(
                tuple(
                    self._value(handle, attached[handle], s) if may_draft(handle, s) else 0.0
                    for s in speculators
                )
                for handle in settled
            ),
            tuple(s.link.peer.capacity - held.count(s) for s in speculators),
        )

    def _is_overdue(self, handle: int, switching: bool) -> bool:
        ledger = self._ledger(handle)
        ledger.overdue = ledger.overdue + 1 if switching else 0
        return ledger.overdue >= _PATIENCE

    def _value(
        self, handle: int, attachments: Sequence[Attachment], speculator: Speculator
    ) -> float:
        """Tokens per second that a request may hope for; 0 where it cannot go."""
        if not speculator.willing:
            return 0.0
        value = self._ledger(handle).bandit.index(_arm(speculator))
        stays = bool(attachments) and attachments[0].speculator is speculator
        return _STAY * value if stays else value

    def released(self, request: Request) -> None:
        self._ledgers.pop(request.handle, None)

    def gone(self, speculator: Speculator) -> None:
        """Forget it, in every ledger: an instance that comes back is a new one."""
        for bandit in (self._all, *(ledger.bandit for ledger in self._ledgers.values())):
            bandit.forget(_arm(speculator))

    def _ledger(self, handle: int) -> _Ledger:
        if handle not in self._ledgers:
            self._ledgers[handle] = _Ledger(RateBandit(self._all))
        return self._ledgers[handle]


def _arm(speculator: Speculator) -> str:
    return speculator.link.peer.instance_id

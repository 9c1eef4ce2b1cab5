"""What a policy decides, and the default one: every tree counts, their union is verified."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from treecast.errors import NotServed
from treecast.sampling.params import Law
from treecast.services.verifier.metrics.choice import ChoiceMetrics
from treecast.tree import TokenTree, merge

if TYPE_CHECKING:
    from treecast.services.verifier.attachments import Attachment, Speculator
    from treecast.services.verifier.requests import Request


@dataclass(frozen=True, slots=True)
class Offer:
    """One speculator's guesses for the running step of one request.

    Attributes:
        voters: names of its proposers, unique over all speculators.
        first_bit: the bit of the first of them in the tree's `proposers`; the others' follow.
        tree: its nodes, confidence calibrated.
    """

    voters: tuple[str, ...]
    first_bit: int
    tree: TokenTree


class TreePolicy:
    """Attach unlike speculators, verify the union of their trees (SpecInfer). The default.

    The other policies change a part of this. `Assignments` and `Speculation` ask at clear points
    and carry out the answers, so that a policy sends no frames; all of it runs on the event loop.
    """

    name: ClassVar[str] = "tree"
    laws: ClassVar[frozenset[Law]] = frozenset(Law)

    def __init__(self, metrics: ChoiceMetrics, per_session: int) -> None:
        """Begin.

        Args:
            per_session: speculators that draft one request at most, a switch's second aside.
        """
        self._metrics = metrics
        self.per_session = per_session

    def check_law(self, law: Law) -> None:
        """Refuse a law whose trees this policy would spoil.

        Raises:
            NotServed: as it says.
        """
        if law not in self.laws:
            raise NotServed(
                f"law {law.name.lower()} is not served under policy {self.name}, which prunes "
                "by value; policies tree and spin keep sibling groups"
            )

    def choose(
        self, request: Request, free: Sequence[Speculator], taken: Sequence[Speculator]
    ) -> Speculator:
        """Whom to attach next; of `free`, never empty, and beside `taken`.

        Unlike drafters merge best, so a new kind of proposer goes before more room.
        """
        kinds = {name for speculator in taken for name in speculator.link.peer.proposers}
        chosen = max(
            free, key=lambda s: (not kinds.issuperset(s.link.peer.proposers), s.free_capacity)
        )
        self._metrics.chose(chosen.link.peer)
        return chosen

    def combine(
        self, request: Request, offers: Sequence[Offer], max_nodes: int, max_depth: int
    ) -> TokenTree:
        """What to verify of the offers, none of them empty, for the next step."""
        return merge([offer.tree for offer in offers]).limit(max_nodes, max_depth)

    def committed(
        self, request: Request, attachments: Sequence[Attachment], tokens: Sequence[int]
    ) -> None:
        """Tokens were committed after a step; `attachments` are the request's, oldest first."""

    def rearrange(
        self,
        attached: Mapping[int, Sequence[Attachment]],
        speculators: Sequence[Speculator],
        may_draft: Callable[[int, Speculator], bool],
    ) -> Mapping[int, Speculator]:
        """Asked once per step: who should draft otherwise from now on.

        Args:
            attached: by handle, for each request that wants trees; a second attachment is a
                switch under way.
            may_draft: whether a request, by handle, may go to a speculator, room aside.
        Returns:
            The speculator to go to, by handle. The one that drafts already ends a switch.
        """
        return {}

    def switched(self, outcome: Literal["begun", "done", "abandoned"]) -> None:
        """A move that `rearrange` asked for has begun or ended."""
        self._metrics.switches.labels(outcome).inc()

    def released(self, request: Request) -> None:
        """A request has ended."""

    def gone(self, speculator: Speculator) -> None:
        """A speculator's stream has ended."""

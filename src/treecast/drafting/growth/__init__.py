"""Which nodes a draft model expands next, and which of its proposals make up the tree it offers.

The drafter keeps what the model proposed below every node that it computed, its *expansions*; a
growth policy reads them.
"""

from __future__ import annotations

from treecast.drafting.growth.acceptance import Acceptance
from treecast.drafting.growth.base import UNEXPANDED, Expansion, Growth, Selection
from treecast.drafting.growth.best_first import BestFirst
from treecast.drafting.growth.optimal import OptimalTrees, Shape, Size, StepCost, optimal_tree
from treecast.drafting.growth.planned import FORM, Planned
from treecast.drafting.growth.vector import ExpansionVector
from treecast.errors import InvalidRequest

__all__ = [
    "FORM",
    "UNEXPANDED",
    "Acceptance",
    "BestFirst",
    "Expansion",
    "ExpansionVector",
    "Growth",
    "OptimalTrees",
    "Planned",
    "Selection",
    "Shape",
    "Size",
    "StepCost",
    "optimal_tree",
    "parse_growth",
]


def parse_growth(text: str, acceptance: Acceptance | None = None) -> Growth:
    """Read a policy: `best-first`, `dp` (see their `parse`), or widths such as `<1,1,3>`.

    Args:
        acceptance: what `dp` plans with, kept by whoever drafts; None leaves it at its prior.

    Raises:
        InvalidRequest: none of these, or out of bounds.
    """
    text = text.strip()
    kind = text.partition(":")[0]
    if kind == "best-first":
        return BestFirst.parse(text)
    if kind == "dp":
        return Planned.parse(text, acceptance or Acceptance())
    if text.strip("<>, 0123456789-") or not text:
        raise InvalidRequest(
            f"growth is {text!r}; it must be best-first, {FORM}, or widths by level such as <1,1,3>"
        )
    return ExpansionVector.parse(text)

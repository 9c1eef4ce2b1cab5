"""Requests to speculators under each one's capacity: a maximum-weight matching."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment


def match(values: Sequence[Sequence[float]], capacities: Sequence[int]) -> list[int | None]:
    """Assign each request to at most one speculator so that the sum of values is largest.

    A speculator is as many columns as it has slots, no more of them than there are requests.

    Args:
        values: [num_requests][num_speculators]; 0 or less: never.
        capacities: [num_speculators], free slots; below 0 counts as none.
    Returns:
        By request, its speculator's index, or None.
    Source: SPIN (arXiv 2503.15921); linear_sum_assignment is a shortest augmenting path method,
        cubic in the number of requests at worst.
    """
    slots = [min(max(0, capacity), len(values)) for capacity in capacities]
    owners = np.repeat(np.arange(len(slots)), slots)
    assigned: list[int | None] = [None] * len(values)
    if not len(owners):
        return assigned
    gains = np.maximum(np.asarray(values, dtype=np.float64), 0.0)[:, owners]
    for row, column in zip(*linear_sum_assignment(gains, maximize=True), strict=True):
        if gains[row, column] > 0:
            assigned[int(row)] = int(owners[column])
    return assigned

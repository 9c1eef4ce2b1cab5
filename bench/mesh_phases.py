"""Where the time of a mesh's step goes, seen from outside.

What clients saw, less the phases that the verifier itself measures, is what streams, router and SDK
take.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from treecast.services.local import LocalMesh, ServiceProcess

from .scrape import scrape

MESH_PHASES = ("collect", "plan", "forward", "walk", "commit")
REMAINDER = "streams"


@dataclass(frozen=True, slots=True)
class MeshProfile:
    """A mesh's step by phase, from the first to the last token of some answers.

    Attributes:
        wall_ms: what clients saw, per step of the LLM.
        phases_ms: the verifier's own, and what is left: streams, router and SDK.
    """

    steps: float
    wall_ms: float
    phases_ms: Mapping[str, float]


def profile_mesh(mesh: LocalMesh, answer: Callable[[], object]) -> MeshProfile:
    """Time what a mesh does while `answer` has it answer. Blocks."""
    verifier = mesh.processes["verifier-0"]
    before, began = phase_sums(verifier), time.perf_counter()
    answer()
    wall_s, after = time.perf_counter() - began, phase_sums(verifier)
    steps = after["forward"].count - before["forward"].count
    phases = {
        name: 1000 * (after[name].seconds - before[name].seconds) / steps for name in MESH_PHASES
    }
    wall_ms = 1000 * wall_s / steps
    return MeshProfile(steps, wall_ms, phases | {REMAINDER: wall_ms - sum(phases.values())})


@dataclass(slots=True)
class PhaseSum:
    """Of all steps so far."""

    seconds: float = 0.0
    count: float = 0.0


def phase_sums(verifier: ServiceProcess) -> Mapping[str, PhaseSum]:
    """What a verifier's metrics say of each phase."""
    sums: defaultdict[str, PhaseSum] = defaultdict(PhaseSum)
    for sample in scrape(verifier):
        if sample.name == "treecast_verifier_step_phase_seconds_sum":
            sums[sample.labels["phase"]].seconds = sample.value
        elif sample.name == "treecast_verifier_step_phase_seconds_count":
            sums[sample.labels["phase"]].count = sample.value
    return sums

"""What is simulated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from treecast.engine.curve import StepCurve
from treecast.services.router.lengths import Predictor
from treecast.services.router.queue import QueueOrder

DEFAULT_CURVE_MS = {1: 15.2, 8: 16.7, 16: 19.9, 24: 24.3}
"""SmolLM2-135M, bfloat16, `exact`, 2 cores with AVX512-BF16; measured, docs/performance.md."""

DEFAULT_CURVE = "SmolLM2-135M on 2 cores"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A mesh and its load. Times in seconds, sizes in tokens.

    Attributes:
        curve_ms: milliseconds of a step by its rows, as a verifier's GetLoad tells them.
        requests_per_s: of all clients together.
        seconds: how long requests come; all that have come are served.
        warm_up_s: requests that come in this time are not counted.
        slots: requests in one verifier's step.
        max_rows: rows of one verifier's step.
        nodes, tokens_per_step: rows of each request's tree, and what a step with it brings.
        turns, think_s: of a session, on average; one of one turn is a request without a session.
        system_tokens: the beginning that all prompts of a tenant share.
        length_predictor: with "max-tokens" clients say their true lengths: an oracle.
        affinity: False, the control: every request goes to the least loaded verifier.
        lose_every_s: a verifier is lost so often, on average; 0 for never.
        restart_s: a lost verifier comes back after so long, with nothing in its KV pool.
    """

    requests_per_s: float
    seconds: float = 60.0
    warm_up_s: float = 10.0
    verifiers: int = 4
    routers: int = 2
    curve_ms: tuple[tuple[int, float], ...] = tuple(DEFAULT_CURVE_MS.items())
    slots: int = 32
    max_rows: int = 128
    pool_tokens: int = 65536
    nodes: int = 0
    tokens_per_step: float = 1.0
    tenants: int = 4
    turns: float = 4.0
    think_s: float = 5.0
    system_tokens: int = 256
    queue_limit: int = 256
    queue_order: QueueOrder = "fcfs"
    give_way_s: float = 0.1
    length_predictor: Predictor = "history"
    affinity: bool = True
    lose_every_s: float = 0.0
    restart_s: float = 30.0
    seed: int = 1

    @property
    def curve(self) -> StepCurve:
        return StepCurve({rows: ms / 1000 for rows, ms in self.curve_ms})


def read_curve(path: Path) -> tuple[tuple[int, float], ...]:
    """A step curve from JSON: milliseconds by number of rows, `{"1": 15.2, "8": 16.7}`.

    Raises:
        ValueError: it is not that.
    """
    read = json.loads(path.read_text())
    if not isinstance(read, dict) or not read:
        raise ValueError(f"{path} has no object of milliseconds by rows")
    curve = tuple(sorted((int(rows), float(ms)) for rows, ms in read.items()))
    if curve[0][0] < 1 or min(ms for _, ms in curve) <= 0:
        raise ValueError(f"{path} has rows or milliseconds that are not above 0")
    return curve

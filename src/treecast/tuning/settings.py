"""What a tuning run is asked for, and what it tells. Free of torch, for the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TuneSettings:
    """What to train, on what, and for how long.

    The run ends after `minutes` of training, interrupted runs of the same `out` counted in, or
    after `max_steps`. `teacher_share` of a label's weight is the target's own distribution; 0
    trains on the text alone and spares the target's forward passes.
    """

    target: Path
    corpus: Path
    out: Path
    minutes: float = 25.0
    layers: tuple[int, ...] = ()  # of the target; empty takes the first and the last
    max_steps: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    batch_size: int = 8
    teacher_share: float = 0.7
    teacher_top_k: int = 8
    learn_user_turns: bool = True
    heldout_fraction: float = 0.05
    checkpoint_every_s: float = 60.0
    seed: int = 0


@dataclass(frozen=True)
class TuneProgress:
    """Where a run stands. `heldout_success` is measured at checkpoints, on a few records."""

    num_steps: int
    epoch: int
    elapsed_s: float
    loss: float
    targets_per_s: float
    heldout_success: tuple[float, ...] | None = None


@dataclass(frozen=True)
class TuneReport:
    """What came of a run. `heldout_success` is top 1..5 over every held-out completion token."""

    out: Path
    layers: tuple[int, ...]
    num_steps: int
    num_epochs: int
    elapsed_s: float
    loss: float
    heldout_success: tuple[float, ...]
    num_records: int
    num_heldout: int
    corpus_problems: tuple[str, ...]


ProgressFn = Callable[[TuneProgress], None]

"""What a tuning run is asked for, and what it tells. Free of torch, for the command line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TuneSettings:
    """What to train, on what, and for how long.

    Each of `drafts` trains for `minutes`, interrupted runs of the same `out` counted in, or for
    `max_steps`. `teacher_share` of a label's weight is the target's own distribution; 0 trains on
    the text alone and spares the target's forward passes.

    Attributes:
        layers: of the target, for each draft; the last entry serves the drafts that are left, and
            none takes the first and the last layer.
        head_rows: tokens that a draft can propose, the most frequent of the corpus; 0 is all.
        start: trained weights to start from, for each draft; the last entry serves those that
            are left and the single one. Layers they lack are added so that they change nothing
            at first.
        compare_single: also train one draft with the layers and the minutes of all together.
    """

    target: Path
    corpus: Path
    out: Path
    drafts: int = 1
    minutes: float = 25.0
    layers: tuple[tuple[int, ...], ...] = ()
    head_rows: int = 0
    start: tuple[Path, ...] = ()
    compare_single: bool = False
    max_steps: int | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    batch_size: int = 8
    teacher_share: float = 0.7
    teacher_top_k: int = 8
    learn_user_turns: bool = True
    heldout_fraction: float = 0.05
    heldout_limit: int = 200
    checkpoint_every_s: float = 60.0
    storage: str = "bfloat16"
    report: Path | None = None  # folder of the report; None is `out`
    seed: int = 0


@dataclass(frozen=True)
class TuneProgress:
    """Where a run stands. `heldout_success` is measured at checkpoints, on a few records."""

    draft: str
    num_steps: int
    epoch: int
    elapsed_s: float
    loss: float
    targets_per_s: float
    heldout_success: tuple[float, ...] | None = None


@dataclass(frozen=True)
class DraftReport:
    """What came of one draft.

    `heldout_success` is top 1..5 over every held-out completion token; `train_share` is the share
    of training positions that were left to it by the drafts before it.
    """

    name: str
    out: Path
    layers: tuple[int, ...]
    head_rows: int
    stored_bytes: int
    num_steps: int
    num_epochs: int
    elapsed_s: float
    loss: float
    train_share: float
    heldout_success: tuple[float, ...]


@dataclass(frozen=True)
class TuneReport:
    """What came of a run.

    Attributes:
        report: the folder of report.md and report.json.
        union_success: the token is among the first 1..5 guesses of at least one draft.
        union_guesses: distinct guesses that the union has at 1..5, on average.
        single_ranks: success of the one draft of the same size with its first 1, 2, .. guesses,
            as many as the union may have; empty where none was trained.
    """

    report: Path
    drafts: tuple[DraftReport, ...]
    union_success: tuple[float, ...]
    union_guesses: tuple[float, ...]
    single: DraftReport | None
    single_ranks: tuple[float, ...]
    num_records: int
    num_heldout: int
    num_heldout_tokens: int
    corpus_problems: tuple[str, ...]


ProgressFn = Callable[[TuneProgress], None]

"""Where the time of a step goes: `treecast bench --profile`.

The engine's own step is timed in process, with a clock around each linear layer, each layer's
attention, the head, the law's picks, the walk and the commit; what is left of the model's pass
are its norms, rotations and activations, and what is left of the forward is Python that packs rows
and pages. (`mesh_phases` times a whole mesh.)
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from treecast.engine.base import Engine, KVSequence, Segment
from treecast.engine.bridge import TreePass
from treecast.engine.linears import RowLayers
from treecast.engine.runner import Runner
from treecast.sampling.laws import AcceptanceRule, acceptance_rule, walk
from treecast.sampling.params import Law, SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.transforms import Context
from treecast.tree import ROOT, TokenTree

if TYPE_CHECKING:
    from treecast.engine.hf import HFEngine
    from treecast.engine.loading import LoadOptions

ROWS = (1, 8, 24)
CONTEXT = 192
POOL_TOKENS = 1024
_RIGHT_GUESSES = 3
_TOP_OPERATORS = 8
_PROFILED_STEPS = 3
_TOKEN = 5

Seconds = dict[str, float]


@dataclass(frozen=True, slots=True)
class Operator:
    """One of torch's operators in a step: time of its own, without those it calls."""

    name: str
    calls: float
    ms: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A step by phase; the phases add up to `wall_ms`.

    Attributes:
        rows: of the pass, of one request: the root's and the tree's nodes.
        phases_ms: by phase; none is left over.
        operators: the costliest first, from other steps: torch's profiler slows what it watches.
    """

    rows: int
    wall_ms: float
    phases_ms: Mapping[str, float]
    operators: Sequence[Operator]


class Laps:
    """Seconds by phase of the step under way."""

    def __init__(self) -> None:
        self.seconds: Seconds = defaultdict(float)

    def timed(self, phase: str, act: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, its time added to a phase."""

        def lap(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            done = act(*args, **kwargs)
            self.seconds[phase] += time.perf_counter() - began
            return done

        return lap

    def take(self) -> Seconds:
        """What has been added up since the last time."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def profile_steps(
    folder: Path, options: LoadOptions, rows: Sequence[int] = ROWS, steps: int = 25
) -> list[StepProfile]:
    """Time steps of one request, by number of rows. Blocks.

    Of each number of rows the half of the steps with middling times counts.

    Raises:
        ModelError: see `HFEngine.load`.
    """
    laps = Laps()
    engine = load_timed(folder, options, laps)
    sequence = _context(engine)
    profiles = []
    for count in rows:
        tree = _tree(engine, sequence, count)
        step = _Step(engine, sequence, tree, laps)
        step()
        found = sorted((step() for _ in range(steps)), key=lambda one: one["wall"])
        middle = found[steps // 4 : steps - steps // 4]
        mean = {name: 1000 * float(np.mean([one[name] for one in middle])) for name in middle[0]}
        wall = mean.pop("wall")
        profiles.append(StepProfile(count, wall, mean, _operators(step)))
    return profiles


def load_timed(folder: Path, options: LoadOptions, laps: Laps) -> HFEngine:
    """An engine like `HFEngine.load`'s with clocks in it."""
    from treecast.engine.executor import LocalExecutor
    from treecast.engine.hf import HFEngine, pages_of
    from treecast.engine.loading import describe, load_model, num_layers
    from treecast.engine.runner import choose_runner, layer_shapes

    model = load_model(folder, options)
    info, count = describe(folder, model, options), num_layers(model)
    runner = choose_runner(model, _timed_layers(options.row_layers(), laps))
    shapes = layer_shapes(runner, range(count), torch.device(options.device))
    pages = pages_of(POOL_TOKENS)
    executor = LocalExecutor(_TimedRunner(runner, laps), shapes, options, pages)
    return HFEngine(executor, info, pages)


def _timed_layers(layers: RowLayers, laps: Laps) -> RowLayers:
    def timed(make: Callable[[nn.Linear], nn.Module], phase: str) -> Callable[..., nn.Module]:
        return lambda given: _TimedLinear(make(given), laps, phase)

    head = timed(layers.of_head().linear, "head")
    return replace(layers, linear=timed(layers.linear, "linears"), head=head)


class _TimedLinear(nn.Module):
    def __init__(self, linear: nn.Module, laps: Laps, phase: str) -> None:
        super().__init__()
        self._timed = laps.timed(phase, linear.forward)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._timed(x)
        return y


class _TimedRunner:
    """A runner whose layers' attention is timed, and the whole of it."""

    def __init__(self, runner: Runner, laps: Laps) -> None:
        self._run = laps.timed("layers", runner)
        self._laps = laps

    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, tree: TreePass) -> Tensor:
        timed = _TimedPass(self._laps.timed("attention", tree.attend))
        logits: Tensor = self._run(tokens, positions, wanted, timed)
        return logits


@dataclass(frozen=True, slots=True)
class _TimedPass:
    attend: Callable[..., Tensor]


class _TimedLaw:
    """A law whose picks are timed; it takes the rows themselves, as sampled requests do."""

    def __init__(self, law: AcceptanceRule, laps: Laps) -> None:
        self.check = law.check
        self.next_token = laps.timed("pick", law.next_token)

    def takes_likeliest(self, picker: Picker) -> bool:
        return False


class _Step:
    """A step of one request over and over: forward, walk, commit; then the text is cut back."""

    def __init__(self, engine: Engine, sequence: KVSequence, tree: TokenTree, laps: Laps) -> None:
        self._engine, self._sequence, self._tree, self._laps = engine, sequence, tree, laps
        self._law = _TimedLaw(acceptance_rule(Law.REPLAY), laps)

    def __call__(self) -> Seconds:
        """Seconds by phase, and of `wall`."""
        engine, tree = self._engine, self._tree
        picker = Picker(SamplingParams(temperature=0), 0, Context([_TOKEN]))
        self._laps.take()
        clock = time.perf_counter
        began = clock()
        (logits,) = engine.forward([Segment.rooted(self._sequence, [_TOKEN], tree)])
        forwarded = clock()
        walked = walk(tree, logits, picker, lambda token: None, self._law)
        walked_at = clock()
        engine.commit(self._sequence, [0, *(node + 1 for node in walked.accepted)])
        ended = clock()
        engine.truncate(self._sequence, CONTEXT)
        laps = defaultdict(float, self._laps.take())
        inside = laps["linears"] + laps["attention"] + laps["head"]
        return {
            "linears": laps["linears"],
            "attention": laps["attention"],
            "head": laps["head"],
            "other layers": laps["layers"] - inside,
            "Python": forwarded - began - laps["layers"],
            "pick": laps["pick"],
            "walk": walked_at - forwarded - laps["pick"],
            "KV": ended - walked_at,
            "wall": ended - began,
        }


def _context(engine: Engine) -> KVSequence:
    sequence = engine.allocate(CONTEXT + max(ROWS) + 1)
    engine.forward([Segment.chain(sequence, [_TOKEN] * CONTEXT, [])])
    engine.commit(sequence, range(CONTEXT))
    return sequence


def _tree(engine: Engine, sequence: KVSequence, rows: int) -> TokenTree:
    """A tree of so many rows, the root's with them, whose first nodes are what the model says."""
    tree, said = TokenTree(), _greedy(engine, sequence, min(_RIGHT_GUESSES, rows - 1))
    parent = ROOT
    for token in said:
        parent = tree.add(token, parent)
    wrong = [token for token in range(rows + len(said)) if token not in said]
    for token in wrong[: rows - 1 - len(said)]:
        tree.add(token, (len(tree) - 1) // 2 if len(tree) else ROOT)
    return tree


def _greedy(engine: Engine, sequence: KVSequence, count: int) -> list[int]:
    said = [_TOKEN]
    for _ in range(count):
        (logits,) = engine.forward([Segment.chain(sequence, said, [len(said) - 1])])
        engine.truncate(sequence, CONTEXT)
        said.append(int(logits[0].argmax()))
    return said[1:]


def _operators(step: Callable[[], object]) -> list[Operator]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(_PROFILED_STEPS):
            step()
    events: Any = watched.key_averages()
    costliest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:_TOP_OPERATORS]
    return [
        Operator(
            event.key,
            event.count / _PROFILED_STEPS,
            event.self_cpu_time_total / 1000 / _PROFILED_STEPS,
        )
        for event in costliest
    ]

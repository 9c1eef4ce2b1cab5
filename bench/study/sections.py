"""The report's sections: which measurements make up each, as cases to be run one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

from treecast.decoding.local import Generation, Request, generate_together
from treecast.drafting.drawn import DEFAULT_VECTOR
from treecast.drafting.growth import ExpansionVector
from treecast.sampling.params import PROPOSALS, Law, Proposal, SpeculationParams
from treecast.services.speculator.settings import DrafterSpec
from treecast.services.verifier.calibration import Calibration, PodCalibration, bin_of, tried
from treecast.tree import MAX_NODES, TokenTree

from .answers import DECODINGS, GREEDY, PREFILL_TOKENS, STOCHASTIC, Decoding, Question, key_of
from .bed import Bed
from .replaying import FirstGuesses, count_hits, first_guesses, replay
from .results import NUM_GUESSES, Measurements, Reliability, Trial
from .timing import shape_times, width_times

WIDTHS = (1, 2, 3, 4, 5)
CHAIN = ExpansionVector((1,) * 8)
TREE = ExpansionVector((1, 1, 3, 1, 1, 1, 1, 1))


@dataclass(frozen=True, slots=True)
class Case:
    """A part of a section: what it is called while it runs, and how it is run."""

    label: str
    run: Callable[[], Measurements]


class Section(Enum):
    """In the order in which they are measured and shown."""

    SUCCESS = "success"
    WIDTH = "width"
    LAWS = "laws"
    LENGTH = "length"
    TIME = "time"
    SHAPE = "shape"
    CALIBRATION = "calibration"

    @property
    def decodings(self) -> tuple[Decoding, ...]:
        """Of the recorded answers that it needs."""
        match self:
            case Section.TIME:
                return ()
            case Section.SHAPE:
                return (GREEDY,)
            case Section.LAWS:
                return (STOCHASTIC,)
        return DECODINGS

    def cases(self, bed: Bed) -> Iterator[Case]:
        """What is to be run."""
        return _CASES[self](bed)


def third_level(width: int) -> ExpansionVector:
    """<1,1,k,1,1,1,1,1>: SpecInfer's vector, with its one branching level as wide as asked."""
    return ExpansionVector((1, 1, width, 1, 1, 1, 1, 1))


def first_level(width: int) -> ExpansionVector:
    """<k,1,1,1,1,1,1,1>: as many chains, that part at the root."""
    return ExpansionVector((width, 1, 1, 1, 1, 1, 1, 1))


def _success(bed: Bed) -> Iterator[Case]:
    for decoding, proposal in (
        (GREEDY, Proposal.COUPLED),
        (STOCHASTIC, Proposal.COUPLED),
        (STOCHASTIC, Proposal.TOPK),
    ):
        name = decoding.name
        name += f", {proposal.name.lower()}" if decoding is STOCHASTIC else ""
        yield Case(name, _guessing(bed, decoding, proposal, name))


def _guessing(
    bed: Bed, decoding: Decoding, proposal: Proposal, setting: str
) -> Callable[[], Measurements]:
    speculation = SpeculationParams(proposal=proposal, growth=f"<{NUM_GUESSES}>")

    def run() -> Measurements:
        answers = bed.answers(decoding)
        found: dict[str, FirstGuesses] = {
            spec.name: first_guesses(bed.drafter([spec]), answers, speculation)
            for spec in bed.specs
        }
        rows = []
        for name, guesses in found.items():
            rows += count_hits([guesses], answers, setting, name)
        if len(found) > 1:
            rows += count_hits(list(found.values()), answers, setting, "union")
        return Measurements(guesses=tuple(rows))

    return run


def _width(bed: Bed) -> Iterator[Case]:
    vectors = dict.fromkeys(
        shape(width) for shape in (third_level, first_level) for width in WIDTHS
    )
    for decoding in DECODINGS:
        for vector in vectors:
            yield _replayed(bed, decoding, bed.drafts, _growing(vector), str(vector))


def _laws(bed: Bed) -> Iterator[Case]:
    """Every law with every proposal that it serves, over trees of one shape."""
    for law, proposals in PROPOSALS.items():
        for proposal in proposals:
            speculation = SpeculationParams(law, proposal, str(DEFAULT_VECTOR))
            setting = f"{law.name.lower()} / {proposal.name.lower()}"
            if law is Law.REPLAY:
                yield _replayed(bed, STOCHASTIC, bed.drafts, speculation, setting)
                continue
            for questions in bed.together(bed.questions, MAX_NODES):
                ids = f"{questions[0].id} to {questions[-1].id}"
                yield Case(f"{setting}: {ids}", _decoded(bed, questions, speculation, setting))


def _length(bed: Bed) -> Iterator[Case]:
    served = SpeculationParams(growth=bed.settings.growth, max_nodes=bed.settings.max_nodes)
    for decoding in DECODINGS:
        yield _replayed(bed, decoding, bed.specs, served, "as served")


def _time(bed: Bed) -> Iterator[Case]:
    vectors = [third_level(width) for width in WIDTHS]
    yield Case("step times", lambda: Measurements(times=width_times(bed.target, vectors)))


def _shape(bed: Bed) -> Iterator[Case]:
    yield _replayed(bed, GREEDY, bed.drafts, _growing(TREE), "tree")
    yield _replayed(bed, GREEDY, bed.drafts, _growing(CHAIN), "chain")
    yield Case("step times", lambda: Measurements(times=shape_times(bed.target, TREE, CHAIN)))


def _growing(vector: ExpansionVector) -> SpeculationParams:
    return SpeculationParams(growth=str(vector), max_nodes=MAX_NODES)


def _replayed(
    bed: Bed,
    decoding: Decoding,
    specs: Sequence[DrafterSpec],
    speculation: SpeculationParams,
    setting: str,
) -> Case:
    max_nodes = MAX_NODES if speculation.max_nodes is None else speculation.max_nodes

    def run() -> Measurements:
        drafter, answers = bed.drafter(specs), bed.answers(decoding)
        return Measurements(trials=tuple(replay(drafter, answers, speculation, max_nodes, setting)))

    return Case(f"{decoding.name} {setting}", run)


def _decoded(
    bed: Bed, questions: Sequence[Question], speculation: SpeculationParams, setting: str
) -> Callable[[], Measurements]:
    """Questions through the whole loop, as laws need it that change the text."""
    sampling = STOCHASTIC.sampling(bed.settings.max_tokens)

    def run() -> Measurements:
        answers = generate_together(
            bed.target,
            [Request(each.token_ids, sampling, key_of(each), speculation) for each in questions],
            bed.drafter(bed.drafts),
            MAX_NODES,
            PREFILL_TOKENS,
        )
        trials = [
            trial_of(done, question, setting)
            for question, done in zip(questions, answers, strict=True)
        ]
        return Measurements(trials=tuple(trials))

    return run


def trial_of(done: Generation, question: Question, setting: str) -> Trial:
    """What a generation took."""
    reached = [done.steps, *done.accepted_by_depth, 0]
    counts = [more - fewer for more, fewer in pairwise(reached)]
    while len(counts) > 1 and not counts[-1]:
        counts.pop()
    return Trial(
        setting, STOCHASTIC.name, question.id, question.category, done.drafted, tuple(counts)
    )


def _calibration(bed: Bed) -> Iterator[Case]:
    for decoding in DECODINGS:
        yield Case(f"{decoding.name} confidence", _confidence(bed, decoding))


def _confidence(bed: Bed, decoding: Decoding) -> Callable[[], Measurements]:
    """Trees as served, with the verifier's own calibration beside them."""
    settings = bed.settings
    speculation = SpeculationParams(growth=settings.growth)

    def run() -> Measurements:
        drafter = bed.drafter(bed.specs)
        watch = Watch(drafter.names, len(bed.questions))
        answers = bed.answers(decoding)
        replay(drafter, answers, speculation, settings.max_nodes, "", watch.saw)
        return Measurements(reliability=tuple(watch.rows(decoding.name)))

    return run


class Watch:
    """Notes what nodes were believed to be worth, and what came of them."""

    def __init__(self, names: Sequence[str], num_sessions: int) -> None:
        self._names = names
        pod = PodCalibration()
        self._sessions = [Calibration(pod, names) for _ in range(num_sessions)]
        self._seen: dict[tuple[int, int], list[tuple[float, float, bool]]] = {}

    def saw(self, place: int, tree: TokenTree, tokens: Sequence[int]) -> None:
        """A session's tree was verified; its calibration learns of it afterwards."""
        calibration = self._sessions[place]
        worth = calibration.apply(tree) if len(tree) else []
        for node, accepted in tried(tree, tokens).items():
            confidence = tree.confidence[node]
            key = tree.proposers[node], bin_of(confidence)
            self._seen.setdefault(key, []).append((confidence, worth[node], accepted))
        calibration.learn(tree, tokens)

    def rows(self, decoding: str) -> Iterator[Reliability]:
        """One for each set of proposers and bin that had a node, in order."""
        for (bits, _), seen in sorted(self._seen.items()):
            names = [name for k, name in enumerate(self._names) if bits >> k & 1]
            predicted, calibrated, accepted = (
                sum(column) / len(seen) for column in zip(*seen, strict=True)
            )
            yield Reliability(decoding, "+".join(names), len(seen), predicted, calibrated, accepted)


_CASES: dict[Section, Callable[[Bed], Iterator[Case]]] = {
    Section.SUCCESS: _success,
    Section.WIDTH: _width,
    Section.LAWS: _laws,
    Section.LENGTH: _length,
    Section.TIME: _time,
    Section.SHAPE: _shape,
    Section.CALIBRATION: _calibration,
}

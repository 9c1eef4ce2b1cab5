"""Several drafters as one: a lookup beside the toy model, both real."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from treecast.drafting.base import Drafter, DraftRequest
from treecast.drafting.growth import ExpansionVector
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.ssm import PREFILL_ROWS, SSMDrafter
from treecast.engine.base import Segment
from treecast.engine.toy import ToyEngine
from treecast.errors import InvalidRequest, ModelError, Overloaded
from treecast.sampling.params import SamplingParams, SpeculationParams
from treecast.services.speculator.loading import warm_up
from treecast.tree import ROOT

# After 1 2 8 1 2 the lookup says 8 1 2 ..; the toy model says 3*2+1+1 = 8, then 27.
TEXT = [1, 2, 8, 1, 2]


def request(tokens: list[int]) -> DraftRequest:
    return DraftRequest(tokens, len(tokens), SamplingParams(temperature=0), noise_key=0)


def model(context_tokens: int = 1024, capacity: int = 8) -> SSMDrafter:
    engine = ToyEngine(context_tokens=context_tokens)
    return SSMDrafter(engine, ExpansionVector((1, 1)), capacity)


def merged(*drafters: Drafter) -> MergedDrafter:
    drafter = MergedDrafter(drafters)
    drafter.open(1, request(TEXT))
    return drafter


def test_union_names_its_proposers_when_trees_overlap() -> None:
    drafter = merged(model(), NgramDrafter())
    assert drafter.names == ("ssm", "ngram")
    assert (drafter.name, drafter.vocab_size) == ("ssm+ngram", 97)
    tree = drafter.draft({1: 4})[1]
    proposers = {tuple(tree.sequence(node)): bits for node, bits in enumerate(tree.proposers)}
    assert proposers[(8,)] == 0b11
    assert proposers[(8, 27)] == 0b01
    assert proposers[(8, 1)] == 0b10


def test_union_keeps_to_the_budget_when_trees_differ() -> None:
    drafter = merged(model(), NgramDrafter())
    assert [len(drafter.draft({1: budget})[1]) for budget in (1, 3, 9)] == [1, 3, 9]


def test_union_equals_the_one_tree_when_there_is_one_drafter() -> None:
    alone = NgramDrafter()
    alone.open(1, request(TEXT))
    assert merged(NgramDrafter()).draft({1: 6})[1] == alone.draft({1: 6})[1]


def test_others_draft_on_when_one_has_no_room() -> None:
    full = model(capacity=1)
    full.open(99, request([1]))
    drafter = merged(full, NgramDrafter())
    assert set(drafter.draft({1: 4})[1].proposers) == {0b10}
    drafter.commit(1, [8])
    assert drafter.draft({1: 1})[1].tokens == [1]
    drafter.close(1)


class Broken(NgramDrafter):
    """Opens a session, then fails."""

    def open(self, handle: int, request: DraftRequest) -> None:
        super().open(handle, request)
        raise RuntimeError("device lost")


def test_others_draft_on_when_one_breaks_as_the_session_opens() -> None:
    broken = Broken(capacity=1, name="broken")
    drafter = merged(NgramDrafter(capacity=1), broken)
    assert set(drafter.draft({1: 4})[1].proposers) == {0b01}
    drafter.close(1)
    drafter.open(2, request(TEXT))  # neither was left open


def test_warm_up_fails_when_the_draft_does() -> None:
    def explode(segments: Sequence[Segment]) -> None:
        raise RuntimeError("device lost")

    engine = ToyEngine(on_forward=explode)
    drafter = MergedDrafter([SSMDrafter(engine, ExpansionVector((1, 1)), 8)])
    with pytest.raises(ModelError, match=r"^drafting failed at warm-up: device lost$"):
        warm_up(drafter, [engine])
    assert engine.usage.used == 0


def test_session_is_refused_when_no_drafter_takes_it() -> None:
    drafter = MergedDrafter([model(context_tokens=2), NgramDrafter(capacity=0)])
    with pytest.raises(InvalidRequest, match="text has 5 tokens; the draft's limit is 2"):
        drafter.open(1, request(TEXT))
    with pytest.raises(Overloaded):
        MergedDrafter([NgramDrafter(capacity=0)]).open(1, request(TEXT))


def test_lookup_answers_at_once_when_the_model_is_behind() -> None:
    drafter = MergedDrafter([model(), NgramDrafter()])
    drafter.open(1, request([*TEXT, *[9] * PREFILL_ROWS]))
    assert set(drafter.draft({1: 4})[1].proposers) == {0b10}
    assert drafter.is_behind(1)
    assert any(bits & 0b01 for bits in drafter.draft({1: 64})[1].proposers)
    assert not drafter.is_behind(1)


def test_name_is_refused_when_two_drafters_have_it() -> None:
    with pytest.raises(InvalidRequest, match="2 drafters are named 'ngram'; one may be"):
        MergedDrafter([NgramDrafter(), NgramDrafter()])


def test_models_are_refused_when_their_vocabularies_differ() -> None:
    other = SSMDrafter(ToyEngine(vocab_size=50), ExpansionVector((1,)), name="other")
    with pytest.raises(
        InvalidRequest, match="drafter other has a vocabulary of 50 tokens; that of ssm has 97"
    ):
        MergedDrafter([model(), NgramDrafter(), other])


@pytest.mark.parametrize("growth", ["wide", "<1,0>", "dp:0"])
def test_session_is_refused_when_its_growth_is_unknown(growth: str) -> None:
    asked = replace(request(TEXT), speculation=SpeculationParams(growth=growth))
    drafter = MergedDrafter([model(), NgramDrafter()])
    with pytest.raises(InvalidRequest):
        drafter.open(1, asked)
    drafter.open(1, request(TEXT))


def failing(tokens: int) -> SSMDrafter:
    """A model that breaks down over one token."""

    def fail(segments: Sequence[Segment]) -> None:
        if any(tokens in segment.tokens for segment in segments):
            raise RuntimeError(f"token {tokens}")

    engine = ToyEngine(on_forward=fail)
    return SSMDrafter(engine, ExpansionVector((1, 1)), name="failing")


def test_others_get_their_trees_when_one_session_fails() -> None:
    drafter = MergedDrafter([failing(13)])
    for handle, text in ((1, [1, 2]), (2, [1, 13]), (3, [1, 4])):
        drafter.open(handle, request(text))
    trees = drafter.draft({1: 4, 2: 4, 3: 4})
    # 3*2+1+1 = 8, then 27; 3*4+1+1 = 14, then 47.
    assert {handle: tree.tokens for handle, tree in trees.items()} == {1: [8, 27], 3: [14, 47]}
    assert {handle: str(why) for handle, why in drafter.take_lost().items()} == {2: "token 13"}
    assert drafter.take_lost() == {}
    drafter.commit(1, [8])
    assert drafter.draft({1: 4})[1].tokens == [27, 90]


def test_session_goes_on_when_one_of_its_drafters_fails() -> None:
    drafter = MergedDrafter([failing(8), NgramDrafter()])
    drafter.open(1, request(TEXT))
    assert set(drafter.draft({1: 4})[1].proposers) == {0b10}
    assert drafter.take_lost() == {}
    drafter.commit(1, [8])
    assert drafter.draft({1: 1})[1].tokens == [1]


def test_session_recovers_when_a_draft_broke_off_in_the_middle() -> None:
    broken = iter([False, True])

    def fail(segments: Sequence[Segment]) -> None:
        if next(broken, False):
            raise RuntimeError("once")

    drafter = MergedDrafter([SSMDrafter(ToyEngine(on_forward=fail), ExpansionVector((1, 1)))])
    for handle in (1, 2):
        drafter.open(handle, request([1, 2]))
    trees = drafter.draft({1: 4, 2: 4})
    assert [trees[handle].tokens for handle in (1, 2)] == [[8, 27], [8, 27]]
    assert drafter.take_lost() == {}


def test_models_draft_side_by_side_when_given_threads() -> None:
    together = threading.Barrier(2, timeout=10)

    def meet(segments: Sequence[Segment]) -> None:
        together.wait()  # nobody comes alone: one after the other, this would time out

    models = [
        SSMDrafter(ToyEngine(on_forward=meet), ExpansionVector((width,)), name=f"ssm-{width}")
        for width in (1, 2)
    ]
    with ThreadPoolExecutor(2) as threads:
        drafter = MergedDrafter([models[0], NgramDrafter(), models[1]], threads=threads)
        drafter.open(1, request(TEXT))
        tree = drafter.draft({1: 8})[1]
    assert tree.proposers[tree.child(ROOT, 8) or 0] == 0b111
    assert tree.proposers[tree.child(ROOT, 9) or 0] == 0b100


def test_each_drafters_time_is_reported_when_drafting() -> None:
    seen: list[tuple[str, float]] = []
    drafter = MergedDrafter(
        [model(), NgramDrafter()], observe=lambda name, seconds: seen.append((name, seconds))
    )
    drafter.open(1, request(TEXT))
    drafter.draft({1: 4})
    assert [name for name, _ in seen] == ["ssm", "ngram"]
    assert all(0 < seconds < 10 for _, seconds in seen)


def test_sessions_are_closed_everywhere_when_closed() -> None:
    engine = ToyEngine()
    drafter = merged(SSMDrafter(engine, ExpansionVector((1,))), NgramDrafter(capacity=1))
    drafter.draft({1: 4})
    drafter.close(1)
    drafter.close(1)
    assert engine.usage.free == engine.usage.total
    drafter.open(2, request(TEXT))

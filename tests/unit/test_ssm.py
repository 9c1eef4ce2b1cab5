"""The draft model's evergreen tree, on the toy model: by hand, and against trees grown anew."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from treecast.drafting.base import DraftRequest
from treecast.drafting.growth import BestFirst, ExpansionVector, Growth
from treecast.drafting.growth.acceptance import PERIOD
from treecast.drafting.proposal import likeliest, propose_coupled
from treecast.drafting.ssm import PREFILL_ROWS, SSMDrafter
from treecast.engine.curve import StepCurve
from treecast.engine.toy import ToyEngine, toy_logits
from treecast.errors import InvalidRequest, Overloaded, PromptTooLong
from treecast.sampling.noise import gumbel
from treecast.sampling.params import SamplingParams, SpeculationParams
from treecast.sampling.transforms import Context
from treecast.tree import ROOT, TokenTree

VOCAB = 97
GREEDY = SamplingParams(temperature=0)
NOISY = SamplingParams(temperature=1.0)
UNBOUNDED = BestFirst(width=4, max_passes=1000, num_children=6, min_confidence=0)


def request(
    tokens: Sequence[int], sampling: SamplingParams = GREEDY, noise_key: int = 5
) -> DraftRequest:
    return DraftRequest(tokens, len(tokens), sampling, noise_key)


def opened(engine: ToyEngine, growth: Growth, tokens: Sequence[int]) -> SSMDrafter:
    drafter = SSMDrafter(engine, growth)
    drafter.open(1, request(tokens))
    return drafter


def beliefs(tree: TokenTree) -> dict[tuple[int, ...], float]:
    return {tuple(tree.sequence(node)): tree.confidence[node] for node in range(len(tree))}


# --- by hand: after a, b the favoured token is 3b + a + 1, the next likely ones follow it ---------


def test_tree_follows_the_model_when_attached() -> None:
    drafter = opened(ToyEngine(), ExpansionVector((2, 1)), [1, 2])
    tree = drafter.draft({1: 16})[1]
    # 3*2+1+1 = 8, then 9; below 8: 3*8+2+1 = 27; below 9: 30.
    assert tree.tokens == [8, 9, 27, 30]
    assert tree.parents == [ROOT, ROOT, 0, 1]
    # S = 1*1 + 2*2 = 5, slope 9/8: the shares fall by exp(-9/8).
    share = (1 - np.exp(-9 / 8)) / (1 - np.exp(-97 * 9 / 8))
    assert tree.confidence[:2] == [pytest.approx(share), pytest.approx(share * np.exp(-9 / 8))]
    assert tree.proposers == [1, 1, 1, 1]


def test_only_new_rows_are_computed_when_commit_was_foreseen() -> None:
    engine = ToyEngine()
    drafter = opened(engine, ExpansionVector((2, 1)), [1, 2])
    drafter.draft({1: 16})
    assert engine.num_rows == 2 + 2  # the prompt; 8 and 9
    drafter.commit(1, [8])
    assert drafter.foresaw(1)
    tree = drafter.draft({1: 16})[1]
    assert engine.num_rows == 4 + 2  # 27 and 28; 8 was computed
    # Below 8: 27, 28; below 27: 3*27+8+1 = 90; below 28: 93.
    assert (tree.tokens, tree.parents) == ([27, 28, 90, 93], [ROOT, ROOT, 0, 1])


def test_accepted_path_is_kept_when_bonus_was_not_foreseen() -> None:
    engine = ToyEngine()
    drafter = opened(engine, ExpansionVector((2, 1)), [1, 2])
    drafter.draft({1: 16})
    drafter.commit(1, [9, 50])
    assert not drafter.foresaw(1)
    tree = drafter.draft({1: 16})[1]
    assert engine.num_rows == 4 + 1 + 2  # 50, then its two children; 9 was computed
    # 3*50+9+1 = 160 = 63, 64; below 63: 3*63+50+1 = 240 = 46; below 64: 243 = 49.
    assert (tree.tokens, tree.parents) == ([63, 64, 46, 49], [ROOT, ROOT, 0, 1])


def test_tree_starts_anew_when_nothing_was_foreseen() -> None:
    engine = ToyEngine()
    drafter = opened(engine, ExpansionVector((2, 1)), [1, 2])
    drafter.draft({1: 16})
    drafter.commit(1, [60, 70])
    tree = drafter.draft({1: 16})[1]
    assert engine.num_rows == 4 + 2 + 2
    # 3*70+60+1 = 271 = 77, 78; below 77: 302 = 11; below 78: 305 = 14.
    assert (tree.tokens, tree.parents) == ([77, 78, 11, 14], [ROOT, ROOT, 0, 1])


def test_commits_pile_up_when_no_tree_is_asked_for() -> None:
    drafter = opened(ToyEngine(), ExpansionVector((1,)), [1, 2])
    for token in (3, 4, 5):
        drafter.commit(1, [token])
    assert drafter.draft({1: 16})[1].tokens == [3 * 5 + 4 + 1]


def test_sessions_share_passes_when_drafted_together() -> None:
    engine = ToyEngine()
    drafter = opened(engine, ExpansionVector((1, 1)), [1, 2])
    drafter.open(2, request([5, 6]))
    trees = drafter.draft({1: 16, 2: 16})
    assert engine.num_passes == 2
    assert (trees[1].tokens, trees[2].tokens) == ([8, 27], [24, 79])


# --- against the oracle ---------------------------------------------------------------------------


def next_commit(rng: random.Random, tree: TokenTree) -> list[int]:
    """A path of the tree, as far as it goes right, and perhaps a token beside it."""
    tokens: list[int] = []
    if len(tree) and rng.random() < 0.7:
        tokens = tree.sequence(rng.randrange(len(tree)))
    if not tokens or rng.random() < 0.6:
        tokens.append(rng.randrange(VOCAB))
    return tokens


@pytest.mark.parametrize("sampling", [GREEDY, NOISY], ids=["greedy", "noisy"])
@pytest.mark.parametrize(
    "growth", [UNBOUNDED, ExpansionVector((3, 2, 1, 1))], ids=["best-first", "vector"]
)
@pytest.mark.parametrize("seed", range(4))
def test_evergreen_tree_equals_one_grown_anew_when_commits_are_random(
    growth: Growth, sampling: SamplingParams, seed: int
) -> None:
    rng = random.Random(seed)
    engine, text, survived = ToyEngine(), [1, 2, 3], 0
    evergreen = SSMDrafter(engine, growth)
    evergreen.open(1, request(text, sampling))
    for _ in range(25):
        budget = rng.choice([1, 5, 16, 40])
        tree = evergreen.draft({1: budget})[1]
        fresh = SSMDrafter(ToyEngine(), growth)
        fresh.open(9, DraftRequest(text, 3, sampling, 5))
        assert beliefs(tree) == beliefs(fresh.draft({9: budget})[9])
        committed = next_commit(rng, tree)
        evergreen.commit(1, committed)
        survived += evergreen.foresaw(1)
        text += committed
    assert survived > 0, "no commit was foreseen: the test shows nothing"
    evergreen.close(1)
    assert engine.usage.free == engine.usage.total


def test_every_belief_is_the_models_when_grown_in_few_passes() -> None:
    rng = random.Random(1)
    text = [4, 5]
    drafter = opened(ToyEngine(), BestFirst(width=3, max_passes=2), text)
    for _ in range(20):
        tree = drafter.draft({1: 12})[1]
        for path, belief in beliefs(tree).items():
            logits = toy_logits([*text, *path[:-1]], VOCAB)
            shares = np.exp(logits - logits.max())
            assert belief == pytest.approx(shares[path[-1]] / shares.sum(), rel=1e-5)
        committed = next_commit(rng, tree)
        drafter.commit(1, committed)
        text += committed


# --- proposals ------------------------------------------------------------------------------------


def test_proposals_are_top_k_of_perturbed_scores_when_temperature_is_set() -> None:
    logits = np.random.default_rng(0).normal(size=200).astype(np.float32)
    sampling = SamplingParams(temperature=0.5)
    proposal = propose_coupled(logits, Context([1]), 9, sampling, 77, num_children=4)
    perturbed = logits.astype(np.float64) / 0.5 + gumbel(77, 9, 200)
    assert proposal.tokens == np.argsort(-perturbed)[:4].tolist()
    shares = np.exp(perturbed - perturbed.max())
    expected = shares[proposal.tokens] / shares.sum()
    assert proposal.confidence == pytest.approx(expected.tolist())


def test_proposals_obey_top_k_and_penalties_when_asked() -> None:
    logits = np.zeros(100, np.float32)
    logits[[10, 20, 30]] = [5, 4, 3]
    sampling = SamplingParams(temperature=1, top_k=2, presence_penalty=3)
    proposal = propose_coupled(logits, Context([1], [10]), 2, sampling, 1, num_children=4)
    # 10 falls to 2, so 20 and 30 are the two likeliest.
    assert sorted(proposal.tokens) == [20, 30]


def test_first_child_is_the_targets_pick_when_draft_is_the_target() -> None:
    # The toy draft is the toy target: coupled by the noise, its first guesses are always right.
    from treecast.decoding.local import generate

    sampling = SamplingParams(temperature=1.3, top_p=0.9, max_tokens=40)
    drafter = SSMDrafter(ToyEngine(), ExpansionVector((1, 1, 1)))
    done = generate(ToyEngine(), [1, 2], sampling, noise_key=3, drafter=drafter)
    assert done.steps == 10
    assert done.accepted == 30


@pytest.mark.parametrize("count", [1, 8, 256, 700, 5000])
def test_likeliest_holds_the_top_scores_when_row_is_long(count: int) -> None:
    scores = np.random.default_rng(count).normal(size=4999).astype(np.float32)
    assert likeliest(scores, count).tolist() == sorted(np.argsort(-scores)[:count].tolist())


def test_likeliest_leaves_out_what_has_no_chance() -> None:
    scores = np.full(100, -np.inf, np.float32)
    scores[[3, 50, 70]] = 1.0, 3.0, 2.0
    assert likeliest(scores, 2).tolist() == [50, 70]
    assert likeliest(scores, 5).tolist() == [3, 50, 70]


# --- what a pass is worth: a pass takes 10 ms, and .685 tokens are expected below a node ----------


class Unmoved(StepCurve):
    """A curve that stays as it is, however quick the toy model may be."""

    def saw(self, rows: int, seconds: float) -> None: ...


def priced(engine: ToyEngine, growth: Growth, tokens: Sequence[int]) -> SSMDrafter:
    drafter = SSMDrafter(engine, growth, pass_s=Unmoved({1: 0.010, 64: 0.010}))
    drafter.open(1, request(tokens))
    return drafter


def test_no_pass_is_taken_when_time_is_worth_more() -> None:
    engine = ToyEngine()
    drafter = priced(engine, UNBOUNDED, [1, 2])
    assert len(drafter.draft({1: 16}, tokens_per_s=80)[1]) == 0  # .8 tokens in 10 ms
    assert not drafter.is_behind(1)  # nothing is owed until the next commit
    assert engine.num_passes == 0
    drafter.commit(1, [8])
    assert len(drafter.draft({1: 16}, tokens_per_s=68)[1]) > 0
    assert engine.num_passes == 1  # below the root .685 are, below its children fewer
    assert drafter.draft({1: 16})[1].depths.count(2) > 0
    assert engine.num_passes > 2  # free time


def test_text_is_read_all_the_same_when_much_of_it_is_left() -> None:
    engine = ToyEngine()
    drafter = priced(engine, UNBOUNDED, range(40))
    assert len(drafter.draft({1: 16}, tokens_per_s=1000)[1]) > 0
    assert engine.num_passes == 1


def test_a_shape_that_was_asked_for_is_grown_whatever_time_is_worth() -> None:
    drafter = priced(ToyEngine(), ExpansionVector((2, 1)), [1, 2])
    assert drafter.draft({1: 16}, tokens_per_s=1000)[1].tokens == [8, 9, 27, 30]


# --- limits ---------------------------------------------------------------------------------------


def test_prompt_is_read_in_parts_when_long() -> None:
    engine = ToyEngine(context_tokens=2048)
    prompt = [token % VOCAB for token in range(PREFILL_ROWS + 10)]
    drafter = opened(engine, ExpansionVector((1,)), prompt)
    assert drafter.draft({1: 4}) == {}
    assert drafter.is_behind(1)
    tree = drafter.draft({1: 4})[1]
    assert not drafter.is_behind(1)
    assert tree.tokens == [int(toy_logits(prompt, VOCAB).argmax())]


def test_short_session_drafts_when_another_reads_a_long_prompt() -> None:
    drafter = opened(ToyEngine(context_tokens=2048), ExpansionVector((1,)), [1] * 3 * PREFILL_ROWS)
    drafter.open(2, request([1, 2]))
    for committed in ([8], [27], [90]):
        assert drafter.draft({1: 4, 2: 4}).keys() == {2}
        drafter.commit(2, committed)
    assert drafter.draft({1: 4, 2: 4}).keys() == {1, 2}


def test_sessions_are_refused_when_too_many() -> None:
    drafter = SSMDrafter(ToyEngine(), ExpansionVector((1,)), capacity=1)
    drafter.open(1, request([1]))
    with pytest.raises(Overloaded, match="ssm drafter has 1 sessions; the limit is 1"):
        drafter.open(2, request([1]))


def test_session_is_refused_when_pool_is_full_and_taken_when_another_closes() -> None:
    engine = ToyEngine(pool_tokens=1024)
    drafter = SSMDrafter(engine, ExpansionVector((1,)))
    drafter.open(1, request([1], SamplingParams(temperature=0, max_tokens=400)))
    with pytest.raises(Overloaded):
        drafter.open(2, request([1], SamplingParams(temperature=0, max_tokens=400)))
    drafter.close(1)
    drafter.open(2, request([1], SamplingParams(temperature=0, max_tokens=400)))
    drafter.close(2)
    assert engine.usage.free == engine.usage.total


def test_session_is_refused_for_good_when_the_whole_pool_is_too_small_for_it() -> None:
    drafter = SSMDrafter(ToyEngine(pool_tokens=1024), ExpansionVector((1,)))
    with pytest.raises(
        PromptTooLong, match=r"may take \d+ positions of KV; the draft's pool has 1024"
    ):
        drafter.open(1, request([1], SamplingParams(temperature=0, max_tokens=1024)))


def test_no_kv_is_held_when_a_session_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise InvalidRequest("output does not fit the grammar")

    engine = ToyEngine()
    monkeypatch.setattr("treecast.drafting.ssm.Context", refuse)
    with pytest.raises(InvalidRequest):
        SSMDrafter(engine, ExpansionVector((1,))).open(1, request([1]))
    assert engine.usage.free == engine.usage.total


def test_text_is_refused_when_longer_than_the_drafts_context() -> None:
    drafter = SSMDrafter(ToyEngine(context_tokens=4), ExpansionVector((1,)))
    with pytest.raises(PromptTooLong, match="text has 5 tokens; the draft's limit is 4"):
        drafter.open(1, request([1, 2, 3, 4, 5]))


def test_unknown_tokens_are_refused_when_opened_or_committed() -> None:
    drafter = SSMDrafter(ToyEngine(), ExpansionVector((1,)))
    message = "token id is 97; the draft's vocabulary has 97"
    with pytest.raises(InvalidRequest, match=message):
        drafter.open(1, request([97]))
    drafter.open(1, request([96]))
    with pytest.raises(InvalidRequest, match=message):
        drafter.commit(1, [97])
    assert len(drafter.draft({1: 1})[1]) == 1


def test_drafting_ends_quietly_when_the_drafts_context_is_full() -> None:
    engine = ToyEngine(context_tokens=6)
    drafter = opened(engine, ExpansionVector((1, 1, 1, 1)), [1, 2, 3])
    assert max(drafter.draft({1: 9})[1].depths) == 4  # positions 3, 4, 5 computed
    drafter.commit(1, [50, 51, 52])
    assert max(drafter.draft({1: 9})[1].depths) == 1
    drafter.commit(1, [53])
    assert len(drafter.draft({1: 9})[1]) == 0
    drafter.commit(1, [54, 55])
    assert len(drafter.draft({1: 9})[1]) == 0


def test_growth_ends_when_a_session_holds_its_rows() -> None:
    engine = ToyEngine()
    drafter = SSMDrafter(engine, BestFirst(width=8, max_passes=100, min_confidence=0), max_rows=10)
    drafter.open(1, request([1, 2]))
    drafter.draft({1: 200})
    assert engine.num_rows == 2 + 9  # the prompt with the root, and nine nodes


def test_run_ahead_foresees_when_it_grows_beyond_the_offer() -> None:
    engine = ToyEngine()
    drafter = SSMDrafter(engine, ExpansionVector((2,)), ahead=BestFirst(min_confidence=0))
    drafter.open(1, request([1, 2]))
    offered = drafter.draft({1: 2})[1]
    while drafter.run_ahead({1: 30}):
        pass
    assert beliefs(offered).keys() == {(8,), (9,)}
    drafter.commit(1, [8, 28])
    assert drafter.foresaw(1)


# --- growth by request ----------------------------------------------------------------------------


def test_each_session_grows_as_it_asked_when_policies_differ() -> None:
    drafter = SSMDrafter(ToyEngine(), "<1>")
    for handle, growth in ((1, ""), (2, "<2,1>"), (3, "<1,1,1>"), (4, "<12>")):
        drafter.open(handle, replace(request([1, 2]), speculation=SpeculationParams(growth=growth)))
    trees = drafter.draft(dict.fromkeys((1, 2, 3, 4), 16))
    assert trees[1].tokens == [8]
    assert trees[2].tokens == [8, 9, 27, 30]
    assert trees[3].tokens == [8, 27, 90]
    assert len(trees[4]) == 12


def test_session_is_refused_when_its_growth_is_unknown() -> None:
    engine = ToyEngine()
    drafter = SSMDrafter(engine, "best-first")
    with pytest.raises(InvalidRequest, match="growth is 'wide'; it must be best-first, dp"):
        drafter.open(1, replace(request([1, 2]), speculation=SpeculationParams(growth="wide")))
    assert engine.usage.used == 0


def test_plan_follows_what_was_committed_when_growing_by_dp() -> None:
    drafter = SSMDrafter(ToyEngine(context_tokens=4096), "dp")
    drafter.open(1, replace(request([1, 2]), sampling=SamplingParams(0, max_tokens=2000)))
    # By the prior, .40 .11 ..: the first below the first is worth .16, the second child .11, and
    # the next below .064.
    assert drafter.draft({1: 4})[1].depths == [1, 1, 2, 3]
    for _ in range(PERIOD):
        drafter.commit(1, [drafter.draft({1: 4})[1].tokens[0]])
    # The first proposal was always right: a chain.
    assert drafter.draft({1: 4})[1].depths == [1, 2, 3, 4]


def test_plan_turns_to_breadth_when_the_second_proposal_is_right() -> None:
    drafter = SSMDrafter(ToyEngine(context_tokens=4096), "dp")
    drafter.open(1, replace(request([1, 2]), sampling=SamplingParams(0, max_tokens=2000)))
    for _ in range(PERIOD):
        tree = drafter.draft({1: 4})[1]
        first = tree.tokens[0]
        drafter.commit(1, [(first + 1) % VOCAB])
    # Below the second child, worth .8 or so, hang two more.
    tree = drafter.draft({1: 4})[1]
    assert tree.parents == [ROOT, ROOT, 1, 1]

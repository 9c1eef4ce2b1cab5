"""Calibration by hand: what a proposer says against what came true."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treecast.services.verifier.calibration import (
    CENTRES,
    EDGES,
    MAX_CURVES,
    NUM_BINS,
    Calibration,
    Curve,
    PodCalibration,
    bin_of,
    isotonic,
)
from treecast.services.verifier.metrics import VerifierMetrics
from treecast.services.verifier.metrics.trees import MAX_PROPOSER_LABELS
from treecast.tree import ROOT, TokenTree


def test_bins_are_equally_wide_in_log_odds() -> None:
    # Odds of 1/256, 1/64, 1/16, 1/4, 1, 4, 16.
    assert pytest.approx((1 / 257, 1 / 65, 1 / 17, 0.2, 0.5, 0.8, 16 / 17)) == EDGES
    # Centres at odds of 1/512, 1/128 .. 1/8, 1/2, 2, 8, 32.
    assert pytest.approx((1 / 513, 1 / 129, 1 / 33, 1 / 9, 1 / 3, 2 / 3, 8 / 9, 32 / 33)) == CENTRES
    assert [bin_of(centre) for centre in CENTRES] == list(range(NUM_BINS))
    assert (bin_of(1e-9), bin_of(0.49), bin_of(0.51), bin_of(1.0)) == (0, 4, 5, 7)


def test_ratio_is_shrunk_to_the_prior_when_little_was_seen() -> None:
    curve = Curve(weight=4.0, memory=1.0)
    assert curve.ratios == (1.0,) * NUM_BINS
    # Said .25 eight times, came true never: (0 + 4) / (2 + 4).
    for _ in range(8):
        curve.saw(4, 0.25, accepted=False)
    assert curve.ratios[4] == pytest.approx(4 / 6)
    assert curve.ratios[3] == 1.0
    # Once more, and it was right: (1 + 4) / (2.25 + 4).
    curve.saw(4, 0.25, accepted=True)
    assert curve.ratios[4] == pytest.approx(5 / 6.25)


def test_old_times_are_forgotten_when_a_bin_is_seen_again() -> None:
    curve = Curve(memory=0.5)
    curve.saw(6, 0.9, accepted=True)
    curve.saw(6, 0.8, accepted=False)
    assert (curve.predicted[6], curve.accepted[6]) == (pytest.approx(1.25), 0.5)


def test_worth_is_the_confidence_when_nothing_was_seen() -> None:
    said = [0.002, 0.03, 0.2, 0.5, 0.77, 0.96, 1.0]
    assert Curve().apply(said) == pytest.approx(said)


def test_worth_is_drawn_between_centres_when_ratios_differ() -> None:
    curve = Curve(prior=(1.0, 1.0, 1.0, 1.0, 1.0, 0.6, 1.0, 1.0))
    # Centres 1/3, 2/3 and 8/9 are worth 1/3, .4 and 8/9.
    assert curve.apply([1 / 3, 2 / 3, 8 / 9]) == pytest.approx([1 / 3, 0.4, 8 / 9])
    assert curve.apply([0.5]) == pytest.approx([(1 / 3 + 0.4) / 2])


def test_worth_never_falls_when_a_bin_is_below_its_neighbour() -> None:
    # Bins 4 and 5 say 1/3 and 2/3 and are worth 1/3 and .2: pooled, at equal weights, .2667.
    curve = Curve(prior=(1.0, 1.0, 1.0, 1.0, 1.0, 0.3, 1.0, 1.0))
    assert curve.apply([1 / 3, 0.5, 2 / 3]) == pytest.approx([0.8 / 3] * 3)


def test_worth_stays_within_bounds_when_ratios_are_extreme() -> None:
    assert Curve(prior=(9.0,) * NUM_BINS).apply([0.9, 1.0]) == pytest.approx([1.0, 1.0])
    assert Curve(prior=(0.0,) * NUM_BINS).apply([0.9, 1.0]) == pytest.approx([0.001, 0.001])


def test_falling_neighbours_are_pooled_by_weight() -> None:
    assert isotonic([1, 3, 2, 4], [1, 1, 1, 1]) == [1, 2.5, 2.5, 4]
    assert isotonic([1, 4, 1], [1, 1, 2]) == [1, 2, 2]
    assert isotonic([3, 2, 1], [1, 1, 1]) == [2, 2, 2]


@given(
    st.lists(st.tuples(st.floats(0.001, 1), st.booleans()), max_size=60),
    st.lists(st.floats(0.0005, 1), min_size=2, max_size=20),
)
def test_worth_rises_with_confidence_whatever_was_seen(
    seen: list[tuple[float, bool]], said: list[float]
) -> None:
    curve = Curve()
    for confidence, accepted in seen:
        curve.saw(bin_of(confidence), confidence, accepted)
    worth = curve.apply(sorted(said)).tolist()
    assert worth == sorted(worth)
    assert all(0 < value <= 1 for value in worth)


def tree_of_two() -> TokenTree:
    """Below the root 10 (.6, both) and 11 (.3, the first); below 10 stands 20 (.9, the second)."""
    return TokenTree.build([10, 11, 20], [ROOT, ROOT, 0], [0.6, 0.3, 0.9], [0b11, 0b01, 0b10])


def test_only_children_of_accepted_nodes_are_learnt_from() -> None:
    pod = PodCalibration()
    calibration = Calibration(pod, ["ssm", "ngram"])
    calibration.learn(tree_of_two(), [11, 5])
    # 10 was tried and missed, 11 was right; 20 was never tried.
    sums = {(r.proposer, round(r.centre, 2)): (r.predicted, r.accepted) for r in pod.reliability()}
    assert sums["ssm", 0.67] == (0.6, 0)
    assert sums["ngram", 0.67] == (0.6, 0)
    assert sums["ssm", 0.33] == (0.3, 1)
    assert sums["ngram", 0.89] == (0, 0)


def test_agreement_is_trusted_apart_from_its_members() -> None:
    calibration = Calibration(PodCalibration(), ["ssm", "ngram"])
    for _ in range(40):
        calibration.learn(tree_of_two(), [10, 9])  # what both say is right, 11 and 20 never are
    both, alone, deep = calibration.apply(tree_of_two())
    assert both > 0.7
    assert alone < 0.25
    assert deep < 0.5


def test_new_session_starts_from_what_the_pod_knows() -> None:
    pod = PodCalibration()
    boaster = Calibration(pod, ["ssm"])
    claim = TokenTree.chain([5], confidence=0.9)
    for _ in range(400):
        boaster.learn(claim, [6])
    assert Calibration(pod, ["ssm"]).apply(claim)[0] < 0.2
    # Other proposers are none the worse for it.
    assert Calibration(pod, ["ngram"]).apply(claim)[0] == pytest.approx(0.9)


def test_session_is_trusted_by_its_own_record_when_it_is_long() -> None:
    pod = PodCalibration()
    for _ in range(200):
        Calibration(pod, ["ssm"]).learn(TokenTree.chain([5], confidence=0.9), [6])
    honest = Calibration(pod, ["ssm"])
    for _ in range(200):
        honest.learn(TokenTree.chain([5], confidence=0.9), [5])
    assert honest.apply(TokenTree.chain([5], confidence=0.9))[0] > 0.85


def test_observed_is_reached_when_a_draft_boasts_at_all_levels() -> None:
    rng = random.Random(0)
    calibration = Calibration(PodCalibration(), ["ssm"])
    for _ in range(4000):
        said = rng.choice([0.1, 0.4, 0.95])
        token = 5 if rng.random() < said / 2 else 6
        calibration.learn(TokenTree.chain([5], confidence=said), [token])
    for said in (0.1, 0.4, 0.95):
        worth = calibration.apply(TokenTree.chain([5], confidence=said))[0]
        assert worth == pytest.approx(said / 2, rel=0.35)


def test_pod_keeps_few_curves_when_names_are_many() -> None:
    pod = PodCalibration()
    curves = {id(pod.curve((f"drafter-{number}",))) for number in range(10 * MAX_CURVES)}
    assert len(curves) == MAX_CURVES + 1


def test_labels_are_bounded_when_names_are_many() -> None:
    metrics = VerifierMetrics()
    pod = PodCalibration(metrics.trees.proposer_label)
    metrics.trees.watch(pod.reliability)
    for number in range(10 * MAX_PROPOSER_LABELS):
        name = f"drafter-{number}"
        metrics.trees.proposed([name], verified=2, accepted=1)
        Calibration(pod, [name]).learn(TokenTree.chain([5], confidence=0.6), [5])
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    assert len({s.labels["proposer"] for s in samples if "proposer" in s.labels}) == 33
    value = metrics.registry.get_sample_value
    bin_labels = {"proposer": "other", "confidence": "0.667"}
    others = 9 * MAX_PROPOSER_LABELS
    assert (
        value("treecast_verifier_verified_by_proposer_total", {"proposer": "other"}) == 2 * others
    )
    assert value("treecast_verifier_predicted_by_confidence_total", bin_labels) == pytest.approx(
        0.6 * others
    )
    assert value("treecast_verifier_accepted_by_confidence_total", bin_labels) == others

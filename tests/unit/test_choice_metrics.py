"""Labels stay bounded whatever peers call themselves."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from treecast.services.verifier.metrics.choice import MAX_LABELS, ChoiceMetrics
from treecast.wire.frames import Hello, Role


def labels(registry: CollectorRegistry, name: str) -> set[str]:
    return {
        value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == name
        for value in sample.labels.values()
    }


def test_kinds_of_speculators_share_a_label_when_there_are_too_many() -> None:
    registry = CollectorRegistry()
    metrics = ChoiceMetrics(registry)
    for number in range(100):
        metrics.chose(Hello("s", Role.SPECULATOR, proposers=("ssm", "ngram"), model=f"m{number}"))
    found = labels(registry, "treecast_verifier_speculator_choices_total")
    assert found == {f"ssm+ngram:m{number}" for number in range(MAX_LABELS)} | {"other"}


def test_a_voter_takes_the_place_of_one_that_is_gone() -> None:
    registry = CollectorRegistry()
    metrics = ChoiceMetrics(registry)
    for number in range(MAX_LABELS + 1):
        metrics.weigh(f"v{number}", 1.0)
    metrics.forget("v0")
    metrics.weigh("new", 2.0)
    found = labels(registry, "treecast_verifier_vote_weight")
    assert found == {f"v{number}" for number in range(1, MAX_LABELS)} | {"new"}

"""Which commits ask a speculator for a tree: worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from treecast.services.verifier.attachments import Attachment, Owed, Speculator
from treecast.services.verifier.calibration import Calibration, PodCalibration
from treecast.services.verifier.pace import Gain, Pace, Turn
from treecast.services.verifier.plan import Work
from treecast.services.verifier.speculation import gain_of
from treecast.tree import TokenTree


def attachment(place: int = 0, *, shares_cores: bool = True) -> Attachment:
    peer = SimpleNamespace(shares_cores=shares_cores)
    speculator = Speculator(SimpleNamespace(peer=peer))  # type: ignore[arg-type]  # no stream
    return Attachment(speculator, place, Calibration(PodCalibration(), ["ssm"]))


@pytest.mark.parametrize(
    ("gains", "asked"),
    [
        ([1.0], 1),
        ([0.99], 0),
        ([0.25] * 4, 4),  # all wait for the drafts, and pay for them together
        ([0.24] * 4, 0),
        ([1.0, 0, 0, 0], 1),  # one alone may be worth the wait of all
        ([0.9, 0.12, 0.12, 0.12], 0),  # less than half a share each: better without them
        ([0.88, 0.13, 0.12, -0.3], 2),
    ],
)
def test_drafts_are_asked_for_while_they_bring_what_all_requests_would_get_meanwhile(
    gains: list[float], asked: int
) -> None:
    speculator = attachment().speculator
    speculator.pace.latency_s = 0.01
    speculator.judge(gains, 100.0)
    assert sum(gain >= speculator.least_gain for gain in gains) == asked


def test_a_request_knows_better_than_the_average_what_its_trees_bring() -> None:
    first, second = attachment(), attachment()
    second.speculator = first.speculator
    for _ in range(8):
        first.saw_gain(0.0, 0.0)
    assert (first.gain.alone, first.gain.added) == pytest.approx((1.0, 0.5))  # halved in eight
    assert first.speculator.pace.gain.alone == pytest.approx(2 * 0.5**0.5)  # in sixteen
    assert second.gain.alone == 2.0
    assert Attachment(first.speculator, 0, first.calibration).gain == first.speculator.pace.gain


def took(each: Attachment, *, pays: bool, brought: bool = True) -> Turn:
    """Its turn after a commit; whether the tree that it asks for came."""
    each.take_turn(pays)
    if each.turn is not Turn.SIT_OUT and brought:
        each.reading = False
    return each.turn


def test_who_does_not_pay_sits_out_more_and_more_commits_between_probes() -> None:
    each = attachment()
    each.reading = False  # it has read its text
    turns = [took(each, pays=False) for _ in range(2 + 8 + 16 + 32 + 64 + 64)]
    assert turns[0] is Turn.DRAFT  # what followed the text that it had to read first
    probes = [place for place, turn in enumerate(turns) if turn is Turn.CATCH_UP]
    # 16 after the first, then twice as many: each probe takes two turns, the second is measured.
    assert probes == [16, 16 + 1 + 32, 16 + 1 + 32 + 1 + 64, 16 + 1 + 32 + 1 + 64 + 1 + 64]
    assert [turns[place + 1] for place in probes] == [Turn.DRAFT] * 4
    assert turns.count(Turn.SIT_OUT) == len(turns) - 1 - 2 * 4


@pytest.mark.parametrize("pays", [True, False])
def test_text_is_read_to_its_end_before_a_tree_is_measured(pays: bool) -> None:
    """However many commits that takes; what they cost says nothing of its drafts."""
    each = attachment()
    assert [took(each, pays=pays, brought=False) for _ in range(20)] == [Turn.CATCH_UP] * 20
    each.reading = False
    assert took(each, pays=pays) is Turn.DRAFT
    assert took(each, pays=pays) is (Turn.DRAFT if pays else Turn.SIT_OUT)


def test_one_request_in_four_is_read_at_once_by_who_does_not_pay() -> None:
    pace = Pace()
    turns = [pace.first_turn(pays=False) for _ in range(8)]
    assert turns == [Turn.CATCH_UP, *[Turn.SIT_OUT] * 3] * 2
    assert pace.first_turn(pays=True) is Turn.CATCH_UP


def test_who_pays_again_has_every_turn_once_it_has_caught_up() -> None:
    each = attachment()
    each.reading = False
    for _ in range(40):
        took(each, pays=False)
    assert [took(each, pays=True) for _ in range(3)] == [Turn.CATCH_UP, Turn.DRAFT, Turn.DRAFT]
    assert (each.num_sat_out, each.probe_every) == (0, 8)


def test_who_sits_out_comes_back_when_it_pays_by_a_margin() -> None:
    """Near the border it neither leaves nor comes back."""
    each = attachment()
    each.speculator.pace.latency_s = 0.01
    each.gain = Gain(alone=1.0, added=0.0)
    border = 1.0 / 0.01  # tokens per second at which it is worth exactly its price
    decided = []
    for rate in (0.97, 0.99, 1.01, 0.99, 0.9, 0.85, 0.99, 1.01):
        each.speculator.judge([each.gain.of(first=True)], rate * border)
        decided.append(each.pays(first=True))
    assert decided == [True, True, False, False, False, True, True, False]


def test_all_requests_together_are_probed_as_often_as_one() -> None:
    each = attachment()
    each.reading, each.speculator.sessions = False, {1, 2, 3, 4}
    turns = [took(each, pays=False) for _ in range(1 + 4 * 16)]
    assert turns == [Turn.DRAFT, *[Turn.SIT_OUT] * (4 * 16 - 1), Turn.CATCH_UP]


def test_who_has_cores_of_its_own_never_sits_out() -> None:
    each = attachment(shares_cores=False)
    each.gain, each.speculator.least_gain = Gain(alone=-1.0, added=-1.0), math.inf
    assert each.pays(first=False)


def test_trees_are_owed_by_who_reads_text_first_only_where_all_are_waited_for() -> None:
    drafts, reads, sits_out = (attachment() for _ in range(3))
    drafts.turn, drafts.asked_at = Turn.DRAFT, 1.0
    reads.turn, reads.asked_at = Turn.CATCH_UP, 1.0
    sits_out.turn = Turn.SIT_OUT
    drafts.gain, reads.gain = Gain(alone=0.9, added=0.4), Gain(alone=0.8, added=0.5)
    assert Owed.of([reads, sits_out], reading=False) is None
    owed = Owed.of([drafts, reads, sits_out], reading=False)
    assert owed is not None
    assert owed.gain_tokens == pytest.approx(0.9)
    everybody = Owed.of([drafts, reads, sits_out], reading=True)
    assert everybody is not None
    assert everybody.gain_tokens == pytest.approx(0.9 + 0.4)


def verified(proposers: list[int], price: float = 0.0) -> Work:
    tree = TokenTree.chain(range(len(proposers)))
    tree.proposers = proposers
    return Work(None, 1, tree, price)  # type: ignore[arg-type]  # whose it is does not matter


@pytest.mark.parametrize(
    ("proposers", "first", "second"),
    [
        ([], (0, 0), (0, 0)),
        ([0b1, 0b1], (2, 2), (0, 0)),
        ([0x101, 0x101], (2, 0), (2, 0)),
        ([0x101, 0x100, 0b1], (1, 1), (2, 2)),  # neither has all three
    ],
)
def test_gain_is_told_apart_by_who_proposed_the_accepted_path(
    proposers: list[int], first: tuple[int, int], second: tuple[int, int]
) -> None:
    work, accepted = verified(proposers), range(len(proposers))
    assert gain_of(attachment(0), work, accepted) == first
    assert gain_of(attachment(1), work, accepted) == second


def test_what_verifying_nodes_takes_is_taken_off_the_gain_of_those_who_proposed_them() -> None:
    work = verified([0x101, 0x1, 0x1, 0x100], price=0.8)  # .2 a node; the first is accepted
    assert gain_of(attachment(0), work, [0]) == pytest.approx((1 - 0.6, 0 - 0.4))
    assert gain_of(attachment(1), work, [0]) == pytest.approx((1 - 0.4, 0 - 0.2))

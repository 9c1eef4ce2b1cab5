"""Which commits ask a speculator for a tree: worked out by hand."""

from __future__ import annotations

import pytest

from treecast.services.verifier.attachments import Attachment, Pace, Speculator, Turn
from treecast.services.verifier.calibration import Calibration, PodCalibration
from treecast.services.verifier.speculation import gain_of


def attachment(place: int = 0) -> Attachment:
    speculator = Speculator(None)  # type: ignore[arg-type]  # no stream is needed here
    return Attachment(speculator, place, Calibration(PodCalibration(), ["ssm"]))


def test_a_tree_pays_when_it_adds_more_than_its_time_is_worth() -> None:
    pace = Pace(latency_s=0.010, alone_tokens=0.9, added_tokens=0.5)
    assert pace.pays(80.0, alone=True)  # 0.8 tokens in its time, 0.9 in its trees
    assert not pace.pays(100.0, alone=True)
    assert not pace.pays(80.0, alone=False)  # others have most of it
    assert pace.pays(0.0, alone=False)


def test_who_does_not_pay_sits_out_more_and_more_commits_between_probes() -> None:
    each = attachment()
    turns = []
    for _ in range(2 + 8 + 16 + 32 + 64 + 64):
        each.turn = each.next_turn(pays=False)
        turns.append(each.turn)
    assert turns[0] is Turn.DRAFT  # what followed the text that it had to read first
    probes = [place for place, turn in enumerate(turns) if turn is Turn.CATCH_UP]
    # 16 after the first, then twice as many: each probe takes two turns, the second is measured.
    assert probes == [16, 16 + 1 + 32, 16 + 1 + 32 + 1 + 64, 16 + 1 + 32 + 1 + 64 + 1 + 64]
    assert [turns[place + 1] for place in probes] == [Turn.DRAFT] * 4
    assert turns.count(Turn.SIT_OUT) == len(turns) - 1 - 2 * 4


def test_who_pays_again_has_every_turn() -> None:
    each = attachment()
    for _ in range(40):
        each.turn = each.next_turn(pays=False)
    assert each.next_turn(pays=True) is Turn.DRAFT
    assert (each.num_sat_out, each.speculator.pace.probe_every) == (0, 8)


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
    assert gain_of(attachment(0), proposers) == first
    assert gain_of(attachment(1), proposers) == second

"""Who was busy when: bars of drafting, waiting and verifying, in shares of a stretch of time."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from treecast.wire.rounds import Round, RoundDraft

from .people import Cast

_TICKS = 8


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of one lane; `left` and `width` in percent.

    Attributes:
        kind: "wait", "verify" or "draft".
        colour: of a draft; else -1.
        round_number: from 1.
    """

    kind: str
    left: float
    width: float
    title: str
    label: str
    round_number: int
    colour: int = -1


@dataclass(frozen=True, slots=True)
class Lane:
    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class _Busy:
    kind: str
    lane: str
    began_us: int
    ended_us: int
    round_number: int
    colour: int = -1

    @property
    def label(self) -> str:
        return f"{(self.ended_us - self.began_us) / 1000:.1f} ms"


MODEL = "model"
_WORDS = {"wait": "waiting for trees", "verify": "verifying", "draft": "drafting"}


class Timeline:
    """All that is known of a generation's time."""

    def __init__(self, rounds: Sequence[Round], cast: Cast) -> None:
        """Times that begin anew, on another verifier, go on where the last one stopped."""
        self._cast = cast
        self._names = {
            speculator: " + ".join(proposer.name for proposer in proposers)
            for speculator, proposers in cast.speculators()
        }
        self._busy: list[_Busy] = []
        self.spans: list[tuple[int, int]] = []
        offset = end = 0
        for number, one in enumerate(rounds, start=1):
            if one.began_us + offset < end - 1000:
                offset = end - one.began_us
            end = self._add(one, number, offset)

    def _add(self, one: Round, number: int, offset: int) -> int:
        began = one.began_us + offset
        forward = began + one.waited_us
        end = forward + one.verified_us
        self.spans.append((began, end))
        self._busy.append(_Busy("wait", MODEL, began, forward, number))
        self._busy.append(_Busy("verify", MODEL, forward, end, number))
        for draft in one.drafts:
            self._add_draft(draft, number, offset)
        return end

    def _add_draft(self, draft: RoundDraft, number: int, offset: int) -> None:
        """Once for each tree that came; rounds after may live on what it left over."""
        came = draft.came_us + offset
        lane = self._names[draft.speculator]
        known = any(item.lane == lane and item.ended_us == came for item in self._busy)
        if draft.drafting_us and not known:
            colour = self._cast.of_draft(draft)[0].colour
            began = max(0, came - draft.drafting_us)
            self._busy.append(_Busy("draft", lane, began, came, number, colour))

    @property
    def total_us(self) -> int:
        return max((item.ended_us for item in self._busy), default=0)

    def whole(self) -> list[Lane]:
        """Everything."""
        return self._lanes(0, max(1, self.total_us))

    def of_round(self, number: int) -> list[Lane]:
        """What went on from the round's beginning to its end."""
        began, end = self.spans[number - 1]
        return self._lanes(began, max(end, began + 1))

    def _lanes(self, began: int, end: int) -> list[Lane]:
        lanes: dict[str, list[Bar]] = {name: [] for name in (*self._names.values(), MODEL)}
        for item in self._busy:
            left, right = max(item.began_us, began), min(item.ended_us, end)
            if left < right:
                lanes[item.lane].append(_bar(item, left, right, began, end - began))
        return [Lane(name, tuple(bars)) for name, bars in lanes.items()]

    def ticks(self) -> list[tuple[float, str]]:
        """Where to write which time, in percent of the whole."""
        total_ms = max(1e-3, self.total_us / 1000)
        steps = [unit * 10.0**power for power in range(-3, 7) for unit in (1, 2, 5)]
        step = steps[bisect.bisect_left(steps, total_ms / _TICKS)]
        count = int(total_ms / step)
        return [(100 * at * step / total_ms, _clock(at * step)) for at in range(count + 1)]


def _bar(item: _Busy, left: int, right: int, began: int, total: int) -> Bar:
    title = f"round {item.round_number}: {_WORDS[item.kind]}, {item.label}"
    share = 100 / total
    return Bar(
        item.kind,
        round((left - began) * share, 3),
        round((right - left) * share, 3),
        title,
        item.label,
        item.round_number,
        item.colour,
    )


def _clock(time_ms: float) -> str:
    return f"{time_ms / 1000:g} s" if time_ms >= 1000 else f"{time_ms:g} ms"

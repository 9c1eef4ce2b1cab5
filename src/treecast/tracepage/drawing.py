"""Where a round's nodes stand: depth from left to right, the output as the first row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treecast.client.results import RoundReport
from treecast.tree import ROOT

from .lettering import label, percent, width_of
from .people import Cast, Proposer

ACCEPTED, REJECTED, UNREACHED, START, BONUS = "accepted", "rejected", "unreached", "start", "bonus"

_CHARACTER = 8.0
_DOT = 10.0
_PADDING = 11.0
_HEIGHT = 28.0
_ROW = 38.0
_GAP = 32.0
_MARGIN = 8.0


@dataclass(frozen=True, slots=True)
class Pill:
    """One drawn token; lengths are in pixels, `x` its left and `y` its middle.

    Attributes:
        kind: its fate: one of the five constants above.
        dots: colours of its proposers, with the x of each dot's middle.
        percent: confidence, empty where there is none.
    """

    kind: str
    text: str
    title: str
    x: float
    y: float
    width: float
    dots: tuple[tuple[int, float], ...] = ()
    percent: str = ""

    height = _HEIGHT

    @property
    def top(self) -> float:
        return self.y - _HEIGHT / 2

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def text_x(self) -> float:
        return self.x + _PADDING + _DOT * len(self.dots)


@dataclass(frozen=True, slots=True)
class Edge:
    """A line between two pills; thicker where the draft was surer."""

    kind: str
    path: str
    thickness: float


@dataclass(frozen=True, slots=True)
class Drawing:
    width: float
    height: float
    pills: tuple[Pill, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class _Item:
    """A token to be placed: `parent` is an item's index, None for the start."""

    kind: str
    text: str
    title: str
    parent: int | None
    confidence: float = 1.0
    proposers: tuple[Proposer, ...] = ()

    @property
    def percent(self) -> str:
        return percent(self.confidence) if self.proposers else ""

    @property
    def width(self) -> float:
        confidence = 6.2 * len(self.percent) + 6 if self.percent else 0
        letters = _CHARACTER * width_of(self.text) + confidence
        return 2 * _PADDING + _DOT * len(self.proposers) + letters


def draw(report: RoundReport, before: str, cast: Cast) -> Drawing:
    """Lay out one round; `before` is the text of the token that it goes on from."""
    items = _items(report, before, cast)
    depths = _depths(items)
    rows = _rows(items)
    columns = _columns(items, depths)
    pills = tuple(
        _pill(item, columns[depth], row)
        for item, depth, row in zip(items, depths, rows, strict=True)
    )
    edges = tuple(
        _edge(item, pills[item.parent], pill)
        for item, pill in zip(items, pills, strict=True)
        if item.parent is not None
    )
    width = max(pill.right for pill in pills) + _MARGIN
    # Those of the output last, so that they lie on top.
    ordered = sorted(edges, key=lambda edge: edge.kind in (ACCEPTED, BONUS))
    return Drawing(width, _ROW * (max(rows) + 1), pills, tuple(ordered))


def _items(report: RoundReport, before: str, cast: Cast) -> list[_Item]:
    """The start, the nodes in their order, and the bonus token: node n is item n + 1."""
    one = report.round
    tree = one.tree
    texts = report.node_texts or ("",) * len(tree)
    items = [_Item(START, before, "the last token of the text before", None)]
    for node, token in enumerate(tree.tokens):
        kind = fate(report, node)
        proposers = tuple(cast.of_node(one, node))
        text = label(texts[node], token)
        names = " and ".join(proposer.name for proposer in proposers)
        title = f"{text}: {kind}; proposed by {names} at {percent(tree.confidence[node])}"
        parent = tree.parents[node] + 1
        items.append(_Item(kind, text, title, parent, tree.confidence[node], proposers))
    bonus = label(report.bonus_text, one.bonus)
    last = one.accepted[-1] + 1 if one.accepted else 0
    items.append(_Item(BONUS, bonus, f"{bonus}: bonus, the model's own next token", last))
    return items


def fate(report: RoundReport, node: int) -> str:
    """Accepted, rejected where the path went by, or never reached."""
    one = report.round
    if node in one.accepted:
        return ACCEPTED
    parent = one.tree.parents[node]
    return REJECTED if parent == ROOT or parent in one.accepted else UNREACHED


def _depths(items: Sequence[_Item]) -> list[int]:
    depths: list[int] = []
    for item in items:
        depths.append(0 if item.parent is None else depths[item.parent] + 1)
    return depths


def _rows(items: Sequence[_Item]) -> list[int]:
    """A parent stands beside its first child, and each further child as high as there is room.

    So the output, whose tokens come first, is the first row. Lines never cross: among the items of
    one depth, children stand in the order of their parents.
    """
    children: dict[int | None, list[int]] = {}
    for at, item in enumerate(items):
        children.setdefault(item.parent, []).append(at)
    rows = [0] * len(items)
    extents: dict[int, _Extent] = {}
    for at in reversed(range(len(items))):  # children before their parents
        below = sorted(children.get(at, ()), key=lambda child: _rank(items[child]))
        extents[at] = _join([extents.pop(child) for child in below])
        extents[at].place(at)
    for at, row in extents[0].rows.items():
        rows[at] = row
    return rows


@dataclass(slots=True)
class _Extent:
    """A subtree with its top at row 0: each item's row; first and last row by depth below it."""

    rows: dict[int, int]
    first: list[int]
    last: list[int]

    def place(self, at: int) -> None:
        """Put the item above its children."""
        self.rows[at] = 0
        self.first.insert(0, 0)
        self.last.insert(0, 0)


def _join(parts: Sequence[_Extent]) -> _Extent:
    """Subtrees of one parent, each moved down until it is clear of those before it."""
    joined = _Extent({}, [], [])
    row = -1
    for part in parts:
        both = zip(joined.last, part.first, strict=False)
        row = max(row + 1, *(last + 1 - first for last, first in both), 0)
        joined.rows |= {at: own + row for at, own in part.rows.items()}
        joined.first += [first + row for first in part.first[len(joined.first) :]]
        moved = [last + row for last in part.last]
        joined.last = moved + joined.last[len(moved) :]
    return joined


def _rank(item: _Item) -> tuple[bool, float]:
    return item.kind not in (ACCEPTED, BONUS), -item.confidence


def _columns(items: Sequence[_Item], depths: Sequence[int]) -> list[float]:
    """Left edge of each depth."""
    widest = [0.0] * (max(depths) + 1)
    for item, depth in zip(items, depths, strict=True):
        widest[depth] = max(widest[depth], item.width)
    lefts, x = [], _MARGIN
    for width in widest:
        lefts.append(x)
        x += width + _GAP
    return lefts


def _pill(item: _Item, x: float, row: int) -> Pill:
    dots = tuple(
        (proposer.colour, x + _PADDING + _DOT * at + 1)
        for at, proposer in enumerate(item.proposers)
    )
    y = _ROW * (row + 0.5)
    return Pill(item.kind, item.text, item.title, x, y, item.width, dots, item.percent)


def _edge(item: _Item, parent: Pill, child: Pill) -> Edge:
    middle = child.x - _GAP / 2
    path = (
        f"M{parent.right:.1f} {parent.y:.1f}H{child.x - _GAP:.1f}"
        f"C{middle:.1f} {parent.y:.1f} {middle:.1f} {child.y:.1f} {child.x:.1f} {child.y:.1f}"
    )
    return Edge(item.kind, path, 1 + 2.5 * item.confidence)

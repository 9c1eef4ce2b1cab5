"""The KV pool beside a model in plain Python, and by hand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from treecast.engine.kv_pool import (
    KVPool,
    PagedSequence,
    SwappedSequence,
    num_pages,
)
from treecast.errors import InvalidTree, Overloaded
from treecast.prefix import PAGE_TOKENS

EMPTY = -1


class Cells:
    """A value per place; a page that two live sequences hold is not to be written."""

    def __init__(self, num_places: int) -> None:
        self.values = [EMPTY] * num_places
        self.copies: list[tuple[list[int], list[int]]] = []
        self.sequences: list[PagedSequence] = []
        self.saved: dict[int, list[int]] = {}

    @property
    def position_bytes(self) -> int:
        return 3

    def save(self, key: int, places: Sequence[int]) -> None:
        self.saved[key] = [self.values[place] for place in places]

    def load(self, key: int, places: Sequence[int]) -> None:
        self.write(places, self.saved.pop(key))

    def forget(self, key: int) -> None:
        del self.saved[key]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        assert len(set(targets)) == len(targets) == len(sources)
        self.copies.append((list(sources), list(targets)))
        self.write(targets, [self.values[source] for source in sources])

    def write(self, places: Sequence[int], values: Sequence[int]) -> None:
        for page in {place // PAGE_TOKENS for place in places}:
            assert self.holders(page) <= 1, f"page {page} is written and shared"
        for place, value in zip(places, values, strict=True):
            self.values[place] = value

    def holders(self, page: int) -> int:
        return sum(page in sequence.pages for sequence in self.sequences)


@dataclass(eq=False)
class Text:
    """What a sequence must hold: a value per committed position and per row."""

    sequence: PagedSequence
    committed: list[int]
    rows: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def path_to(self, row: int) -> list[int]:
        return [] if row < 0 else [*self.path_to(self.parents[row]), row]

    def commit(self, path: Sequence[int], keep: Sequence[int]) -> None:
        new_index = {row: new for new, row in enumerate(keep)}
        self.committed += [self.rows[row] for row in path]
        self.parents = [new_index.get(self.parents[row], -1) for row in keep]
        self.rows = [self.rows[row] for row in keep]


class Twin:
    """A pool, and beside it what each of its live sequences must hold."""

    def __init__(self, total_pages: int, pool_type: type[KVPool] = KVPool) -> None:
        self.cells = Cells(total_pages * PAGE_TOKENS)
        self.pool = pool_type(total_pages, self.cells)
        self.live: list[Text] = []
        self.away: list[tuple[SwappedSequence, list[int]]] = []
        self._values = itertools.count()

    def allocate(self, capacity: int) -> Text | None:
        def act() -> PagedSequence:
            return self.pool.allocate(capacity)

        needed = num_pages(capacity)
        return None if self.refused(needed, act) else self._join(needed, act, [])

    def fork(self, text: Text, length: int, capacity: int) -> Text | None:
        def act() -> PagedSequence:
            return self.pool.fork(text.sequence, length, capacity)

        needed = num_pages(max(length, capacity)) - length // PAGE_TOKENS
        if self.refused(needed, act):
            return None
        return self._join(needed, act, text.committed[:length])

    def reserve(self, text: Text, capacity: int) -> None:
        def act() -> None:
            self.pool.reserve(text.sequence, capacity)

        needed = self.growth(text, capacity)
        if not self.refused(needed, act):
            with self.taking(needed):
                act()
            assert text.sequence.capacity >= capacity

    def append(self, text: Text, parents: Sequence[int]) -> None:
        """Add rows and write a new value into each one's place."""

        def act() -> None:
            self.pool.append(text.sequence, parents)

        start = text.sequence.num_slots
        needed = self.growth(text, start + len(parents))
        if self.refused(needed, act):
            return
        with self.taking(needed):
            act()
            values = list(itertools.islice(self._values, len(parents)))
            self.cells.write(text.sequence.places(start, start + len(parents)), values)
        text.rows += values
        text.parents += parents

    def prefill(self, text: Text, count: int) -> None:
        """Append a chain and commit it, where it fits."""
        self.pool.drop_rows(text.sequence, 0)
        text.rows, text.parents = [], []
        self.append(text, range(-1, count - 1))
        self.commit(text, range(len(text.rows)))

    def commit(self, text: Text, path: Sequence[int], keep: Sequence[int] = ()) -> None:
        with self.taking(0):
            self.pool.commit(text.sequence, path, keep)
        text.commit(path, keep)

    def drop_rows(self, text: Text, num_rows: int) -> None:
        with self.taking(0):
            self.pool.drop_rows(text.sequence, num_rows)
        del text.rows[num_rows:], text.parents[num_rows:]

    def truncate(self, text: Text, length: int) -> None:
        kept = [
            page
            for index, page in enumerate(text.sequence.pages)
            if index < num_pages(length) or self.cells.holders(page) == 1
        ]
        with self.taking(0):
            self.pool.truncate(text.sequence, length)
        assert text.sequence.pages == kept
        text.committed, text.rows, text.parents = text.committed[:length], [], []

    def trim(self, text: Text) -> None:
        kept = text.sequence.pages[: num_pages(len(text.committed))]
        self.pool.trim(text.sequence)
        assert text.sequence.pages == kept
        text.rows, text.parents = [], []

    def free(self, text: Text) -> None:
        self.pool.free(text.sequence)
        self.live.remove(text)
        self.cells.sequences.remove(text.sequence)

    def swap_out(self, text: Text) -> None:
        with self.taking(-text.sequence.own_pages):
            swapped = self.pool.swap_out(text.sequence)
        assert (swapped.length, swapped.nbytes) == (len(text.committed), 3 * len(text.committed))
        self.away.append((swapped, text.committed))
        self.live.remove(text)
        self.cells.sequences.remove(text.sequence)

    def swap_in(self, capacity: int) -> Text | None:
        swapped, committed = self.away[0]

        def act() -> PagedSequence:
            return self.pool.swap_in(swapped, capacity)

        needed = num_pages(max(capacity, swapped.length))
        if self.refused(needed, act):
            return None
        del self.away[0]
        return self._join(needed, act, committed)

    def discard(self) -> None:
        swapped, _ = self.away.pop(0)
        self.pool.discard(swapped)

    def free_all(self) -> None:
        """And see that what is free is one run again."""
        for text in [*self.live]:
            self.free(text)
        while self.away:
            self.discard()
        assert not self.cells.saved
        usage = self.pool.usage
        assert (usage.used, usage.free) == (0, usage.total)
        everything = self.pool.allocate(usage.total * PAGE_TOKENS)
        assert everything.pages == list(range(usage.total))

    def growth(self, text: Text, capacity: int) -> int:
        """Pages that must be taken before so many slots may be written."""
        pages, (end, offset) = text.sequence.pages, divmod(len(text.committed), PAGE_TOKENS)
        ends_shared = offset > 0 and self.cells.holders(pages[end]) > 1
        if ends_shared and capacity <= len(text.committed):
            return 0
        return max(0, num_pages(capacity) - len(pages)) + ends_shared

    def refused(self, needed: int, act: Callable[[], object]) -> bool:
        """Whether too few pages are free; if so, acting raises Overloaded and changes nothing."""
        usage, before = self.pool.usage, self.snapshot()
        if needed <= usage.free:
            return False
        message = f" needs {needed} pages; {usage.free} of {usage.total} are free"
        with pytest.raises(Overloaded, match=re.escape(message)):
            act()
        assert self.snapshot() == before
        return True

    @contextmanager
    def taking(self, pages: int) -> Iterator[None]:
        free = self.pool.usage.free
        yield
        assert self.pool.usage.free == free - pages

    def snapshot(self) -> object:
        texts = [
            (list(s.pages), s.length, list(s.parents), list(s.depths), s.capacity, s.freed)
            for s in self.cells.sequences
        ]
        return self.pool.usage, texts, list(self.cells.values)

    def check(self) -> None:
        usage = self.pool.usage
        held = {page for text in self.live for page in text.sequence.pages}
        assert usage.free + usage.used == usage.total
        assert usage.used == len(held)
        for text in self.live:
            self._check_contents(text)
            self._check_sharing(text)

    def _check_contents(self, text: Text) -> None:
        sequence = text.sequence
        assert (sequence.length, sequence.parents) == (len(text.committed), text.parents)
        assert sequence.depths == text.depths()
        assert sequence.num_slots <= sequence.capacity <= len(sequence.pages) * PAGE_TOKENS
        found = [self.cells.values[place] for place in sequence.places(0, sequence.num_slots)]
        assert found == text.committed + text.rows, "a place holds another value"

    def _check_sharing(self, text: Text) -> None:
        """A shared page begins below the committed length, and no row lies in it."""
        sequence = text.sequence
        assert len(set(sequence.pages)) == len(sequence.pages)
        shared = [self.cells.holders(page) > 1 for page in sequence.pages]
        assert sequence.own_pages == shared.count(False)
        assert sequence.shared_pages == shared[: len(text.committed) // PAGE_TOKENS].count(True)
        length = len(text.committed)
        for index, page in enumerate(text.sequence.pages):
            if self.cells.holders(page) > 1:
                start, stop = index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS
                assert stop <= length or (start < length and not text.rows)

    def _join(self, needed: int, act: Callable[[], PagedSequence], committed: list[int]) -> Text:
        with self.taking(needed):
            text = Text(act(), committed)
        self.live.append(text)
        self.cells.sequences.append(text.sequence)
        return text


SIZES = st.one_of(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]), st.integers(0, 260))
PICKS = st.integers(0, 2**16 - 1)
"""Choose among whatever there is, modulo its number."""


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls on a pool of 10 pages with up to 6 sequences."""

    pool_type: ClassVar[type[KVPool]] = KVPool

    def __init__(self) -> None:
        super().__init__()
        self.twin = Twin(10, self.pool_type)

    def has_text(self) -> bool:
        return bool(self.twin.live)

    def has_room(self) -> bool:
        return len(self.twin.live) < 6

    def text(self, pick: int) -> Text:
        return self.twin.live[pick % len(self.twin.live)]

    @precondition(has_room)
    @rule(capacity=SIZES, count=SIZES)
    def allocate_and_prefill(self, capacity: int, count: int) -> None:
        text = self.twin.allocate(capacity)
        if text is not None:
            self.twin.prefill(text, count)

    @precondition(has_text)
    @precondition(has_room)
    @rule(pick=PICKS, cut=st.one_of(st.just(0), SIZES), capacity=SIZES)
    def fork(self, pick: int, cut: int, capacity: int) -> None:
        text = self.text(pick)
        self.twin.fork(text, max(0, len(text.committed) - cut), capacity)

    @precondition(has_text)
    @precondition(has_room)
    @rule(pick=PICKS, length=PICKS, num_rows=st.integers(0, 70))
    def fork_and_diverge(self, pick: int, length: int, num_rows: int) -> None:
        """The way to a shared end: a fork of all, cut back inside a page it shares."""
        text = self.text(pick)
        forked = self.twin.fork(text, len(text.committed), 0)
        if forked is not None:
            self.twin.truncate(forked, length % (len(text.committed) + 1))
            self.twin.append(forked, [-1] * num_rows)

    @precondition(has_text)
    @rule(pick=PICKS, capacity=SIZES)
    def reserve(self, pick: int, capacity: int) -> None:
        self.twin.reserve(self.text(pick), capacity)

    @precondition(has_text)
    @rule(pick=PICKS, count=SIZES)
    def prefill(self, pick: int, count: int) -> None:
        self.twin.prefill(self.text(pick), count)

    @precondition(has_text)
    @rule(pick=PICKS, seeds=st.lists(PICKS, max_size=12))
    def append(self, pick: int, seeds: list[int]) -> None:
        text = self.text(pick)
        first = len(text.rows)
        self.twin.append(text, [seed % (first + i + 1) - 1 for i, seed in enumerate(seeds)])

    @precondition(has_text)
    @rule(pick=PICKS, end=PICKS, mask=PICKS)
    def commit(self, pick: int, end: int, mask: int) -> None:
        text = self.text(pick)
        last = end % (len(text.rows) + 1) - 1
        keep: list[int] = []
        for row, parent in enumerate(text.parents):
            if (parent == last or parent in keep) and mask >> row % 16 & 1:
                keep.append(row)
        self.twin.commit(text, text.path_to(last), keep)

    @precondition(has_text)
    @rule(pick=PICKS, end=PICKS)
    def commit_without_a_root(self, pick: int, end: int) -> None:
        text = self.text(pick)
        path = text.path_to(end % (len(text.rows) + 1) - 1)[1:]
        before = self.twin.snapshot()
        if path:
            with pytest.raises(InvalidTree, match=f"row {path[0]} of the committed path"):
                self.twin.pool.commit(text.sequence, path)
        assert self.twin.snapshot() == before

    @precondition(has_text)
    @rule(pick=PICKS, num_rows=st.integers(0, 12))
    def drop_rows(self, pick: int, num_rows: int) -> None:
        self.twin.drop_rows(self.text(pick), num_rows)

    @precondition(has_text)
    @rule(pick=PICKS, cut=SIZES)
    def truncate(self, pick: int, cut: int) -> None:
        text = self.text(pick)
        self.twin.truncate(text, max(0, len(text.committed) - cut))

    @precondition(has_text)
    @rule(pick=PICKS)
    def trim(self, pick: int) -> None:
        self.twin.trim(self.text(pick))

    @precondition(has_text)
    @rule(pick=PICKS)
    def free(self, pick: int) -> None:
        self.twin.free(self.text(pick))

    @precondition(has_text)
    @rule(pick=PICKS)
    def swap_out(self, pick: int) -> None:
        self.twin.swap_out(self.text(pick))

    @precondition(lambda self: self.twin.away)
    @precondition(has_room)
    @rule(capacity=SIZES)
    def swap_in(self, capacity: int) -> None:
        self.twin.swap_in(capacity)

    @precondition(lambda self: self.twin.away)
    @rule()
    def discard(self) -> None:
        self.twin.discard()

    @invariant()
    def agrees(self) -> None:
        self.twin.check()

    def teardown(self) -> None:
        self.twin.free_all()


MACHINE_SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_the_pool_agrees_with_the_model_when_calls_come_in_any_order() -> None:
    run_state_machine_as_test(PoolMachine, settings=MACHINE_SETTINGS)


class WrongBranchPool(KVPool):
    """Commits the last branch of the path's length instead of the path."""

    def commit(
        self, sequence: PagedSequence, path: Sequence[int], keep: Sequence[int] = ()
    ) -> None:
        tree = Text(sequence, [], parents=sequence.parents)
        if path and not keep and list(path) == tree.path_to(path[-1]):
            ends = [row for row, depth in enumerate(sequence.depths) if depth == len(path) - 1]
            path = tree.path_to(ends[-1])
        super().commit(sequence, path, keep)


class UncompactedPool(KVPool):
    """Commits and keeps rows without moving them."""

    def commit(
        self, sequence: PagedSequence, path: Sequence[int], keep: Sequence[int] = ()
    ) -> None:
        storage, self._storage = self._storage, Cells(len(self._table._holders) * PAGE_TOKENS)
        super().commit(sequence, path, keep)
        self._storage = storage


class NeverUnsharedPool(KVPool):
    """Writes behind a shared end without copying its page."""

    def _unshare_end(self, sequence: PagedSequence) -> None:
        pass


@pytest.mark.parametrize("pool_type", [WrongBranchPool, UncompactedPool, NeverUnsharedPool])
def test_the_machine_fails_when_the_pool_is_broken(pool_type: type[KVPool]) -> None:
    machine = type("BrokenMachine", (PoolMachine,), {"pool_type": pool_type})
    once = settings(
        MACHINE_SETTINGS, phases=[Phase.generate], report_multiple_bugs=False, database=None
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=once)


def made(text: Text | None) -> Text:
    assert text is not None
    return text


def filled(twin: Twin, length: int) -> Text:
    """A sequence with so many committed positions, in just the pages they need."""
    text = made(twin.allocate(length))
    twin.prefill(text, length)
    return text


def commit_second_branch(pool_type: type[KVPool]) -> None:
    twin = Twin(2, pool_type)
    text = made(twin.allocate(PAGE_TOKENS))
    twin.append(text, [-1, -1, -1])
    twin.commit(text, [1])
    twin.check()


def write_behind_a_shared_end(pool_type: type[KVPool]) -> None:
    twin = Twin(4, pool_type)
    text = filled(twin, 128)
    twin.truncate(made(twin.fork(text, 128, 128)), 70)
    twin.append(twin.live[1], [-1])
    twin.check()


@pytest.mark.parametrize("pool_type", [WrongBranchPool, UncompactedPool])
def test_the_model_differs_when_another_row_is_committed(pool_type: type[KVPool]) -> None:
    commit_second_branch(KVPool)
    with pytest.raises(AssertionError, match="a place holds another value"):
        commit_second_branch(pool_type)


def test_a_shared_write_is_seen_when_the_end_stays_shared() -> None:
    write_behind_a_shared_end(KVPool)
    with pytest.raises(AssertionError, match="page 1 is written and shared"):
        write_behind_a_shared_end(NeverUnsharedPool)


def test_growth_stays_in_place_when_the_pages_behind_are_free() -> None:
    twin = Twin(5)
    text = filled(twin, 3)
    twin.reserve(text, 200)
    assert text.sequence.pages == [0, 1, 2, 3]
    assert twin.cells.copies == []


def test_growth_moves_to_a_run_when_the_page_behind_is_held() -> None:
    twin = Twin(6)
    text = filled(twin, 3)
    twin.allocate(64)
    twin.reserve(text, 65)
    assert text.sequence.pages == [2, 3]
    assert twin.cells.copies == [([0, 1, 2], [128, 129, 130])]
    assert twin.pool.usage.used == 3
    twin.check()


def test_growth_scatters_when_no_run_is_long_enough() -> None:
    twin = Twin(5)
    texts = [filled(twin, 3) for _ in range(4)]
    twin.free(texts[1])
    twin.free(texts[3])
    twin.reserve(texts[0], 4 * 64)
    assert texts[0].sequence.pages == [0, 3, 4, 1]
    assert not texts[0].sequence.is_contiguous
    assert twin.cells.copies == []
    twin.check()


def test_growth_stays_behind_the_last_page_when_shared_pages_cannot_move() -> None:
    twin = Twin(6)
    text = filled(twin, 64)
    forked = made(twin.fork(text, 64, 64))
    twin.allocate(64)
    twin.reserve(forked, 65)
    assert forked.sequence.pages == [0, 2]
    twin.allocate(64)
    twin.free(twin.live[-1])
    twin.reserve(forked, 129)
    assert forked.sequence.pages == [0, 2, 3]


def test_the_smallest_run_is_taken_when_several_fit() -> None:
    twin = Twin(6)
    twin.allocate(64)
    hole = made(twin.allocate(64))
    twin.allocate(64)
    twin.free(hole)
    assert made(twin.allocate(64)).sequence.pages == [1]


def test_a_fork_shares_full_pages_and_copies_the_partial_one_when_cut_inside_a_page() -> None:
    twin = Twin(8)
    text = filled(twin, 130)
    forked = made(twin.fork(text, 70, 140))
    assert text.sequence.pages == [0, 1, 2]
    assert forked.sequence.pages == [0, 3, 4]
    assert twin.cells.copies == [(list(range(64, 70)), list(range(192, 198)))]
    assert (forked.sequence.length, forked.sequence.capacity) == (70, 192)
    assert twin.pool.usage.used == 5
    twin.check()


def test_the_end_is_copied_once_when_a_truncated_fork_is_written() -> None:
    twin = Twin(4)
    text = filled(twin, 128)
    forked = made(twin.fork(text, 128, 128))
    twin.truncate(forked, 70)
    assert (forked.sequence.pages, forked.sequence.capacity) == ([0, 1], 70)
    twin.append(forked, [-1])
    twin.append(forked, [-1])
    assert forked.sequence.pages == [0, 2]
    assert twin.cells.copies == [(list(range(64, 70)), list(range(128, 134)))]
    twin.check()


def test_a_shared_page_leaves_the_reservation_when_truncated_away() -> None:
    twin = Twin(4)
    forked = made(twin.fork(filled(twin, 128), 128, 192))
    twin.truncate(forked, 64)
    assert forked.sequence.pages == [0, 2]
    twin.trim(forked)
    assert forked.sequence.pages == [0]
    assert twin.pool.usage.used == 2


def test_commit_compacts_and_renumbers_when_rows_are_kept() -> None:
    twin = Twin(1)
    text = made(twin.allocate(64))
    #                  0   1  2  3  4  5  6  7
    twin.append(text, [-1, -1, 1, 1, 0, 3, 5, 3])
    twin.pool.commit(text.sequence, [1, 3], [5, 6, 7])
    assert twin.cells.values[:5] == [1, 3, 5, 6, 7]
    assert text.sequence.length == 2
    assert text.sequence.parents == [-1, 0, -1]
    assert text.sequence.depths == [0, 1, 0]


def test_commit_renumbers_when_the_path_is_empty() -> None:
    twin = Twin(1)
    text = made(twin.allocate(64))
    twin.append(text, [-1, -1, 1])
    twin.pool.commit(text.sequence, [], [1, 2])
    assert (twin.cells.values[:2], text.sequence.length) == ([1, 2], 0)
    assert text.sequence.parents == [-1, 0]


@pytest.mark.parametrize(
    ("path", "keep", "message"),
    [
        ([2], [], "row 2 of the committed path does not follow row -1"),
        ([0, 1], [], "row 1 of the committed path does not follow row 0"),
        ([0, 4], [], "row 4 of the committed path does not follow row 0"),
        ([-1], [], "row -1 of the committed path does not follow row -1"),
        ([0], [3], "kept row 3 has no parent among the kept, or is out of order"),
        ([0], [1], "kept row 1 has no parent among the kept, or is out of order"),
        ([0], [0], "kept row 0 has no parent among the kept, or is out of order"),
        ([], [1, 0], "kept row 0 has no parent among the kept, or is out of order"),
        ([], [0, 0], "kept row 0 has no parent among the kept, or is out of order"),
        ([], [4], "kept row 4 has no parent among the kept, or is out of order"),
    ],
)
def test_commit_raises_and_changes_nothing_when_rows_are_no_tree(
    path: list[int], keep: list[int], message: str
) -> None:
    twin = Twin(1)
    text = made(twin.allocate(64))
    twin.append(text, [-1, -1, 0, 2])
    before = twin.snapshot()
    with pytest.raises(InvalidTree, match=f"^{re.escape(message)}$"):
        twin.pool.commit(text.sequence, path, keep)
    assert twin.snapshot() == before


@pytest.mark.parametrize("parents", [[0], [-1, 1], [-2]])
def test_append_raises_and_changes_nothing_when_a_parent_does_not_precede(
    parents: list[int],
) -> None:
    twin = Twin(1)
    text = made(twin.allocate(0))
    before = twin.snapshot()
    with pytest.raises(InvalidTree, match=r"^row \d has parent -?\d; a parent precedes its row$"):
        twin.pool.append(text.sequence, parents)
    assert twin.snapshot() == before


def test_overloaded_names_what_is_needed_when_the_pool_is_too_full() -> None:
    twin = Twin(3)
    sequence = filled(twin, 70).sequence
    pool, before = twin.pool, twin.snapshot()
    full = "1 of 3 are free$"
    with pytest.raises(Overloaded, match=f"sequence of 129 positions needs 3 pages; {full}"):
        pool.allocate(129)
    with pytest.raises(Overloaded, match=f"growing a sequence to 257 .* needs 3 pages; {full}"):
        pool.reserve(sequence, 257)
    with pytest.raises(Overloaded, match=f"fork of 140 .* 70 of them .* needs 2 pages; {full}"):
        pool.fork(sequence, 70, 140)
    assert twin.snapshot() == before


def test_arguments_are_refused_when_beyond_the_sequence() -> None:
    twin = Twin(3)
    sequence = filled(twin, 70).sequence
    for length in (-1, 71):
        with pytest.raises(ValueError, match=f"cannot fork at {length}: 70 positions"):
            twin.pool.fork(sequence, length, 128)
        with pytest.raises(ValueError, match=f"cannot truncate to {length}: 70 positions"):
            twin.pool.truncate(sequence, length)
    twin.pool.free(sequence)
    with pytest.raises(ValueError, match="the sequence was freed"):
        twin.pool.free(sequence)

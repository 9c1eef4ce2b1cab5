"""What becomes of garbage once a process serves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from treecast.heap import THRESHOLDS, settle_heap


class Node:
    """May lie in a cycle."""

    def __init__(self) -> None:
        self.other: Node | None = None


def cycle() -> weakref.ref[Node]:
    """Two nodes that only collection frees."""
    one, two = Node(), Node()
    one.other, two.other = two, one
    return weakref.ref(one)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_there_is_not_looked_through_any_more() -> None:
    kept = Node()
    settle_heap()
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > 0
    assert all(one is not kept for one in gc.get_objects())


def test_garbage_from_before_and_of_what_was_replaced_is_freed_when_called_again() -> None:
    old = cycle()
    settle_heap()
    assert old() is None
    loaded = [Node(), Node()]
    loaded[0].other, loaded[1].other = loaded[1], loaded[0]
    replaced = weakref.ref(loaded[0])
    settle_heap()
    loaded.clear()
    gc.collect()
    assert replaced() is not None  # frozen: not looked at
    settle_heap()
    assert replaced() is None

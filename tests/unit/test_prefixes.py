"""Common beginnings, by name."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from treecast.prefix import prefix_names
from treecast.services.verifier.prefixes import PrefixIndex

BLOCK = 4
texts = st.lists(st.integers(0, 2), max_size=24)


def shared_blocks(a: list[int], b: list[int]) -> int:
    """The oracle: whole blocks that two texts have in common."""
    count = 0
    while (count + 1) * BLOCK <= min(len(a), len(b)):
        end = (count + 1) * BLOCK
        if a[:end] != b[:end]:
            break
        count += 1
    return count


@given(texts, texts)
def test_names_are_shared_exactly_when_beginnings_are(a: list[int], b: list[int]) -> None:
    names, others = prefix_names("t", a, BLOCK), prefix_names("t", b, BLOCK)
    equal = [one == other for one, other in zip(names, others, strict=False)]
    assert sum(equal) == shared_blocks(a, b)
    assert len(names) == len(a) // BLOCK


def test_no_name_is_shared_when_the_tenants_differ() -> None:
    assert not set(prefix_names("t", range(64), 4)) & set(prefix_names("u", range(64), 4))


@given(st.lists(st.tuples(st.sampled_from("tu"), texts), max_size=8), texts)
def test_longest_is_what_a_scan_finds(held: list[tuple[str, list[int]]], text: list[int]) -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for holder, (tenant, tokens) in enumerate(held):
        index.add(holder, prefix_names(tenant, tokens, BLOCK))
    index.discard(0)
    best = max((shared_blocks(t, text) for who, t in held[1:] if who == "t"), default=0)
    holder, shared = index.longest(prefix_names("t", text, BLOCK))
    assert shared == best
    assert (holder is None) == (best == 0)
    if holder is not None:
        assert shared_blocks(held[holder][1], text) == best


def test_nothing_is_left_when_all_are_discarded() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    names = prefix_names("t", range(16), BLOCK)
    for holder in ("a", "b", "a"):
        index.add(holder, names)
    assert index.longest(names[:2]) == ("a", 2)
    index.discard("a")
    index.discard("a")
    assert index.longest(names) == ("b", 4)
    index.discard("b")
    assert (len(index), index.longest(names)) == (0, (None, 0))
    assert not index._holders

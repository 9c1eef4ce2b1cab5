"""Whether this machine keeps the promise of exact numerics: checked, not assumed.

Exact attention and packed linears rest on how the matrix library adds up (see `kernels.exact`,
`engine.linears`). Another processor or library version may do it otherwise; then texts may differ
between ways of serving in a near-tie, and the engine says so when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from treecast.engine.base import Engine, KVSequence, Segment

_MOST_POSITIONS = 400
_CHUNKS = ((1,), (7, 64, 33), (100,))
_ONE_BY_ONE = 16
_TREE_NODES = 24


def differing_rows(engine: Engine, seed: int = 0, adapter: str = "") -> int:
    """Compute the same positions in several ways and count the rows whose bits differ.

    Positions are prefilled in chunks of several sizes, decoded one by one, and verified as the
    path of a random tree beside another sequence. Blocks for some fifty passes; leaves the pool
    as it was. 0 on a machine that keeps the promise.

    Args:
        engine: with four free pages at least, and a context of 64 tokens.
        adapter: that all but the other sequence are computed with; empty for none.
    """
    random = np.random.default_rng(seed)
    count = _num_positions(engine)
    tokens = random.integers(0, engine.info.vocab_size, count).tolist()
    expected = _prefill(engine, tokens, (128,), adapter)
    differing = 0
    for sizes in _CHUNKS:
        part = _ONE_BY_ONE if sizes == (1,) else count
        rows = _prefill(engine, tokens[:part], sizes, adapter)
        differing += _count_differing(rows, expected[:part])
    return differing + _tree_differing(engine, tokens, expected, random, adapter)


def _num_positions(engine: Engine) -> int:
    """As many as the context has before a tree, and the pool beside one and another sequence."""
    usage = engine.usage
    room = (usage.free - 2) * usage.page_tokens - _TREE_NODES
    return min(_MOST_POSITIONS, engine.info.context_tokens - _TREE_NODES, room)


def _prefill(engine: Engine, tokens: list[int], sizes: Sequence[int], adapter: str) -> list[bytes]:
    """Bits of every position's logits, computed in chunks of these sizes over and over."""
    sequence = engine.allocate(len(tokens), adapter)
    bits: list[bytes] = []
    turn = 0
    while len(bits) < len(tokens):
        chunk = tokens[len(bits) : len(bits) + sizes[turn % len(sizes)]]
        bits += _bits(engine, [Segment.chain(sequence, chunk, range(len(chunk)))])
        engine.commit(sequence, range(len(chunk)))
        turn += 1
    engine.free(sequence)
    return bits


def _tree_differing(
    engine: Engine,
    tokens: list[int],
    expected: list[bytes],
    random: np.random.Generator,
    adapter: str,
) -> int:
    """The text's last positions as a path in a tree of wrong guesses, beside another sequence."""
    depth = 8
    begin = len(tokens) - depth
    sequence, other = _filled(engine, tokens[:begin], adapter), _filled(engine, tokens[:40])
    guesses, parents, path = _tree_around(tokens[begin:], engine.info.vocab_size, random)
    neighbour = Segment(other, [1, 2, 3], [-1, -1, 0], [])
    tree = Segment(sequence, guesses, parents, path)
    found = _bits(engine, [neighbour, tree])
    engine.free(sequence)
    engine.free(other)
    return _count_differing(found, expected[begin:])


def _tree_around(
    path: list[int], vocab_size: int, random: np.random.Generator
) -> tuple[list[int], list[int], list[int]]:
    """Tokens and parents of a random tree that holds `path`, and the rows of that path."""
    spots = sorted(random.choice(_TREE_NODES, len(path), replace=False).tolist())
    tokens: list[int] = []
    parents: list[int] = []
    for row in range(_TREE_NODES):
        placed = [spot for spot in spots if spot < row]
        if row in spots:
            tokens.append(path[len(placed)])
            parents.append(placed[-1] if placed else -1)
        else:
            tokens.append(int(random.integers(vocab_size)))
            parents.append(int(random.integers(-1, row)))
    return tokens, parents, spots


def _filled(engine: Engine, tokens: list[int], adapter: str = "") -> KVSequence:
    sequence = engine.allocate(len(tokens) + _TREE_NODES, adapter)
    engine.forward([Segment.chain(sequence, tokens, [])])
    engine.commit(sequence, range(len(tokens)))
    return sequence


def _bits(engine: Engine, segments: list[Segment]) -> list[bytes]:
    """A digest of each wanted row's bits."""
    return [
        blake2b(rows[i].tobytes(), digest_size=16).digest()
        for rows in engine.forward(segments)
        for i in range(len(rows))
    ]


def _count_differing(found: list[bytes], expected: list[bytes]) -> int:
    return sum(a != b for a, b in zip(found, expected, strict=True))

"""Names of a text's beginnings: what routers and verifiers find common prefixes by.

Block i's name hashes everything up to its end, so two texts share a name exactly when they share
that beginning (128 bits: collisions are not a concern). Names are salted, so that what one tenant
computed says nothing about another's text.

Source: the chained block hashes of automatic prefix caching (Kwon et al. 2023, arXiv 2309.06180,
section 4.4, shares prefixes by pages).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 16

PAGE_TOKENS = 64
"""Positions of a page of the KV pool, of a block of exact attention and of named beginnings.

Smaller pages waste little less, larger ones share less of a common beginning
(`treecast.bench.pages`: 16 waste 18% of a pool and cost a third more accounts, 64 waste 21%; of a
system prompt of 200 tokens 64 share 96%, 128 share 64%, 256 nothing).
"""


def prefix_names(salt: str, tokens: Sequence[int], block_tokens: int) -> list[bytes]:
    """One name for each whole block of a text, the shortest beginning first.

    Args:
        salt: texts of different salts never share a name.
        tokens: token ids, each below 2**32.
        block_tokens: tokens of a block; what is left behind the last whole one has no name.
    """
    name = blake2b(salt.encode(), digest_size=DIGEST_BYTES).digest()
    names = []
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        block = array("I", tokens[end - block_tokens : end]).tobytes()
        name = blake2b(name + block, digest_size=DIGEST_BYTES).digest()
        names.append(name)
    return names

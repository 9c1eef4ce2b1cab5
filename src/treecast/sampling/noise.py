"""Gumbel noise that is a pure function of (seed, sample, position, token); no generator state.

    key  = noise_key(seed, sample index)                  64 bits
    h    = Philox4x32-10(counter = (position, token, 0, 0), key)[0]
    v    = (h + 1/2) / 2**32
    g    = the float32 nearest to -ln(-ln(1 - v))

The rounding is exact: a float64 result too close to call is settled in decimal arithmetic. So the
bits depend on no library, and numpy, torch on CPU and torch on CUDA agree. One implementation
serves all three: they share the operators, and `xp` names the module for the rest.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any
"""A numpy array or a torch tensor: numpy's types cannot name torch's, and no torch is imported."""

GUMBEL_MAX = 22.873857498168945
"""No noise is larger: that of h = 0."""
GUMBEL_MIN = -3.1299946308135986
"""No noise is smaller: that of h = 2**32 - 1."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_SPREADING_ROUNDS = 4
"""After so many, every word has the shape that all broadcast to."""
_BLOCK = 16384
"""Tokens at a time: the int64 words of this many fit a core's cache."""
_DIGITS = 50
_MARGIN = 2.0**-49
"""Of 1 + |g|: twice what errors of 4 units in the last place of both logarithms add up to."""


def noise_key(seed: int, sample_index: int = 0) -> int:
    """The 64-bit Philox key of one sample of a request.

    BLAKE2b with 8 bytes of digest over seed and sample index, 8 bytes each; all little-endian.
    """
    message = seed.to_bytes(8, "little") + sample_index.to_bytes(8, "little")
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little")


def derived_key(key: int, name: str) -> int:
    """A key whose numbers have nothing to do with those of `key`, nor of another name's."""
    message = key.to_bytes(8, "little") + name.encode()
    return int.from_bytes(blake2b(message, digest_size=8, person=b"derived").digest(), "little")


def gumbel(key: int, position: int, vocab_size: int) -> NDArray[np.float32]:
    """[vocab] float32: the noise of every token at one absolute position, as a numpy array."""
    return gumbel_of(key, position, np.arange(vocab_size))


def gumbel_of(key: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """[n] float32: the noise of some tokens at one absolute position."""
    starts = range(0, max(1, len(tokens)), _BLOCK)
    blocks = (tokens[start : start + _BLOCK] for start in starts)
    return np.concatenate([gumbel_at(key, position, block) for block in blocks])


def gumbel_at(key: int, position: int | Array, tokens: Array, xp: Any = np) -> Array:
    """Noise of tokens as numpy arrays or torch tensors, on the device where they lie.

    Args:
        key: of `noise_key`.
        position: absolute position of the token to be picked, below 2**32; or an int64 array that
            broadcasts with `tokens`.
        tokens: int64 token ids of any shape, below 2**32.
        xp: `numpy` or `torch`, whichever `tokens` belongs to.

    Returns:
        float32, of the shape that both broadcast to.
    """
    zero = tokens.reshape(-1)[:1] * 0
    words = philox4x32((zero + position, tokens, zero, zero), key)
    return _gumbel_of(words[0], xp)


def philox4x32(
    counter: tuple[Array, Array, Array, Array], key: int, rounds: int = 10
) -> tuple[Array, Array, Array, Array]:
    """Four words of Philox4x32 for each counter.

    Words are int64 arrays with values below 2**32 that broadcast; they are left alone. Products
    wrap at 64 bits, which leaves their bits right; the sign that they may get is masked away.
    """
    a, b, c, d = counter
    low, high = key & _WORD, key >> 32
    for done in range(rounds):
        if done < _SPREADING_ROUNDS:
            a, c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
            b, d = ((c >> 32) ^ b ^ low) & _WORD, ((a >> 32) ^ d ^ high) & _WORD
        else:
            a *= _MULTIPLIERS[0]
            c *= _MULTIPLIERS[1]
            _fold(b, c, low)
            _fold(d, a, high)
        a, b, c, d = b, c, d, a
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return a, b & _WORD, c, d & _WORD


def philox_of(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """The same for one counter of Python's integers, in a twentieth of the time of arrays."""
    a, b, c, d = counter
    low, high = key & _WORD, key >> 32
    for _ in range(10):
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = (right >> 32) ^ b ^ low, (left >> 32) ^ d ^ high
        b, d = right & _WORD, left & _WORD
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return a, b, c, d


def _fold(word: Array, product: Array, round_key: int) -> None:
    """The product's upper half, and the key, into a word; in place, as allocation costs more."""
    word ^= product >> 32
    word ^= round_key
    word &= _WORD


def _gumbel_of(
    hashed: Array,  # int64, below 2**32
    xp: Any,
) -> Array:
    uniform = (xp.asarray(hashed, dtype=xp.float64) + 0.5) * 2.0**-32
    wide = -xp.log(-xp.log1p(-uniform))
    margin = (abs(wide) + 1.0) * _MARGIN
    nearest = xp.asarray(wide - margin, dtype=xp.float32)
    unsure = nearest != xp.asarray(wide + margin, dtype=xp.float32)
    for index in xp.argwhere(unsure):
        nearest[tuple(index)] = exact_gumbel(int(hashed[tuple(index)]))
    return nearest


def exact_gumbel(hashed: int) -> float:
    """The float32 nearest to -ln(-ln(1 - v)) for v = (hashed + 1/2) / 2**32."""
    with localcontext(prec=_DIGITS):
        survival = Decimal(2**33 - 2 * hashed - 1) / 2**33
        exact = -(-survival.ln()).ln()
        guess = np.float32(exact)
        near = (np.nextafter(guess, np.float32(side)) for side in (-100, guess, 100))
        return float(min(near, key=lambda value: abs(Decimal(float(value)) - exact)))

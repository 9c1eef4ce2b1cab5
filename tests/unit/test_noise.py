"""The noise's bits, against published vectors, slow oracles and other libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from treecast.sampling import noise
from treecast.sampling.noise import (
    GUMBEL_MAX,
    GUMBEL_MIN,
    exact_gumbel,
    gumbel,
    gumbel_at,
    gumbel_of,
    noise_key,
    philox4x32,
    philox_of,
)

VECTORS = json.loads((Path(__file__).parent / "noise_vectors.json").read_text())["vectors"]
WORD = 0xFFFFFFFF
VOCAB = 49152


@pytest.fixture
def torch() -> Iterator[Any]:
    """Torch on one thread, as these arrays are small."""
    module = pytest.importorskip("torch")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_when_given_random123s_vectors(
    counter: str, key: str, expected: str
) -> None:
    low, high = words(key)
    a, b, c, d = (np.array([word]) for word in words(counter))
    assert [int(word[0]) for word in philox4x32((a, b, c, d), high << 32 | low)] == words(expected)
    first, second, third, fourth = words(counter)
    assert list(philox_of((first, second, third, fourth), high << 32 | low)) == words(expected)


def slow_philox(counter: list[int], key: int) -> int:
    """The first word by Python's integers, straight from the paper's figure."""
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ k0,
            second & WORD,
            (first >> 32) ^ counter[3] ^ k1,
            first & WORD,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return counter[0]


def test_philox_equals_the_slow_one_when_words_are_random() -> None:
    rng = np.random.default_rng(1)
    counter = rng.integers(0, 2**32, (4, 200))
    key = int(rng.integers(0, 2**63)) * 2 + 1
    a, b, c, d = counter
    fast = philox4x32((a, b, c, d), key)[0]
    assert fast.tolist() == [slow_philox(list(map(int, column)), key) for column in counter.T]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['key']}-{v['position']}")
def test_noise_equals_the_published_vector(vector: dict[str, Any]) -> None:
    key = noise_key(int(vector["seed"]), int(vector["sample_index"]))
    assert f"{key:016x}" == vector["key"]
    noise = gumbel_of(key, vector["position"], np.array([vector["token"]]))
    assert float(noise[0]).hex() == vector["gumbel"]
    assert exact_gumbel(int(vector["hashed"], 16)).hex() == vector["gumbel"]


def nearest_float32(hashed: int) -> float:
    """The definition, by mpmath at 300 bits."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workprec(300):
        exact = -mpmath.log(-mpmath.log(1 - (mpmath.mpf(hashed) + 0.5) / 2**32))
        guess = np.float32(float(exact))
        near = [np.nextafter(guess, np.float32(s)) for s in (-1e9, guess, 1e9)]
        return float(min(near, key=lambda f: abs(mpmath.mpf(float(f)) - exact)))


EDGES = [0, 1, 2, 2**31 - 1, 2**31, 2714937127, 2714937128, 2**32 - 2, 2**32 - 1]


def rounded_gumbel(hashed: NDArray[np.int64]) -> Any:
    return noise._gumbel_of(hashed, np)


def test_rounding_is_to_the_nearest_when_values_are_random_or_extreme() -> None:
    hashed = np.concatenate([EDGES, np.random.default_rng(2).integers(0, 2**32, 1500)])
    expected = [nearest_float32(h) for h in hashed.tolist()]
    assert rounded_gumbel(hashed).tolist() == expected
    assert [exact_gumbel(h) for h in hashed.tolist()] == expected


HARD = [2713538581, 2714081200, 2714166237, 2714514348, 2714929646, 2714937016]
HARD += [2714937049, 2714937086, 2714937106, 2714937120, 2714937127, 2714937128]


def test_rounding_is_to_the_nearest_when_float64_cannot_tell() -> None:
    """Near g = 0 a logarithm's last bit decides: rounding float64 results gets some wrong."""
    assert rounded_gumbel(np.array(HARD)).tolist() == [nearest_float32(h) for h in HARD]


def test_rounding_is_to_the_nearest_by_torch_when_float64_cannot_tell(torch: Any) -> None:
    by_torch = noise._gumbel_of(torch.tensor(HARD), torch)
    assert by_torch.tolist() == [nearest_float32(h) for h in HARD]


def test_bounds_hold_when_the_hash_is_extreme() -> None:
    assert exact_gumbel(0) == GUMBEL_MAX
    assert exact_gumbel(2**32 - 1) == GUMBEL_MIN


def test_noise_falls_when_the_hash_grows() -> None:
    hashed = np.arange(0, 2**32, 65537)
    assert (np.diff(rounded_gumbel(hashed)) <= 0).all()


def test_noise_of_a_row_equals_that_of_its_tokens_when_computed_in_blocks() -> None:
    row = gumbel(7, 3, VOCAB)
    some = np.array([0, 16383, 16384, 32768, VOCAB - 1])
    assert row.dtype == np.float32
    assert gumbel_of(7, 3, some).tolist() == row[some].tolist()
    assert gumbel_of(7, 3, some[:0]).shape == (0,)


def test_noise_of_many_positions_equals_that_of_each_when_broadcast() -> None:
    positions = np.arange(5)[:, None]
    together = gumbel_at(7, positions, np.arange(11)[None, :])
    assert together.tolist() == [gumbel(7, position, 11).tolist() for position in range(5)]


def test_noise_has_the_same_bits_when_computed_by_torch(torch: Any) -> None:
    tokens = torch.arange(VOCAB)
    for sample in range(2):
        key = noise_key(2024, sample)
        for position in [*range(12), 2047, 131071]:
            by_torch = gumbel_at(key, position, tokens, torch)
            assert by_torch.dtype == torch.float32
            by_numpy = gumbel(key, position, VOCAB)
            assert (by_torch.numpy().view(np.int32) == by_numpy.view(np.int32)).all()


def test_noise_is_gumbel_distributed_when_drawn_over_tokens_or_positions() -> None:
    over_tokens = gumbel(noise_key(5), 100, VOCAB)
    over_positions = gumbel_at(noise_key(5), np.arange(VOCAB), np.full(VOCAB, 31))
    assert stats.kstest(over_tokens, "gumbel_r").pvalue > 1e-3
    assert stats.kstest(over_positions, "gumbel_r").pvalue > 1e-3
    assert stats.kstest(over_tokens * np.float32(1.05), "gumbel_r").pvalue < 1e-3


@pytest.mark.parametrize(
    ("key", "position"),
    [(noise_key(5), 101), (noise_key(6), 100), (noise_key(5, 1), 100)],
    ids=["next position", "next seed", "next sample"],
)
def test_noise_is_uncorrelated_when_position_seed_or_sample_differs(
    key: int, position: int
) -> None:
    one, other = gumbel(noise_key(5), 100, VOCAB), gumbel(key, position, VOCAB)
    assert stats.spearmanr(one, other).pvalue > 1e-3

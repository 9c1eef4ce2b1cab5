"""When an output ends, and how much of its text goes with the stop."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from treecast.sampling.params import SamplingParams
from treecast.sampling.stops import FinishReason, Stop, StopRules

TEXT = [b"a", b"b", b"\n", b"ab\n", b"\xe2", b"\x82", b"\xac", b"", b"x\ny", b"STOP", b"\xff"]
"""Bytes of each token id."""


def decode(tokens: Sequence[int]) -> str:
    return b"".join(TEXT[token] for token in tokens).decode(errors="replace")


def ends(tokens: Sequence[int], rules: StopRules) -> tuple[int, Stop] | None:
    """How many tokens the output has when it ends, and why."""
    for count, token in enumerate(tokens, start=1):
        if stop := rules.check(token):
            return count, stop
    return None


def test_output_ends_with_eos_unless_it_is_ignored() -> None:
    tokens = [0, 1, 7, 0, 0]
    ended = ends(tokens, StopRules({7}, SamplingParams()))
    assert ended == (3, Stop(FinishReason.STOP_TOKEN))
    assert ends(tokens, StopRules({7}, SamplingParams(ignore_eos=True))) is None


def test_output_ends_with_a_stop_id_even_when_eos_is_ignored() -> None:
    sampling = SamplingParams(ignore_eos=True, stop_token_ids=(1,))
    assert ends([0, 0, 1], StopRules({0}, sampling)) == (3, Stop(FinishReason.STOP_TOKEN))


def test_output_ends_at_its_length_and_a_stop_token_there_is_named_first() -> None:
    sampling = SamplingParams(max_tokens=2)
    assert ends([0, 0, 0], StopRules((), sampling)) == (2, Stop(FinishReason.LENGTH))
    assert ends([0, 5, 0], StopRules({5}, sampling)) == (2, Stop(FinishReason.STOP_TOKEN))


@pytest.mark.parametrize(
    ("stop", "tokens", "expected"),
    [
        (("\n",), [0, 1, 2, 0], (3, 1)),
        (("b\n",), [0, 1, 2, 0], (3, 2)),
        (("\n",), [0, 3, 0], (2, 1)),
        (("\n",), [0, 8], (2, 2)),
        (("aab",), [1, 0, 0, 0, 1], (5, 3)),
        (("€",), [0, 4, 5, 6, 0], (4, 1)),
        (("a€b",), [0, 4, 5, 6, 1], (5, 3)),
        (("zz", "ab", "b"), [0, 0, 1], (3, 2)),
        (("b",), [0, 7, 7, 1], (4, 1)),
        (("\n",), [10, 10, 2], (3, 1)),
        (("c",), [0, 1, 2, 3], None),
    ],
    ids=[
        "its own token",
        "over two tokens",
        "at the end of a token",
        "inside a token: what lies behind it goes too",
        "after a false start",
        "a character of three tokens",
        "around a character of three tokens",
        "the stop that begins first",
        "behind tokens without text",
        "behind bytes that are no text",
        "not there",
    ],
)
def test_output_ends_with_the_token_that_completes_a_stop_string(
    stop: tuple[str, ...], tokens: list[int], expected: tuple[int, int] | None
) -> None:
    ended = ends(tokens, StopRules((), SamplingParams(stop=stop), decode))
    assert ended == (expected and (expected[0], Stop(FinishReason.STOP_STRING, expected[1])))


def test_stop_string_is_found_when_bytes_never_become_text() -> None:
    tokens = [4] * 16 + [9]
    ended = ends(tokens, StopRules((), SamplingParams(stop=("STOP",)), decode))
    assert ended == (17, Stop(FinishReason.STOP_STRING, 4))


def test_stop_string_is_found_when_a_space_shows_only_behind_other_text() -> None:
    """Some tokenizers drop the space before the first word of what they decode."""
    words = [" a", " b", ""]

    def decode_words(tokens: Sequence[int]) -> str:
        return "".join(words[token] for token in tokens).removeprefix(" ")

    rules = StopRules((), SamplingParams(stop=("a b",)), decode_words)
    assert ends([0, 2, 1], rules) == (3, Stop(FinishReason.STOP_STRING, 3))


def test_stop_strings_have_no_effect_when_there_is_no_tokenizer() -> None:
    assert ends([0, 2, 2], StopRules((), SamplingParams(stop=("\n",)))) is None


def test_stop_string_search_equals_that_of_the_whole_text_when_tokens_are_random() -> None:
    source = random.Random(4)
    for _ in range(300):
        tokens = source.choices([0, 1, 2, 3, 8], k=30)
        stops = tuple("".join(source.choices("ab\nxy", k=source.randint(1, 4))) for _ in range(2))
        expected = None
        for count in range(1, len(tokens) + 1):
            text = decode(tokens[:count])
            starts = [text.index(stop) for stop in stops if stop in text]
            if starts:
                expected = (count, Stop(FinishReason.STOP_STRING, len(text) - min(starts)))
                break
        assert ends(tokens, StopRules((), SamplingParams(stop=stops), decode)) == expected

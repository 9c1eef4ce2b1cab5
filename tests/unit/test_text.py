"""Text to tokens and back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treecast.errors import InvalidRequest, PromptTooLong, Unavailable
from treecast.sampling.params import SamplingParams
from treecast.sampling.stops import StopRules
from treecast.services.router.text import ChatMessage, ModelText, Room, TextCache
from treecast.text.detok import MAX_OPEN, REPLACEMENT, Decode, DetokStream
from treecast.text.tokenizer import TokenizerFiles

from ..byte_tokenizer import (
    BOS,
    EOS,
    SPECIAL_TOKENS,
    TEMPLATE,
    byte_tokenizer,
    sentencepiece_like,
    word_tokenizer,
)

BYTES = byte_tokenizer()
PIECES = sentencepiece_like()
FILES = TokenizerFiles(BYTES.to_str().encode(), TEMPLATE, SPECIAL_TOKENS)
TEXT = ModelText("m", FILES)
NO_TOKENIZER = ModelText("toy", TokenizerFiles())
ROOM = Room(512)
WORDS = ["to", "be", "or", " ", "  ", ",", "é", "日", "🙂", "tobeor"]


def decode(ids: Sequence[int]) -> str:
    return BYTES.decode(ids)


def stream(*stop: str) -> DetokStream:
    return DetokStream(decode, stop)


# --- prompts ----------------------------------------------------------------------------------


def test_text_gets_the_tokenizers_special_tokens() -> None:
    assert TEXT.encode_text("hé", ROOM) == (BOS, 0x68, 0xC3, 0xA9)


def test_chat_is_written_by_the_template_and_gets_no_further_tokens() -> None:
    chat = [ChatMessage("system", "x"), ChatMessage("user", "y")]
    assert TEXT.encode_chat(chat, ROOM) == (BOS, *b"s:x;u:y;a:")


def test_truncation_of_the_training_is_off_when_a_prompt_is_long() -> None:
    trained = byte_tokenizer()
    trained.enable_truncation(4)
    trained.enable_padding(length=8)
    text = ModelText("m", replace(FILES, definition=trained.to_str().encode()))
    assert text.encode_text("abcdef", ROOM) == (BOS, *b"abcdef")
    assert text.encode_text("ab", ROOM) == (BOS, *b"ab")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: TEXT.encode_text("", ROOM), "prompt is empty"),
        (lambda: TEXT.encode_chat([], ROOM), "prompt is empty"),
        (
            lambda: TEXT.encode_chat([ChatMessage("robot", "x")], ROOM),
            "role is 'robot'; allowed: system, user, assistant",
        ),
        (
            lambda: NO_TOKENIZER.encode_text("x", ROOM),
            "model 'toy' has no tokenizer; send the prompt as token ids",
        ),
        (
            lambda: NO_TOKENIZER.encode_chat([ChatMessage("user", "x")], ROOM),
            "model 'toy' has no chat template; send text or token ids",
        ),
        (
            lambda: NO_TOKENIZER.detokenizer(["x"]),
            "model 'toy' has no tokenizer; stop strings need one",
        ),
    ],
)
def test_prompt_is_refused_by_name_when_it_cannot_be_encoded(ask, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidRequest) as refusal:
        ask()
    assert refusal.value.message == message


def test_text_is_refused_unread_when_no_tokens_of_it_can_fit() -> None:
    assert len(TEXT.encode_text("x" * 2048, ROOM)) == 2049  # too many, but "</s>" is a token too
    why = "prompt has 2049 characters; the limit is 512 tokens, which have 2048 at most"
    with pytest.raises(PromptTooLong, match=f"^{why}$"):
        TEXT.encode_text("x" * 2049, ROOM)
    with pytest.raises(PromptTooLong, match=r"^prompt has 2057 characters; the limit is 512"):
        TEXT.encode_chat([ChatMessage("user", "x" * 2049)], ROOM)


@given(
    st.lists(
        st.sampled_from(["to", "be", "or", " ", "  ", ",", "é", "日", "🙂", "tobeor"]), max_size=40
    )
)
def test_last_tokens_are_those_of_the_whole_text_when_it_is_cut(words: list[str]) -> None:
    text = ModelText("m", TokenizerFiles(word_tokenizer().to_str().encode()))
    written = "".join(words) * 50 + "to be"
    whole = text.encode_text(written, Room(len(written.encode())))
    cut = text.encode_text(written, Room(16, truncates=True))
    assert len(cut) <= (16 + 64) * 3 * 4  # characters of three letters, of four bytes each
    assert cut[-16:] == whole[-16:]


def test_others_run_while_a_long_text_is_encoded() -> None:
    began, ticks = threading.Event(), 0

    def encode() -> None:
        began.set()
        TEXT.encode_text("x" * 1_000_000, Room(500_000))

    encoder = threading.Thread(target=encode)
    encoder.start()
    began.wait()
    while encoder.is_alive():
        time.sleep(0)
        ticks += 1
    assert ticks > 1000


def chat_with(template: str) -> str:
    text = ModelText("m", replace(FILES, chat_template=template))
    ids = text.encode_chat([ChatMessage("user", "<é>")], ROOM)
    return BYTES.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{% for m in messages %}a{% break %}b{% endfor %}c", "ac"),
        ("x{% generation %}{{ eos_token }}y{% endgeneration %}z", "x</s>yz"),
        ("a\n{% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{{ tools is none }}{{ strftime_now('%%') }}", "True%"),
    ],
    ids=["tojson", "loop controls", "generation", "white space", "names"],
)
def test_template_can_use_what_models_expect(template: str, written: str) -> None:
    assert chat_with(template) == written


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("{{ missing.name }}", "'missing' is undefined"),
    ],
)
def test_request_is_refused_when_its_template_fails(template: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^chat template refuses the messages: ") as refusal:
        chat_with(template)
    assert why in refusal.value.message


# --- output -----------------------------------------------------------------------------------


def test_character_comes_out_whole_when_its_bytes_come_apart() -> None:
    out = stream()
    assert [out.push([byte]) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert out.finish() == ""


def test_mark_stands_for_a_character_that_never_got_its_bytes() -> None:
    out = stream()
    assert out.push([*b"a", 0xE2, 0x82]) == "a"
    assert out.finish() == "\N{REPLACEMENT CHARACTER}"


def test_text_goes_on_when_the_output_is_nothing_but_broken_bytes() -> None:
    out = stream()
    given_out = out.push([0x80] * 100)
    assert given_out == "\N{REPLACEMENT CHARACTER}" * 97
    assert given_out + out.finish() == decode([0x80] * 100)


def test_special_tokens_are_left_out() -> None:
    assert TEXT.detokenizer([]).push([*b"a", EOS, *b"b", BOS]) == "ab"


def test_few_tokens_are_decoded_at_a_time_when_the_output_is_long() -> None:
    longest = 0

    def decode_and_measure(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    assert DetokStream(decode_and_measure).push("aé€".encode() * 100) == "aé€" * 100
    assert longest <= 6


@pytest.mark.parametrize(
    "run", [[EOS], [0x80], [0xE2, 0x82], [0xC3, EOS]], ids=["silent", "marks", "open", "both"]
)
def test_work_per_token_is_bounded_when_no_text_is_whole_for_long(run: list[int]) -> None:
    decoded = 0

    def decode_and_count(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    tokens = [*b"a", *run * 2000]
    out = DetokStream(decode_and_count)
    assert out.push(tokens) + out.finish() == decode(tokens)
    assert decoded < 30 * len(tokens)


class GrowingWindow:
    """The slow oracle: as `_Pieces`, with a window that only whole text shortens."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_first = 0
        self._given = 0

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        marks = len(text) - len(text.rstrip(REPLACEMENT))
        long = len(self._window) - self._num_first > MAX_OPEN
        whole = len(text) - (min(marks, MAX_OPEN) if long else marks)
        piece = text[self._given : whole]
        self._given = max(self._given, whole)
        if piece and whole == len(text):
            self._window = self._window[self._num_first :]
            self._num_first = len(self._window)
            self._given = len(self._decode(self._window))
        return piece

    def rest(self) -> str:
        return self._decode(self._window)[self._given :]


PARTS = [[byte] for byte in (0x80, 0xAC, 0xC3, 0xE2, 0xF0, 0x9F, *b"ab")]
PARTS += [list(text.encode()) for text in ("é", "€", "🙂")]
PARTS += [[0xE2, 0x82], [0xF0, 0x9F, 0x98]]
runs = st.tuples(st.sampled_from([*PARTS, [BOS], [EOS]]), st.sampled_from([1, 2, 3, 40]))
runs_of_bytes = st.tuples(st.sampled_from(PARTS), st.sampled_from([1, 2, 3, 40]))


def is_that_of_a_growing_window(decode: Decode, tokens: list[int]) -> bool:
    out, oracle = DetokStream(decode), GrowingWindow(decode)
    expected = "".join([*(oracle.push(token) for token in tokens), oracle.rest()])
    return "".join([*(out.push([token]) for token in tokens), out.finish()]) == expected


@given(st.lists(runs, max_size=6))
def test_text_is_that_of_a_growing_window_when_a_run_is_long(
    parts: list[tuple[list[int], int]],
) -> None:
    tokens = [token for part, times in parts for token in part * times]
    assert is_that_of_a_growing_window(decode, tokens)


@given(st.lists(runs_of_bytes, max_size=6), st.lists(st.sampled_from(["▁", "▁to", "or"])))
def test_text_is_that_of_a_growing_window_when_a_run_of_bytes_is_one_to_the_decoder(
    parts: list[tuple[list[int], int]], words: list[str]
) -> None:
    spelt = [f"<0x{byte:02X}>" for part, times in parts for byte in part * times]
    tokens = [PIECES.token_to_id(piece) for piece in [*words, *spelt, *words, *spelt]]
    assert is_that_of_a_growing_window(PIECES.decode, tokens)


def test_stop_string_is_held_back_until_it_is_not_one() -> None:
    out = stream("END", "EXIT")
    assert [out.push([byte]) for byte in b"xENxEXyE"] == ["x", "", "", "ENx", "", "", "EXy", ""]
    assert out.finish() == "E"


def test_stop_string_and_what_follows_it_in_the_last_token_are_cut() -> None:
    out = stream("END")
    assert out.push(b"abEND!") == "ab"
    assert out.finish(stop_characters=4) == ""


def test_text_before_the_stop_string_comes_out_at_the_end_when_it_was_held() -> None:
    out = stream("aab")
    assert out.push(b"xaaab") == "xa"
    assert out.finish(stop_characters=3) == ""
    out = stream("aab", "b")
    assert out.push(b"xaaab") == "xa"
    assert out.finish(stop_characters=1) == "aa"


def test_first_space_is_the_decoders_own_when_words_carry_theirs() -> None:
    def ids(*pieces: str) -> list[int]:
        return [PIECES.token_to_id(piece) for piece in pieces]

    out = DetokStream(PIECES.decode)
    tokens = ids("▁to", "▁be", "▁", "or", "<0xE2>", "<0x82>", "<0xAC>", "▁to")
    deltas = [out.push([token]) for token in tokens]
    assert deltas == ["to", " be", " ", "or", "", "", "€", " to"]


def test_output_has_no_text_when_the_model_has_no_tokenizer() -> None:
    out = NO_TOKENIZER.detokenizer([])
    assert out.push([1, 2, 3]) == ""
    assert out.finish() == ""


outputs = st.lists(
    st.one_of(
        st.integers(0, EOS),
        st.sampled_from([0x80, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, BOS, EOS, *b"ab"]),
    ),
    max_size=40,
)


@given(outputs, st.lists(st.integers(0, 40), max_size=5))
def test_deltas_add_up_to_the_whole_text_however_tokens_are_grouped(
    tokens: list[int], cuts: list[int]
) -> None:
    out, bounds = stream(), sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    groups = [tokens[a:b] for a, b in pairwise(bounds)]
    assert "".join([*map(out.push, groups), out.finish()]) == decode(tokens)


@given(st.text(max_size=12).filter(lambda text: not text.startswith(" ")))
def test_deltas_add_up_to_the_text_when_bytes_stand_for_unknown_characters(text: str) -> None:
    tokens = [PIECES.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    out = DetokStream(PIECES.decode)
    assert "".join([*(out.push([token]) for token in tokens), out.finish()]) == text


@given(outputs, st.integers(0, 40), st.sampled_from([(), ("ab",), ("aba", "b")]))
def test_text_goes_on_seamlessly_when_another_router_takes_over(
    tokens: list[int], cut: int, stop: tuple[str, ...]
) -> None:
    first, second = stream(*stop), stream(*stop)
    delivered = first.push(tokens[:cut])
    assert second.push(tokens[:cut]) == delivered
    rest = second.push(tokens[cut:]) + second.finish()
    whole = stream(*stop)
    assert delivered + rest == whole.push(tokens) + whole.finish() == decode(tokens)


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_could_belong_to_a_stop_string(
    text: str, stop: list[str]
) -> None:
    out = stream(*stop)

    def may_stop_from(start: int) -> bool:
        return any(text.startswith(one, start) or one.startswith(text[start:]) for one in stop)

    held_from = next((at for at in range(len(text)) if may_stop_from(at)), len(text))
    assert out.push(text.encode()) == text[:held_from]


SPELLINGS = [b"a", b"b", b"ab", b"b\xe2", b"\x82", b"\xac", b"\xaca", b"\xff", b""]


def spell(tokens: Sequence[int]) -> str:
    return b"".join(SPELLINGS[token] for token in tokens).decode(errors="replace")


@given(
    st.lists(st.integers(0, len(SPELLINGS) - 1), max_size=20),
    st.lists(st.sampled_from(["ab", "b", "€", "€a", "aa"]), min_size=1, max_size=2),
)
def test_text_ends_before_the_stop_string_when_a_verifier_found_it(
    tokens: list[int], stop: list[str]
) -> None:
    """What one side finds the other side cuts, though a token may end within a character."""
    rules = StopRules((), SamplingParams(stop=tuple(stop)), spell)
    out, text = DetokStream(spell, stop), ""
    for count, token in enumerate(tokens, start=1):
        text += out.push([token])
        if end := rules.check(token):
            whole = spell(tokens[:count])
            first = min(at for one in stop if (at := whole.find(one)) >= 0)
            assert text + out.finish(end.characters) == whole[:first]
            return
    assert text + out.finish() == spell(tokens)
    assert not any(one in spell(tokens) for one in stop)


# --- cache ------------------------------------------------------------------------------------


async def test_files_are_fetched_once_when_requests_come_together() -> None:
    fetches = 0

    async def fetch() -> TokenizerFiles:
        nonlocal fetches
        fetches += 1
        await asyncio.sleep(0)
        return FILES

    cache = TextCache()
    texts = await asyncio.gather(*(cache.get("m", "r1", fetch) for _ in range(3)))
    assert fetches == 1
    assert texts[0] is texts[1] is texts[2]
    assert await cache.get("m", "r2", fetch) is not texts[0]
    assert fetches == 2


async def test_files_are_fetched_again_when_the_first_fetch_failed() -> None:
    async def fail() -> TokenizerFiles:
        raise Unavailable("gone")

    async def fetch() -> TokenizerFiles:
        return FILES

    cache = TextCache()
    with pytest.raises(Unavailable, match="gone"):
        await cache.get("m", "r1", fail)
    assert (await cache.get("m", "r1", fetch)).encode_text("a", ROOM) == (BOS, 0x61)


async def test_others_get_their_files_when_the_first_to_ask_goes_away() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def fetch() -> TokenizerFiles:
        asked.set()
        await answer.wait()
        return FILES

    cache = TextCache()
    first = asyncio.create_task(cache.get("m", "r1", fetch))
    await asked.wait()
    second = asyncio.create_task(cache.get("m", "r1", fetch))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    answer.set()
    assert (await second).encode_text("a", ROOM) == (BOS, 0x61)


# --- the default model ------------------------------------------------------------------------


@pytest.mark.model
def test_prompts_are_tokenised_as_transformers_does_when_the_model_is_smollm2() -> None:
    import transformers

    from treecast.checkpoints import ensure_default_target

    folder = ensure_default_target()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = ModelText("smollm2", TokenizerFiles.read(folder))
    chats = [
        [ChatMessage("user", "Hi! How are you? 日本 🙂")],
        [ChatMessage("system", "Be <brief>."), ChatMessage("user", "  x\n")],
        [ChatMessage("user", "a"), ChatMessage("assistant", "b"), ChatMessage("user", "c")],
    ]
    for chat in chats:
        messages = [{"role": one.role, "content": one.content} for one in chat]
        expected = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert list(ours.encode_chat(chat, ROOM)) == expected
    for text in ("Once upon a time", "def f(x):\n    return x\n", "naïve façade 🙂"):
        assert list(ours.encode_text(text, ROOM)) == theirs(text)["input_ids"]

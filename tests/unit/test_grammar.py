"""Constrained decoding on the toy model: masks at every pick, whatever drafted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import jsonschema
import pytest

from treecast.decoding.local import generate
from treecast.drafting.base import Drafter
from treecast.drafting.growth import BestFirst, ExpansionVector
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.ssm import SSMDrafter
from treecast.engine.toy import ToyEngine
from treecast.errors import InvalidRequest, TreecastError
from treecast.sampling.grammar import Grammars, draft_matcher, matcher_for
from treecast.sampling.noise import noise_key
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.sampling.stops import FinishReason
from treecast.sampling.transforms import Context
from treecast.tree import TokenTree
from treecast.wire.codec.messages import decode_sampling, encode_sampling

from ..byte_tokenizer import EOS, byte_tokenizer
from .toy_drafter import ToyDrafter

VOCAB = 258
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
PROMPT = [1, 2]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    made = Grammars.for_model(byte_tokenizer().to_str().encode(), [EOS], VOCAB)
    assert made is not None
    return made


def engine() -> ToyEngine:
    return ToyEngine(vocab_size=VOCAB, eos_token_ids=[EOS])


def text(tokens: list[int]) -> str:
    assert tokens[-1] == EOS
    return bytes(tokens[:-1]).decode()


DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "none": lambda: None,
    "a draft model": lambda: SSMDrafter(engine(), BestFirst()),
    "two and a lookup": lambda: MergedDrafter(
        [SSMDrafter(engine(), ExpansionVector((2, 2))), SSMDrafter(engine(), BestFirst(), name="b"),
         NgramDrafter()]
    ),
    "one that knows no grammar": lambda: ToyDrafter(vocab_size=VOCAB),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_output_is_valid_and_that_of_plain_decoding_when_constrained(
    drafter: str, temperature: float, grammars: Grammars
) -> None:
    for seed in range(3):
        sampling = SamplingParams(temperature=temperature, max_tokens=140, json_schema=SCHEMA)
        key = noise_key(seed)
        plain = generate(engine(), PROMPT, sampling, key, grammars=grammars)
        done = generate(engine(), PROMPT, sampling, key, DRAFTERS[drafter](), grammars=grammars)
        assert done.tokens == plain.tokens
        jsonschema.validate(json.loads(text(done.tokens)), SCHEMA)
        assert done.stop is not None
        assert done.stop.reason is FinishReason.STOP_TOKEN


def test_output_is_no_json_when_nothing_masks_it() -> None:
    """The negative control."""
    done = generate(engine(), PROMPT, SamplingParams(max_tokens=60), noise_key(0))
    with pytest.raises(ValueError, match=r"."):
        json.loads(bytes(token for token in done.tokens if token < 256).decode(errors="replace"))


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[a-f]{3}-[0-9]{1,4}x"}, r"[a-f]{3}-[0-9]{1,4}x"),
        ({"grammar": "start: /(ab){1,3}/"}, "(ab)+"),
    ],
)
def test_output_matches_when_a_regex_or_grammar_is_given(
    constraint: dict[str, str], pattern: str, grammars: Grammars
) -> None:
    sampling = SamplingParams(max_tokens=100, **constraint)  # type: ignore[arg-type]
    done = generate(engine(), PROMPT, sampling, noise_key(1), grammars=grammars)
    assert re.fullmatch(pattern, text(done.tokens))


def test_no_masked_token_is_proposed_when_a_draft_model_knows_the_grammar(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = SamplingParams(temperature=1, max_tokens=140, json_schema=SCHEMA)
    drafter = SSMDrafter(engine(), ExpansionVector((3, 2, 1)))
    trees: list[tuple[list[int], TokenTree]] = []
    draft, commit, committed = drafter.draft, drafter.commit, []

    def kept(budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        grown = draft(budgets, tokens_per_s)
        trees.extend((list(committed), tree) for tree in grown.values())
        return grown

    def told(handle: int, tokens: list[int]) -> None:
        committed.extend(tokens)
        commit(handle, tokens)

    monkeypatch.setattr(drafter, "draft", kept)
    monkeypatch.setattr(drafter, "commit", told)
    generate(engine(), PROMPT, sampling, noise_key(2), drafter, grammars=grammars)
    assert sum(len(tree) for _, tree in trees) > 20
    for before, tree in trees:
        for node, token in enumerate(tree.tokens):
            *path, last = tree.sequence(node)
            matcher = grammars.matcher(sampling)
            for step in before:
                matcher.accept(step)
            assert matcher.allowed(path)[token], (before, path, last)


def test_output_is_valid_under_the_law_mss(grammars: Grammars) -> None:
    sampling = SamplingParams(temperature=1, max_tokens=140, json_schema=SCHEMA)
    asked = SpeculationParams.of(Law.MSS, growth="<2,2>")
    drafter = SSMDrafter(engine(), ExpansionVector((2, 2)))
    for seed in range(3):
        key = noise_key(seed)
        done = generate(
            engine(), PROMPT, sampling, key, drafter, speculation=asked, grammars=grammars
        )
        jsonschema.validate(json.loads(text(done.tokens)), SCHEMA)


def test_asking_along_a_path_changes_nothing(grammars: Grammars) -> None:
    matcher = grammars.matcher(SamplingParams(regex="ab|ac"))
    a, b, c = b"abc"
    assert matcher.allowed().nonzero()[0].tolist() == [a]
    assert matcher.allowed([a]).nonzero()[0].tolist() == [b, c]
    assert matcher.allowed([a, b]).nonzero()[0].tolist() == [EOS]
    assert not matcher.allowed([b]).any()
    assert not matcher.allowed([a, a]).any()
    other = matcher.copy()
    other.accept(a)
    assert matcher.allowed().nonzero()[0].tolist() == [a]


def test_a_text_goes_on_where_it_was_cut_when_output_is_given_back(grammars: Grammars) -> None:
    sampling = SamplingParams(regex="abc")
    context = Context(PROMPT, b"ab", grammars.matcher(sampling))
    assert context.masked(engine_row()).argmax() == ord("c")
    with pytest.raises(InvalidRequest, match="token 120 does not follow the text in its grammar"):
        Context(PROMPT, b"ax", grammars.matcher(sampling))


def engine_row():  # type: ignore[no-untyped-def]
    import numpy as np

    return np.zeros(VOCAB, dtype=np.float32)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"json_schema": '{"type": '}, "json_schema of 9 characters cannot be used"),
        ({"json_schema": {"type": "no such type"}}, "json_schema .* no such type"),
        ({"regex": "(a"}, "regex of 2 characters cannot be used: .*unclosed group"),
        ({"grammar": "start: nothing"}, "grammar of 14 characters cannot be used"),
    ],
)
def test_a_malformed_constraint_is_refused_by_name(
    constraint: dict[str, str], message: str, grammars: Grammars
) -> None:
    sampling = SamplingParams(**constraint)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=f"(?s){message}"):
        matcher_for(grammars, sampling)
    assert draft_matcher(grammars, sampling) is None


AMBIGUOUS = 'start: s\ns: s s | s s s | "a" | \n'


def test_a_text_is_refused_by_name_when_its_grammar_is_too_ambiguous(grammars: Grammars) -> None:
    sampling = SamplingParams(grammar=AMBIGUOUS)
    with pytest.raises(InvalidRequest, match=r"cannot be followed in its grammar: .*; max is 500"):
        Context(PROMPT, b"a" * 110, grammars.matcher(sampling))
    matcher = grammars.matcher(sampling)
    with pytest.raises(InvalidRequest, match=r"cannot be followed in its grammar: .*; max is 500"):
        matcher.allowed(b"a" * 110)
    with pytest.raises(InvalidRequest, match="cannot be followed"):
        matcher.allowed()


@pytest.mark.parametrize("num_optional", [10, 100])
def test_large_objects_can_be_followed_when_their_properties_are_optional(
    num_optional: int, grammars: Grammars
) -> None:
    names = [f"property_{k}" for k in range(num_optional)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    matcher = grammars.matcher(SamplingParams(json_schema=schema))
    for token in json.dumps(dict.fromkeys(names, "x")).encode():
        assert matcher.allowed()[token]
        matcher.accept(token)
    assert matcher.allowed()[EOS]


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "a", "grammar": "b"}, "constraint is regex and grammar; allowed: one of them"),
        ({"regex": "a" * 65537}, "number of characters in regex is 65537; allowed: at most 65536"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos is True; allowed: False beside regex"),
    ],
)
def test_a_constraint_out_of_bounds_is_refused(constraint: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**constraint)  # type: ignore[arg-type]


def test_a_constraint_is_refused_where_nothing_can_keep_it() -> None:
    with pytest.raises(TreecastError, match=r"regex cannot be kept here: it needs .* llguidance"):
        matcher_for(None, SamplingParams(regex="a"))
    assert matcher_for(None, SamplingParams()) is None


def test_there_are_no_grammars_where_the_tokenizer_does_not_fit_the_model() -> None:
    definition = byte_tokenizer().to_str().encode()
    assert Grammars.for_model(definition, [EOS], 97) is None
    assert Grammars.for_model(b"", [EOS], VOCAB) is None
    assert Grammars.for_model(definition, [], VOCAB) is None


@pytest.mark.parametrize("kind", ["json_schema", "regex", "grammar"])
def test_a_constraint_crosses_the_wire(kind: str) -> None:
    sampling = SamplingParams(**{kind: '{"type": "object"}'})  # type: ignore[arg-type]
    assert decode_sampling(encode_sampling(sampling)) == sampling

"""Constrained decoding: which tokens may follow a text under a JSON schema, regex or grammar.

The library is llguidance (extra `[grammar]`), which needs no torch. Without it there are no
`Grammars`: a verifier then refuses constrained requests by name, a speculator drafts unmasked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from treecast.errors import InvalidRequest, TreecastError
from treecast.sampling.params import SamplingParams

_log = structlog.get_logger()

_MAX_REASON_CHARACTERS = 400
_JSON_DEFAULTS = {"whitespace_pattern": r"[ \n\t]{0,16}"}
"""Some space between tokens of JSON, but no more: a small model may never leave it."""

_LIMITS = {"max_items_in_row": 500, "step_max_items": 20_000, "step_lexer_fuel": 50_000}
"""Of one mask, which holds up the whole process: some 20 ms at the limit. An object of a hundred
optional properties has 400 items in a row, an ambiguous grammar one more with every token."""


class Matcher:
    """Where one text stands in its grammar. One thread at a time."""

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`matcher` is an `llguidance.LLMatcher` at the beginning of the output."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def copy(self) -> Matcher:
        """Another that stands at the same place, and goes its own way."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self._eos_token_ids)

    def accept(self, token: int) -> None:
        """Take the output's next token.

        Raises:
            InvalidRequest: the grammar does not allow it, or is too ambiguous to follow.
        """
        if token in self._eos_token_ids and self._matcher.is_accepting():
            return  # the matcher has stopped by itself where nothing else may follow
        if not self._matcher.try_consume_tokens([token]):
            self._check_limits()
            raise InvalidRequest(f"token {token} does not follow the text in its grammar")

    def allowed(self, path: Sequence[int] = ()) -> NDArray[np.bool_]:
        """[vocab] which tokens may follow the text and a path behind it; changes nothing.

        The end of the output is among them where the grammar may end. None may follow a path that
        the grammar does not allow.

        Raises:
            InvalidRequest: the grammar is too ambiguous to follow.
        """
        taken = self._matcher.try_consume_tokens(list(path))
        try:
            mask = self._matcher.compute_bitmask() if taken == len(path) else None
            self._check_limits()
        finally:
            self._matcher.rollback(taken)
        if mask is None:
            return np.zeros(self._vocab_size, dtype=np.bool_)
        bits = np.frombuffer(mask, dtype=np.uint8)
        unpacked = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return unpacked.astype(np.bool_)

    def _check_limits(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error()[:_MAX_REASON_CHARACTERS]
            raise InvalidRequest(f"the text cannot be followed in its grammar: {reason}")


class Grammars:
    """Makes matchers for one tokenizer."""

    def __init__(self, definition: bytes, eos_token_ids: Collection[int], vocab_size: int) -> None:
        """Prepare a tokenizer; half a second of computation for 50,000 tokens.

        Args:
            definition: tokenizer.json.
            vocab_size: the model's; at least the tokenizer's.
        """
        from llguidance import LLTokenizer

        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer = LLTokenizer(
            definition.decode(), n_vocab=vocab_size, eos_token=self._eos_token_ids
        )

    @classmethod
    def for_model(
        cls, definition: bytes, eos_token_ids: Collection[int], vocab_size: int
    ) -> Grammars | None:
        """The same; None where it cannot be: no library, no tokenizer, no end of output."""
        if not definition or not eos_token_ids or importlib.util.find_spec("llguidance") is None:
            return None
        try:
            return cls(definition, eos_token_ids, vocab_size)
        except ValueError as error:  # a kind of tokenizer that the library does not read
            _log.warning("grammars.unavailable", why=str(error)[:_MAX_REASON_CHARACTERS])
            return None

    def matcher(self, sampling: SamplingParams) -> Matcher:
        """A matcher at the beginning of a constrained request's output.

        Raises:
            InvalidRequest: the constraint is malformed or too complex, by name.
        """
        from llguidance import LLMatcher, LLParserLimits

        kind, text = sampling.constraint
        compilers = {
            "json_schema": _json_grammar,
            "regex": LLMatcher.grammar_from_regex,
            "grammar": LLMatcher.grammar_from_lark,
        }
        try:
            limits = LLParserLimits(**_LIMITS)
            matcher = LLMatcher(self._tokenizer, compilers[kind](text), log_level=0, limits=limits)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
        except ValueError as error:
            reason = str(error)[:_MAX_REASON_CHARACTERS]
            what = f"{kind} of {len(text)} characters"
            raise InvalidRequest(f"{what} cannot be used: {reason}") from error
        return Matcher(matcher, self._vocab_size, self._eos_token_ids)


def _json_grammar(schema: str) -> str:
    from llguidance import LLMatcher

    grammar: str = LLMatcher.grammar_from_json_schema(schema, _JSON_DEFAULTS)
    return grammar


def matcher_for(grammars: Grammars | None, sampling: SamplingParams) -> Matcher | None:
    """The request's matcher; None for one that asks for no constraint.

    Raises:
        InvalidRequest: the constraint is malformed, or nothing here can keep it.
    """
    if not sampling.constraint[0]:
        return None
    return require_grammars(grammars, sampling).matcher(sampling)


def require_grammars(grammars: Grammars | None, sampling: SamplingParams) -> Grammars:
    """Raise InvalidRequest, and why, where nothing can keep a request's constraint."""
    if grammars is None:
        raise InvalidRequest(
            f"{sampling.constraint[0]} cannot be kept here: it needs the package llguidance, and a "
            "model with a tokenizer and an end-of-sequence token"
        )
    return grammars


def draft_matcher(grammars: Grammars | None, sampling: SamplingParams) -> Matcher | None:
    """The same for a drafter: what it cannot keep it leaves to the target."""
    try:
        return matcher_for(grammars, sampling)
    except TreecastError:
        return None

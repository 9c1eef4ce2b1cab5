"""From a row of logits to the tokens that may be picked, in the order of transformers' `generate`.

Processors: logit bias (there: sequence bias), repetition penalty, then presence and frequency,
which transformers lacks. Warpers: temperature, top-k, top-p, min-p. Processors work in float32 as
there; warpers in float64, where no finite float32 overflows. Parameters are rounded to float32
first, as they are on the wire, so that a request means the same at both ends.

A row's result depends on that row alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.grammar import Matcher
from treecast.sampling.params import SamplingParams


class Context:
    """The text so far, as far as picking the next token needs it."""

    __slots__ = ("_grammar", "_output", "_seen", "length")

    def __init__(
        self,
        prompt: Iterable[int],
        output: Iterable[int] = (),
        grammar: Matcher | None = None,
    ) -> None:
        """`grammar`, at the output's beginning, is owned from now on.

        Raises:
            InvalidRequest: an output that the grammar does not allow.
        """
        prompt, output = list(prompt), list(output)
        self._output = Counter(output)
        self._seen = self._output.keys() | prompt
        self.length = len(prompt) + len(output)
        """Tokens so far: the absolute position of the next one."""
        self._grammar = grammar
        for token in output if grammar else ():
            self._follow(token)

    def append(self, token: int) -> None:
        """Add an output token."""
        self._output[token] += 1
        self._seen.add(token)
        self.length += 1
        self._follow(token)

    def masked(
        self,
        logits: NDArray[np.float32],  # [vocab]
        path: Sequence[int] = (),
    ) -> NDArray[np.float32]:
        """Minus infinity for tokens that may not follow the text, and a path behind it."""
        if self._grammar is None:
            return logits
        return np.where(self._grammar.allowed(path), logits, np.float32(-np.inf))

    def _follow(self, token: int) -> None:
        if self._grammar is not None:
            self._grammar.accept(token)

    def seen(self) -> NDArray[np.int64]:
        """[n] distinct token ids of prompt and output, in no order."""
        return np.fromiter(self._seen, np.int64, len(self._seen))

    def output_counts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[n] distinct token ids of the output, and how often each is in it."""
        ids = np.fromiter(self._output.keys(), np.int64, len(self._output))
        return ids, np.fromiter(self._output.values(), np.float32, len(self._output))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be picked: `ids` ascend, `scores` are logits over temperature (float64)."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float64]

    def where(self, kept: NDArray[np.bool_]) -> Candidates:
        places = np.flatnonzero(kept)
        return Candidates(self.ids[places], self.scores[places])


def changes_logits(sampling: SamplingParams) -> bool:
    """Whether bias or penalties are asked for."""
    return bool(
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


def process(
    logits: NDArray[np.float32],  # [vocab]
    context: Context,
    sampling: SamplingParams,
) -> NDArray[np.float32]:
    """Apply bias and penalties; returns `logits` itself when there are none, else a copy."""
    if not changes_logits(sampling):
        return logits
    scores = logits.copy()
    _add_bias(scores, sampling)
    _penalize_repetition(scores, context, sampling)
    _penalize_output(scores, context, sampling)
    return scores


def warp(
    scores: NDArray[np.float32],  # [vocab]
    sampling: SamplingParams,
) -> Candidates:
    """Apply temperature (above 0), top-k, top-p and min-p.

    Top-k keeps all tokens that tie with the k-th; of tokens that tie at the edge of the nucleus,
    top-p keeps those of lowest id.
    """
    candidates = _top_k(scores, sampling.top_k)
    candidates.scores[:] /= np.float32(sampling.temperature)
    if sampling.top_p < 1:
        candidates = _top_p(candidates, float(np.float32(sampling.top_p)))
    if min_p := float(np.float32(sampling.min_p)):
        candidates = _min_p(candidates, min_p)
    return candidates


def _add_bias(scores: NDArray[np.float32], sampling: SamplingParams) -> None:
    for token, bias in sampling.logit_bias.items():
        scores[token] += np.float32(bias)


def _penalize_repetition(
    scores: NDArray[np.float32], context: Context, sampling: SamplingParams
) -> None:
    if sampling.repetition_penalty == 1:
        return
    penalty = np.float32(sampling.repetition_penalty)
    ids = context.seen()
    seen = scores[ids]
    scores[ids] = np.where(seen < 0, seen * penalty, seen / penalty)


def _penalize_output(
    scores: NDArray[np.float32], context: Context, sampling: SamplingParams
) -> None:
    ids, counts = context.output_counts()
    scores[ids] -= np.float32(sampling.presence_penalty)
    scores[ids] -= np.float32(sampling.frequency_penalty) * counts


def _top_k(scores: NDArray[np.float32], top_k: int) -> Candidates:
    """Before the temperature: dividing by it keeps order and ties."""
    if not 0 < top_k < len(scores):
        return Candidates(np.arange(len(scores)), scores.astype(np.float64))
    least = np.partition(scores, -top_k)[-top_k]
    ids = np.flatnonzero(scores >= least)
    return Candidates(ids, scores[ids].astype(np.float64))


def _top_p(candidates: Candidates, top_p: float) -> Candidates:
    """Keep a token while the likelier ones hold less than `top_p` of the mass."""
    masses = np.exp(candidates.scores - candidates.scores.max())
    total = masses.sum()
    # What all tokens below this floor hold together is less than the tail to be cut.
    floor = 0.5 * (1 - top_p) * total / len(masses)
    descending = np.sort(masses[masses >= floor])[::-1]
    mass_above = np.cumsum(descending) - descending
    num_kept = max(1, int(np.count_nonzero(mass_above < top_p * total)))
    least = descending[num_kept - 1]
    kept = masses > least
    kept[np.flatnonzero(masses == least)[: num_kept - np.count_nonzero(kept)]] = True
    return candidates.where(kept)


def _min_p(candidates: Candidates, min_p: float) -> Candidates:
    floor = candidates.scores.max() + np.log(min_p)
    return candidates.where(candidates.scores >= floor)

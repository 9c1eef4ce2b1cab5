"""Lookup drafting: what followed this suffix earlier in the same text follows it again.

Every earlier place whose suffix matches votes for the token that came next there, so a tree grows
of all matches at once; a path's own tokens lengthen its matches, and a loop is followed round and
round. A session sees its own text only: nobody's prompt is quoted to anybody else.

Source: prompt lookup (Saxena 2023); matching inside a growing tree is SuffixDecoding's
(arXiv 2411.04975).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from treecast.drafting.base import DraftRequest
from treecast.drafting.lookup import grow
from treecast.errors import Overloaded
from treecast.sampling.params import Law
from treecast.tree import MAX_DEPTH, TokenTree

LONGEST_MATCH = 16
"""Longer suffixes are told apart no further."""
MAX_MATCHES = 16
"""Places that vote at one node; more of them change nothing in what is accepted."""
WARM_UP = 4 * LONGEST_MATCH
"""Last tokens of a long prompt over which matches are followed; before them none is alive."""
ESCAPE_WEIGHT = 5.0
"""Weight of "something not seen here". Together with votes of length**2 / sqrt(recency rank) it is
the maximum-likelihood fit to 33000 places of greedy text of a 135M chat model, and calibrated:
belief .06 .14 .24 .34 .44 .55 .65 .75 .85 .97 came true .06 .14 .27 .40 .49 .59 .69 .78 .84 .96."""

Matches = dict[int, int]
"""Length of the common suffix, by the place (index of the token that came next)."""


@dataclass(slots=True)
class TextIndex:
    """A growing text and where its suffix occurred before; a token costs constant time."""

    tokens: list[int] = field(default_factory=list)
    end: Matches = field(default_factory=dict)
    _recent: dict[int, deque[int]] = field(default_factory=dict)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        skipped = max(0, len(tokens) - WARM_UP)
        if skipped:
            self.end = {}
        for token in tokens[:skipped]:
            self._append(token)
        for token in tokens[skipped:]:
            self.end = self.follow(self.end, (), token)
            self._append(token)

    def follow(self, matches: Matches, path: Sequence[int], token: int) -> Matches:
        """The matches of text + path + token, given those of text + path. Changes nothing."""
        found = {
            place + 1: min(length + 1, LONGEST_MATCH)
            for place, length in matches.items()
            if self._next_token(place, path) == token
        }
        tail = (*self.tokens[-LONGEST_MATCH:], *path)
        for place in self._recent.get(token, ()):
            if place not in found:
                found[place] = self._match_length(place, tail)
        if len(found) <= MAX_MATCHES:
            return found
        best = sorted(found, key=lambda place: (found[place], place), reverse=True)
        return {place: found[place] for place in best[:MAX_MATCHES]}

    def next_tokens(self, matches: Matches, path: Sequence[int]) -> dict[int, float]:
        """The belief in each token that followed a match; they sum to less than 1."""
        votes: dict[int, float] = {}
        for rank, place in enumerate(sorted(matches, reverse=True), start=1):
            token = self._next_token(place, path)
            votes[token] = votes.get(token, 0.0) + matches[place] ** 2 / rank**0.5
        total = ESCAPE_WEIGHT + sum(votes.values())
        return {token: vote / total for token, vote in votes.items()}

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        places = self._recent.setdefault(token, deque(maxlen=MAX_MATCHES))
        places.append(len(self.tokens))

    def _next_token(self, place: int, path: Sequence[int]) -> int:
        """The token at a place; behind the text's end it is the path's own (a loop)."""
        behind = place - len(self.tokens)
        return self.tokens[place] if behind < 0 else path[behind]

    def _match_length(self, place: int, tail: Sequence[int]) -> int:
        """Length of the common suffix at a place whose last token is known to be equal."""
        longest = min(LONGEST_MATCH, place, len(tail) + 1)
        for length in range(1, longest):
            if self.tokens[place - 1 - length] != tail[-length]:
                return length
        return longest


class NgramDrafter:
    """Grows trees out of each session's own text; needs no model and accepts any vocabulary."""

    vocab_size = 0

    def __init__(
        self, capacity: int = 256, max_depth: int = MAX_DEPTH, name: str = "ngram"
    ) -> None:
        self.name = name
        self._capacity = capacity
        self._max_depth = max_depth
        self._texts: dict[int, TextIndex] = {}
        self._laws: dict[int, Law] = {}

    def open(self, handle: int, request: DraftRequest) -> None:
        """Index the session's text.

        Raises:
            Overloaded: as many sessions are open as the drafter takes.
        """
        if len(self._texts) >= self._capacity:
            raise Overloaded(
                f"{self.name} drafter has {len(self._texts)} sessions; "
                f"the limit is {self._capacity}"
            )
        text = TextIndex()
        text.extend(request.tokens)
        self._texts[handle] = text
        self._laws[handle] = request.speculation.law

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """Append what the target committed."""
        self._texts[handle].extend(tokens)

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        """Grow one tree per budgeted session; a text that repeats nothing gets an empty one."""
        return {
            handle: grow(self._texts[handle], max_nodes, self._max_depth, self._laws[handle])
            for handle, max_nodes in budgets.items()
        }

    def close(self, handle: int) -> None:
        """Forget a session's text."""
        self._texts.pop(handle, None)
        self._laws.pop(handle, None)

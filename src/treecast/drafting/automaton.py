"""A suffix automaton that counts: how often what followed a text's suffix, in linear memory.

It holds any number of texts. A state stands for all sequences that end at the same places; its
suffix link leads to those of its suffixes that end at more places. Appending a token takes
amortised constant time, as does following one.

Source: the on-line construction of Blumer et al. 1985, with counts kept for short sequences only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST = 16
"""Sequences of up to this many tokens are counted; longer contexts are told apart no further."""

_START = 0


@dataclass(frozen=True, slots=True)
class Position:
    """Where a text's end lies in an automaton: a state, and how many tokens match there."""

    state: int = _START
    length: int = 0


@dataclass(slots=True)
class SuffixAutomaton:
    """All sequences of the texts appended, with counts of those up to `LONGEST` tokens.

    Attributes:
        num_tokens: tokens appended.
        end: the place of the text being appended.
        followers: transitions of each state: the next state by token.
        counts: occurrences of a state's sequences.
    """

    num_tokens: int = 0
    end: Position = field(default_factory=Position)
    followers: list[dict[int, int]] = field(default_factory=lambda: [{}])
    counts: list[int] = field(default_factory=lambda: [0])
    _links: list[int] = field(default_factory=lambda: [-1])
    _lengths: list[int] = field(default_factory=lambda: [0])
    _last: int = _START

    def begin_text(self) -> None:
        """What is appended next follows nothing."""
        self._last, self.end = _START, Position()

    def append(self, token: int) -> None:
        """Lengthen the text by a token."""
        self.num_tokens += 1
        self._last = self._extend(self._last, token)
        self.end = self.follow(self.end, token, LONGEST)
        state = self.end.state
        while state != _START:  # LONGEST states at most: their lengths differ
            self.counts[state] += 1
            state = self._links[state]

    def follow(self, position: Position, token: int, longest: int = LONGEST - 1) -> Position:
        """The longest suffix of a position's text and `token` that occurs here."""
        state, length = position.state, position.length
        while token not in self.followers[state]:
            state = self._links[state]
            if state < 0:
                return Position()
            length = self._lengths[state]
        return self._cut(self.followers[state][token], min(length + 1, longest))

    def shorter(self, position: Position) -> Position:
        """The longest suffix that occurs in more places; of length 0 at last."""
        link = self._links[position.state]
        return Position(link, self._lengths[link]) if link > _START else Position()

    @property
    def context(self) -> Position:
        """The text's end as far as it is told apart: what `follow` would have led to."""
        return self._cut(self.end.state, min(self.end.length, LONGEST - 1))

    def _cut(self, state: int, length: int) -> Position:
        """The state that stands for the last `length` tokens of a state's sequences."""
        while length and self._lengths[self._links[state]] >= length:
            state = self._links[state]
        return Position(state, length) if length else Position()

    def _extend(self, last: int, token: int) -> int:
        """The state of the whole text after `token`, made or found."""
        known = self.followers[last].get(token)
        if known is not None:  # another text began like this one
            return known if self._fits(last, known) else self._split(last, token, known)
        made = self._add(self._lengths[last] + 1, {}, _START)
        state = last
        while state >= 0 and token not in self.followers[state]:
            self.followers[state][token] = made
            state = self._links[state]
        if state >= 0:
            known = self.followers[state][token]
            fits = self._fits(state, known)
            self._links[made] = known if fits else self._split(state, token, known)
        return made

    def _fits(self, state: int, follower: int) -> bool:
        return self._lengths[state] + 1 == self._lengths[follower]

    def _split(self, state: int, token: int, follower: int) -> int:
        """Part a state's short sequences from its long ones; returns the short ones' state."""
        short = self._add(
            self._lengths[state] + 1, self.followers[follower].copy(), self._links[follower]
        )
        self.counts[short] = self.counts[follower]
        self._links[follower] = short
        while state >= 0 and self.followers[state].get(token) == follower:
            self.followers[state][token] = short
            state = self._links[state]
        return short

    def _add(self, length: int, followers: dict[int, int], link: int) -> int:
        self.followers.append(followers)
        self.counts.append(0)
        self._links.append(link)
        self._lengths.append(length)
        return len(self.counts) - 1

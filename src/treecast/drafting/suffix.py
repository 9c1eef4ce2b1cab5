"""Lookup drafting by counts: what followed this suffix most often, here and in recent outputs.

Every suffix of the text is a context that tells how often which token came after it, over all of
the text, where `ngram` looks at the latest places alone.

Source: SuffixDecoding (arXiv 2411.04975).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from treecast.drafting.automaton import LONGEST, Position, SuffixAutomaton
from treecast.drafting.base import DraftRequest
from treecast.drafting.lookup import grow
from treecast.errors import Overloaded
from treecast.sampling.params import Law
from treecast.tree import MAX_DEPTH, TokenTree

MAX_FOLLOWERS = 48
"""A context that was followed by more kinds of tokens than this says too little to be asked."""
MAX_CONTEXTS = 3
"""Contexts that vote per text, the longest ones; shorter ones change next to nothing."""
ESCAPE_WEIGHT = 5.0
"""Weight of "something not seen here". Together with votes of length**2 for each occurrence it is
the maximum-likelihood fit to 33000 places of greedy text of a 135M chat model, and calibrated:
belief .04 .14 .25 .34 .44 .55 .64 .75 .85 .97 came true .03 .12 .30 .33 .48 .63 .69 .80 .86 .96."""

Place = tuple[Position, ...]
"""Where a text's end lies in each automaton that is asked."""


@dataclass(slots=True)
class Memory:
    """What a pod wrote lately, in two halves: when the newer is full, the older is forgotten.

    Attributes:
        capacity_tokens: most tokens remembered; at least half of them are once that many came.
    """

    capacity_tokens: int
    older: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    newer: SuffixAutomaton = field(default_factory=SuffixAutomaton)

    @property
    def automata(self) -> tuple[SuffixAutomaton, SuffixAutomaton]:
        return self.newer, self.older

    def add(self, tokens: Sequence[int]) -> None:
        """Remember an output, or the end of one that is too long."""
        half = self.capacity_tokens // 2
        tokens = tokens[max(0, len(tokens) - half) :]
        if self.newer.num_tokens + len(tokens) > half:
            self.older, self.newer = self.newer, SuffixAutomaton()
        self.newer.begin_text()
        for token in tokens:
            self.newer.append(token)


@dataclass(slots=True)
class SuffixLookup:
    """One session's text, asked together with what a pod remembers.

    The memory's automata change between drafts, so places in them are found anew for each.

    Attributes:
        recent: the text's last tokens.
    """

    text: SuffixAutomaton
    recent: tuple[int, ...] = ()
    remembered: tuple[SuffixAutomaton, ...] = ()

    @property
    def end(self) -> Place:
        return (self.text.context, *map(self._find, self.remembered))

    def follow(self, place: Place, path: Sequence[int], token: int) -> Place:
        automata = (self.text, *self.remembered)
        return tuple(
            automaton.follow(position, token)
            for automaton, position in zip(automata, place, strict=True)
        )

    def next_tokens(self, place: Place, path: Sequence[int]) -> dict[int, float]:
        """Belief in each token that followed one of the contexts; they sum to less than 1."""
        votes: dict[int, float] = {}
        for automaton, position in zip((self.text, *self.remembered), place, strict=True):
            for token, vote in _votes(automaton, position).items():
                votes[token] = votes.get(token, 0.0) + vote
        total = ESCAPE_WEIGHT + sum(votes.values())
        return {token: vote / total for token, vote in votes.items()}

    def _find(self, automaton: SuffixAutomaton) -> Position:
        position = Position()
        for token in self.recent:
            position = automaton.follow(position, token)
        return position


def _votes(automaton: SuffixAutomaton, position: Position) -> dict[int, float]:
    """Every earlier occurrence of a suffix votes once, with its longest match's length squared."""
    votes: dict[int, float] = {}
    seen: dict[int, int] = {}
    num_asked = 0
    while position.length and num_asked < MAX_CONTEXTS:
        followers = automaton.followers[position.state]
        if len(followers) > MAX_FOLLOWERS:
            break
        for token, state in followers.items():
            count = automaton.counts[state]
            votes[token] = votes.get(token, 0.0) + (count - seen.get(token, 0)) * position.length**2
            seen[token] = count
        num_asked += bool(followers)  # the text's own end has none
        position = automaton.shorter(position)
    return votes


@dataclass(slots=True)
class _Session:
    """A session's text, its last tokens, and what the target wrote since it was opened."""

    law: Law
    text: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=LONGEST))
    output: list[int] = field(default_factory=list)

    def append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.text.append(token)
        self.recent.extend(tokens)

    def lookup(self, remembered: Sequence[SuffixAutomaton]) -> SuffixLookup:
        """The text as it stands, asked together with what the pod remembers."""
        return SuffixLookup(self.text, tuple(self.recent), tuple(remembered))


class SuffixDrafter:
    """Grows trees by frequency; needs no model and accepts any vocabulary.

    With a memory, what one session wrote is proposed to others: it may change how soon a token
    comes, never which one.
    """

    vocab_size = 0

    def __init__(
        self,
        capacity: int = 256,
        memory_tokens: int = 0,
        max_depth: int = MAX_DEPTH,
        name: str = "suffix",
    ) -> None:
        """Make a drafter.

        Args:
            capacity: most sessions at a time.
            memory_tokens: output tokens of ended sessions that are remembered; about .5 kB each.
        """
        self.name = name
        self._capacity = capacity
        self._max_depth = max_depth
        self._memory = Memory(memory_tokens) if memory_tokens else None
        self._sessions: dict[int, _Session] = {}

    def open(self, handle: int, request: DraftRequest) -> None:
        """Index the session's text.

        Raises:
            Overloaded: as many sessions are open as the drafter takes.
        """
        if len(self._sessions) >= self._capacity:
            raise Overloaded(
                f"{self.name} drafter has {len(self._sessions)} sessions; "
                f"the limit is {self._capacity}"
            )
        session = _Session(request.speculation.law)
        session.append(request.tokens)  # an earlier output too, but that was remembered before
        self._sessions[handle] = session

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """Append what the target committed."""
        self._sessions[handle].append(tokens)
        self._sessions[handle].output.extend(tokens)

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        """Grow one tree per budgeted session; a text that repeats nothing gets an empty one."""
        remembered = self._memory.automata if self._memory else ()
        trees: dict[int, TokenTree] = {}
        for handle, max_nodes in budgets.items():
            session = self._sessions[handle]
            lookup = session.lookup(remembered)
            trees[handle] = grow(lookup, max_nodes, self._max_depth, session.law)
        return trees

    def close(self, handle: int) -> None:
        """Forget a session's prompt; its output is remembered, if anything is."""
        session = self._sessions.pop(handle, None)
        if session is not None and self._memory is not None:
            self._memory.add(session.output)

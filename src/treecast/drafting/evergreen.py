"""One session of a draft model: its text, its KV, and what was computed below the text's end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

from treecast.drafting.base import DraftRequest
from treecast.drafting.growth import Expansion, Growth
from treecast.drafting.proposal import DraftPosition, propose
from treecast.engine.base import Engine, KVSequence, LogitRows, Segment
from treecast.sampling.transforms import Context
from treecast.tree import MAX_DEPTH


@dataclass(slots=True)
class Evergreen:
    """A tree that is grown on and re-rooted, never thrown away whole.

    The KV holds the committed text without its last token; that token, the root, and the nodes
    computed below it are the sequence's uncommitted rows, row i being expansion i. There are no
    expansions while committed text is left to compute.

    Attributes:
        tokens: the committed text.
        growth: how the trees offered grow.
        ahead: how run-ahead grows them.
        last_position: no row is computed behind it (end of the context, or of the reservation).
        declined: computing the text committed last was not worth its time.
    """

    sequence: KVSequence
    tokens: list[int]
    context: Context
    request: DraftRequest
    growth: Growth
    ahead: Growth
    last_position: int
    expansions: list[Expansion] = field(default_factory=list)
    declined: bool = False

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node that can be offered: one below the deepest computed."""
        return min(MAX_DEPTH, self.last_position - len(self.tokens) + 2)

    @property
    def is_spent(self) -> bool:
        """Whether the text has outgrown what may be computed."""
        return len(self.tokens) > self.last_position + 1

    @property
    def is_behind(self) -> bool:
        """Whether committed text is left to compute."""
        return not self.expansions and not self.is_spent

    @property
    def num_pending(self) -> int:
        """Committed tokens that are not in the KV."""
        return len(self.tokens) - self.sequence.length

    def mend(self, engine: Engine) -> None:
        """Drop rows that a draft which broke off has left; without one, changes nothing."""
        if self.sequence.num_rows != len(self.expansions):
            engine.truncate(self.sequence, self.sequence.length)
            self.expansions = []

    def next_chunk(self, max_rows: int) -> Segment:
        """The next rows of committed text; its last one is wanted if that is the text's end."""
        start = self.sequence.length
        chunk = self.tokens[start : start + max_rows]
        wanted = [len(chunk) - 1] if len(chunk) == self.num_pending else []
        return Segment.chain(self.sequence, chunk, wanted)

    def ranks(self, tokens: Sequence[int]) -> Iterator[int | None]:
        """Which proposal each token was, as far as they were computed; None: not among them."""
        index: int | None = 0 if self.expansions else None
        for token in tokens:
            if index is None:
                return
            expansion = self.expansions[index]
            if expansion.draws is not None:
                return  # draws have no ranks
            yield expansion.rank(token)
            index = expansion.computed.get(token)

    def commit(self, engine: Engine, tokens: Sequence[int]) -> None:
        """Append committed tokens; what was computed of them, and below them, is kept."""
        self.declined = False
        self.tokens.extend(tokens)
        for token in tokens:
            self.context.append(token)
        if not self.expansions:
            return
        path = [0]
        for token in tokens:
            row = self.expansions[path[-1]].computed.get(token)
            if row is None:
                engine.commit(self.sequence, path)
                self.expansions = []
                return
            path.append(row)
        kept = _below(self.expansions, path[-1])
        engine.commit(self.sequence, path[:-1], keep=kept)
        self.expansions = _renumber(self.expansions, kept)

    def take_chunk(self, engine: Engine, chunk: Segment, logits: LogitRows) -> None:
        """Make computed text permanent; the text's last row stays, as the root."""
        count = len(chunk.tokens)
        if not chunk.wanted:
            engine.commit(self.sequence, range(count))
            return
        if count > 1:
            engine.commit(self.sequence, range(count - 1), keep=[count - 1])
        self._expand(logits, [()], [0])

    def take_nodes(self, nodes: Segment, logits: LogitRows, paths: Sequence[Sequence[int]]) -> None:
        """Take in nodes that were computed below others; `paths` are their tokens from the root."""
        branches: list[int] = []
        children = zip(nodes.tokens, nodes.parents, strict=True)
        for row, (token, parent) in enumerate(children, start=len(self.expansions)):
            self.expansions[parent].computed[token] = row
            branches.append(crc32(token.to_bytes(4, "little"), self.expansions[parent].branch))
        self._expand(logits, paths, branches)

    def _expand(
        self, logits: LogitRows, paths: Sequence[Sequence[int]], branches: Sequence[int]
    ) -> None:
        num_children = max(self.growth.num_children, self.ahead.num_children)
        for row, (path, branch) in enumerate(zip(paths, branches, strict=True)):
            place = DraftPosition(len(self.tokens) + len(path), branch)
            found = propose(logits[row], self.context, place, self.request, num_children, path)
            self.expansions.append(
                Expansion(found.tokens, found.confidence, draws=found.draws, branch=branch)
            )


def _below(expansions: Sequence[Expansion], top: int) -> list[int]:
    """An expansion and all below it, ascending: children come after their parents."""
    kept: list[int] = []
    waiting = [top]
    while waiting:
        index = waiting.pop()
        kept.append(index)
        waiting.extend(expansions[index].computed.values())
    return sorted(kept)


def _renumber(expansions: Sequence[Expansion], kept: Sequence[int]) -> list[Expansion]:
    places = {index: place for place, index in enumerate(kept)}
    return [
        replace(
            expansions[index],
            computed={token: places[below] for token, below in expansions[index].computed.items()},
        )
        for index in kept
    ]

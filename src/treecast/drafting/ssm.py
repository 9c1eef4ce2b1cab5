"""Drafting with a small speculative model: one evergreen tree per session, with its own KV.

A session's KV holds the committed text without its last token; that token, the root, and the nodes
computed below it are the sequence's uncommitted rows, row i being expansion i. A commit makes the
rows that it confirms permanent and keeps those below them, so only what was not foreseen is
computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from treecast.drafting.base import DraftRequest
from treecast.drafting.growth import Expansion, Growth, Selection
from treecast.drafting.proposal import propose
from treecast.engine.base import Engine, KVSequence, LogitRows, Segment
from treecast.errors import InvalidRequest, Overloaded, PromptTooLong
from treecast.sampling.params import SamplingParams
from treecast.sampling.transforms import Context
from treecast.tree import MAX_DEPTH, MAX_NODES, TokenTree

PREFILL_ROWS = 256
"""Prompt rows that one draft computes, over all sessions: what a long prompt delays the others."""


@dataclass(slots=True)
class _Session:
    """One session's text, KV and expansions.

    Attributes:
        last_position: rows at positions behind this are not computed (context, reservation).
    """

    sequence: KVSequence
    tokens: list[int]
    context: Context
    sampling: SamplingParams
    noise_key: int
    last_position: int
    expansions: list[Expansion] = field(default_factory=list)

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node that can be offered: one below the deepest computed."""
        return min(MAX_DEPTH, self.last_position - len(self.tokens) + 2)

    @property
    def pending(self) -> Sequence[int]:
        """Committed tokens that are not in the KV."""
        return self.tokens[self.sequence.length :]


class SSMDrafter:
    """Grows trees with a draft model, batched over sessions."""

    name = "ssm"

    def __init__(
        self,
        engine: Engine,
        growth: Growth,
        capacity: int = 64,
        max_rows: int = MAX_NODES,
        ahead: Growth | None = None,
    ) -> None:
        """Draft with `engine`, which nobody else may call.

        Args:
            capacity: sessions open at once.
            max_rows: computed nodes that a session keeps at most.
            ahead: policy of `run_ahead`, where time is free; by default the same.
        """
        self._engine = engine
        self._growth = growth
        self._ahead = ahead or growth
        self._num_children = max(growth.num_children, self._ahead.num_children)
        self._capacity = capacity
        self._max_rows = max_rows
        self._sessions: dict[int, _Session] = {}

    @property
    def vocab_size(self) -> int:
        return self._engine.info.vocab_size

    def open(self, handle: int, request: DraftRequest) -> None:
        """Reserve KV for the whole of a session, so that it cannot run out of memory later.

        Raises:
            Overloaded: too many sessions, or not enough free pages.
            PromptTooLong: the text does not fit the draft's context.
            InvalidRequest: a token that the draft does not have.
        """
        if len(self._sessions) >= self._capacity:
            raise Overloaded(
                f"ssm drafter has {len(self._sessions)} sessions; the limit is {self._capacity}"
            )
        limit = self._engine.info.context_tokens
        if len(request.tokens) > limit:
            raise PromptTooLong(
                f"text has {len(request.tokens)} tokens; the draft's limit is {limit}"
            )
        self._check_tokens(request.tokens)
        longest = min(limit, request.prompt_len + request.sampling.max_tokens)
        longest = max(longest, len(request.tokens))
        prompt, output = _split(request.tokens, request.prompt_len)
        self._sessions[handle] = _Session(
            sequence=self._engine.allocate(longest + self._max_rows),
            tokens=list(request.tokens),
            context=Context(prompt, output),
            sampling=request.sampling,
            noise_key=request.noise_key,
            last_position=longest - 1,
        )

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """Keep the KV of what was foreseen, and the nodes below it.

        Raises:
            InvalidRequest: a token that the draft does not have; nothing is changed.
        """
        self._check_tokens(tokens)
        session = self._sessions[handle]
        session.tokens.extend(tokens)
        for token in tokens:
            session.context.append(token)
        if session.expansions:
            self._reroot(session, tokens)

    def draft(self, budgets: dict[int, int]) -> dict[int, TokenTree]:
        """Grow until the policy is content or has used up its passes.

        A session whose prompt is not computed yet is missing from the result: call again. One at
        the end of the draft's context gets an empty tree.
        """
        ready = self._compute_roots(budgets)
        selections = self._grow(self._growth, ready, self._growth.max_passes)
        spent = {handle for handle in budgets if self._is_spent(self._sessions[handle])}
        empty = {handle: TokenTree() for handle in spent}
        return empty | {handle: selected.tree for handle, selected in selections.items()}

    def run_ahead(self, budgets: dict[int, int]) -> set[int]:
        """Take one pass towards trees of these sizes, beyond what was offered.

        Returns:
            Sessions that have more to compute.
        """
        ready = self._compute_roots(budgets)
        selections = self._grow(self._ahead, ready, max_passes=1)
        unfinished = {handle for handle in budgets if self.is_behind(handle)}
        for handle, selection in selections.items():
            if self._frontier(self._ahead, self._sessions[handle], selection, budgets[handle]):
                unfinished.add(handle)
        return unfinished

    def is_behind(self, handle: int) -> bool:
        """Whether a part of the committed text is not computed yet."""
        session = self._sessions[handle]
        return not session.expansions and not self._is_spent(session)

    def foresaw(self, handle: int) -> bool:
        """Whether the last commit left a computed root."""
        return bool(self._sessions[handle].expansions)

    def close(self, handle: int) -> None:
        """Free a session's KV."""
        session = self._sessions.pop(handle, None)
        if session is not None:
            self._engine.free(session.sequence)

    def _check_tokens(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(
                    f"token id is {token}; the draft's vocabulary has {self.vocab_size}"
                )

    def _is_spent(self, session: _Session) -> bool:
        return len(session.tokens) > session.last_position + 1

    def _reroot(self, session: _Session, tokens: Sequence[int]) -> None:
        path, found = [0], 0
        for token in tokens:
            row = session.expansions[path[-1]].computed.get(token)
            if row is None:
                break
            path.append(row)
            found += 1
        if found < len(tokens):
            self._engine.commit(session.sequence, path)
            session.expansions = []
            return
        kept = _below(session.expansions, path[-1])
        self._engine.commit(session.sequence, path[:-1], keep=kept)
        session.expansions = _renumber(session.expansions, kept)

    def _compute_roots(self, budgets: dict[int, int]) -> dict[int, int]:
        """Compute committed text where the root is not; returns the budgets of rooted sessions."""
        segments: dict[int, Segment] = {}
        allowance = PREFILL_ROWS
        for handle in budgets:
            session = self._sessions[handle]
            if session.expansions or self._is_spent(session) or not allowance:
                continue
            chunk = session.pending[:allowance]
            allowance -= len(chunk)
            wanted = [len(chunk) - 1] if len(chunk) == len(session.pending) else []
            segments[handle] = Segment.chain(session.sequence, chunk, wanted)
        rows = self._engine.forward(list(segments.values())) if segments else []
        for (handle, segment), logits in zip(segments.items(), rows, strict=True):
            self._take_chunk(self._sessions[handle], segment, logits)
        return {
            handle: budget
            for handle, budget in budgets.items()
            if self._sessions[handle].expansions
        }

    def _take_chunk(self, session: _Session, segment: Segment, logits: LogitRows) -> None:
        """Make the chunk permanent; its last row becomes the root if it ends the text."""
        count = len(segment.tokens)
        if not segment.wanted:
            self._engine.commit(session.sequence, range(count))
            return
        if count > 1:
            self._engine.commit(session.sequence, range(count - 1), keep=[count - 1])
        self._expand(session, logits, [0])

    def _grow(
        self, growth: Growth, budgets: dict[int, int], max_passes: int
    ) -> dict[int, Selection]:
        """Compute frontiers, pass by pass; returns what is selected at the end."""

        def select(handle: int) -> Selection:
            session = self._sessions[handle]
            return growth.select(session.expansions, budgets[handle], session.max_depth)

        selections = {handle: select(handle) for handle in budgets}
        for _ in range(max_passes):
            frontiers = {}
            for handle, selection in selections.items():
                session = self._sessions[handle]
                if nodes := self._frontier(growth, session, selection, budgets[handle]):
                    frontiers[handle] = nodes
            if not frontiers:
                break
            self._compute(frontiers, selections)
            selections |= {handle: select(handle) for handle in frontiers}
        return selections

    def _frontier(
        self, growth: Growth, session: _Session, selection: Selection, max_nodes: int
    ) -> list[int]:
        room = max(0, self._max_rows - len(session.expansions))
        return growth.frontier(selection, max_nodes, session.max_depth)[:room]

    def _compute(self, frontiers: dict[int, list[int]], selections: dict[int, Selection]) -> None:
        """One packed pass over the sessions' frontiers."""
        segments = []
        for handle, frontier in frontiers.items():
            selection = selections[handle]
            tokens = [selection.tree.tokens[node] for node in frontier]
            parents = [selection.expansion_of(selection.tree.parents[node]) for node in frontier]
            sequence = self._sessions[handle].sequence
            segments.append(Segment(sequence, tokens, parents, range(len(frontier))))
        rows = self._engine.forward(segments)
        for handle, segment, logits in zip(frontiers, segments, rows, strict=True):
            session = self._sessions[handle]
            children = zip(segment.tokens, segment.parents, strict=True)
            for row, (token, parent) in enumerate(children, start=len(session.expansions)):
                session.expansions[parent].computed[token] = row
            depths = [selections[handle].tree.depths[node] for node in frontiers[handle]]
            self._expand(session, logits, depths)

    def _expand(self, session: _Session, logits: LogitRows, depths: Sequence[int]) -> None:
        """Append an expansion for each computed row."""
        for row, depth in enumerate(depths):
            proposal = propose(
                logits[row],
                session.context,
                len(session.tokens) + depth,
                session.sampling,
                session.noise_key,
                self._num_children,
            )
            session.expansions.append(Expansion(proposal.tokens, proposal.confidence))


def _split(tokens: Sequence[int], prompt_len: int) -> tuple[Sequence[int], Sequence[int]]:
    return tokens[:prompt_len], tokens[prompt_len:]


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
        Expansion(
            expansions[index].tokens,
            expansions[index].confidence,
            {token: places[below] for token, below in expansions[index].computed.items()},
        )
        for index in kept
    ]

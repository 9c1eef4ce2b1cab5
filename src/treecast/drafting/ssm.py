"""Drafting with a small speculative model: one evergreen tree per session, with its own KV."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence

from treecast.drafting.base import DraftRequest
from treecast.drafting.drawn import DrawnVector, growth_for
from treecast.drafting.evergreen import Evergreen
from treecast.drafting.growth import Acceptance, Growth, Selection, parse_growth
from treecast.engine.base import Engine, LogitRows, Segment
from treecast.engine.curve import StepCurve
from treecast.errors import InvalidRequest, Overloaded, PromptTooLong
from treecast.prefix import PAGE_TOKENS
from treecast.sampling.transforms import Context
from treecast.tree import MAX_DEPTH, MAX_NODES, TokenTree

PREFILL_ROWS = 256
"""Prompt rows that one draft computes, over all sessions: what a long prompt delays the others."""
_ARREARS = 16
"""Tokens of committed text that may be left uncomputed while drafts are not worth their time."""


class SSMDrafter:
    """Grows trees with a draft model, batched over sessions."""

    def __init__(
        self,
        engine: Engine,
        growth: Growth | str,
        capacity: int = 64,
        max_rows: int = MAX_NODES,
        ahead: Growth | None = None,
        name: str = "ssm",
        pass_s: StepCurve | None = None,
    ) -> None:
        """Draft with `engine`, which nobody else may call.

        Args:
            growth: policy of sessions that ask for none; as text, `dp` learns from all sessions.
            capacity: sessions open at once.
            max_rows: computed nodes that a session keeps at most.
            ahead: policy of `run_ahead`, where time is free; by default the session's own.
            name: tells it from other draft models.
            pass_s: what the engine's passes take; None takes them for free.

        Raises:
            InvalidRequest: the text names no policy.
        """
        self.name = name
        self._engine = engine
        self._acceptance = Acceptance()
        self._growth = self._policy(growth) if isinstance(growth, str) else growth
        self._ahead = ahead
        self._capacity = capacity
        self._max_rows = max_rows
        self._pass_s = pass_s
        self._sessions: dict[int, Evergreen] = {}

    @property
    def vocab_size(self) -> int:
        return self._engine.info.vocab_size

    def open(self, handle: int, request: DraftRequest) -> None:
        """Reserve KV for the whole of a session, so that it cannot run out of memory later.

        Raises:
            Overloaded: too many sessions, or not enough free pages.
            PromptTooLong: the text does not fit the draft's context, or never its KV pool.
            InvalidRequest: a token that the draft does not have, an unknown growth policy, or one
                that the law cannot serve.
        """
        if len(self._sessions) >= self._capacity:
            raise Overloaded(
                f"{self.name} drafter has {len(self._sessions)} sessions; "
                f"the limit is {self._capacity}"
            )
        limit = self._engine.info.context_tokens
        if len(request.tokens) > limit:
            raise PromptTooLong(
                f"text has {len(request.tokens)} tokens; the draft's limit is {limit}"
            )
        self._check_tokens(request.tokens)
        asked = request.speculation.growth
        growth = growth_for(request.speculation, self._policy(asked) if asked else self._growth)
        longest = min(limit, request.prompt_len + request.sampling.max_tokens)
        longest = max(longest, len(request.tokens))
        self._check_pool(longest + self._max_rows)
        context = Context(
            request.tokens[: request.prompt_len],
            request.tokens[request.prompt_len :],
            request.grammar and request.grammar.copy(),
        )
        self._sessions[handle] = Evergreen(
            sequence=self._engine.allocate(longest + self._max_rows),
            tokens=list(request.tokens),
            context=context,
            request=request,
            growth=growth,
            ahead=growth if isinstance(growth, DrawnVector) else self._ahead or growth,
            last_position=longest - 1,
        )

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """Keep the KV of what was foreseen, and the nodes below it.

        Raises:
            InvalidRequest: a token that the draft does not have; nothing is changed.
        """
        self._check_tokens(tokens)
        session = self._sessions[handle]
        for rank in session.ranks(tokens):
            self._acceptance.saw(rank)
        session.commit(self._engine, tokens)

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        """Grow until the policy is content or out of passes, or a pass is not worth its time.

        A session whose prompt is not computed yet is missing from the result: call again. One at
        the end of the draft's context gets an empty tree, and so does one whose last token was not
        worth a pass.
        """
        ready = self._compute_roots(budgets, tokens_per_s)
        policies = {handle: self._sessions[handle].growth for handle in ready}
        selections = self._grow(policies, ready, tokens_per_s=tokens_per_s)
        without = [s for s in budgets if self._sessions[s].is_spent or self._sessions[s].declined]
        empty = {handle: TokenTree() for handle in without}
        return empty | {handle: selected.tree for handle, selected in selections.items()}

    def run_ahead(self, budgets: dict[int, int]) -> set[int]:
        """Take one pass towards trees of these sizes, beyond what was offered.

        Returns:
            Sessions that have more to compute.
        """
        ready = self._compute_roots(budgets)
        policies = {handle: self._sessions[handle].ahead for handle in ready}
        selections = self._grow(policies, ready, max_passes=1)
        unfinished = {handle for handle in budgets if self.is_behind(handle)}
        for handle, selection in selections.items():
            if self._frontier(policies[handle], self._sessions[handle], selection, budgets[handle]):
                unfinished.add(handle)
        return unfinished

    def is_behind(self, handle: int) -> bool:
        """Whether a part of the committed text is not computed yet."""
        session = self._sessions[handle]
        return session.is_behind and not session.declined

    def foresaw(self, handle: int) -> bool:
        """Whether the last commit left a computed root."""
        return bool(self._sessions[handle].expansions)

    def close(self, handle: int) -> None:
        """Free a session's KV."""
        session = self._sessions.pop(handle, None)
        if session is not None:
            self._engine.free(session.sequence)

    def _check_pool(self, num_tokens: int) -> None:
        """What never fits is not to be tried again, as what does not fit now is."""
        total = self._engine.usage.total * PAGE_TOKENS
        if num_tokens > total:
            raise PromptTooLong(
                f"text may take {num_tokens} positions of KV; the draft's pool has {total}"
            )

    def _policy(self, text: str) -> Growth:
        return parse_growth(text, self._acceptance)

    def _check_tokens(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InvalidRequest(
                    f"token id is {token}; the draft's vocabulary has {self.vocab_size}"
                )

    def _compute_roots(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, int]:
        """Compute committed text where some is left; returns the budgets of rooted sessions."""
        for handle in budgets:
            self._sessions[handle].mend(self._engine)
        behind = [handle for handle in budgets if self._sessions[handle].is_behind]
        chunks: dict[int, Segment] = {}
        allowance = PREFILL_ROWS
        # Shortest first: who lacks a bonus token does not wait for somebody's long prompt.
        for handle in sorted(behind, key=lambda handle: self._sessions[handle].num_pending):
            if allowance:
                chunks[handle] = self._sessions[handle].next_chunk(allowance)
                allowance -= len(chunks[handle].tokens)
        if self._roots_pay(chunks, tokens_per_s):
            rows = self._forward(list(chunks.values()))
            for (handle, chunk), logits in zip(chunks.items(), rows, strict=True):
                self._sessions[handle].take_chunk(self._engine, chunk, logits)
        else:
            for handle in chunks:
                self._sessions[handle].declined = True
        return {
            handle: budget
            for handle, budget in budgets.items()
            if self._sessions[handle].expansions
        }

    def _roots_pay(self, chunks: dict[int, Segment], tokens_per_s: float) -> bool:
        """Whether to compute committed text. More than a little of it is an investment."""
        sessions = [self._sessions[handle] for handle in chunks]
        if any(each.growth.is_fixed or each.num_pending > _ARREARS for each in sessions):
            return True
        num_rows = sum(len(chunk.tokens) for chunk in chunks.values())
        return self._pays(float(len(chunks)), num_rows, tokens_per_s)

    def _pays(self, reached: float, num_rows: int, tokens_per_s: float) -> bool:
        """Whether a pass adds what its time is worth, if so many of its nodes are reached."""
        if self._pass_s is None:
            return True
        return reached * self._acceptance.total >= tokens_per_s * self._pass_s(num_rows)

    def _forward(self, segments: Sequence[Segment]) -> list[LogitRows]:
        """One pass of the engine, timed; none for nothing."""
        if not segments:
            return []
        began = time.perf_counter()
        rows = self._engine.forward(segments)
        if self._pass_s is not None:
            num_rows = sum(len(segment.tokens) for segment in segments)
            self._pass_s.saw(num_rows, time.perf_counter() - began)
        return rows

    def _grow(
        self,
        policies: dict[int, Growth],
        budgets: dict[int, int],
        max_passes: int = MAX_DEPTH,
        tokens_per_s: float = 0.0,
    ) -> dict[int, Selection]:
        """Compute frontiers, pass by pass, each session as its policy wants; returns what is
        selected at the end.
        """

        def select(handle: int) -> Selection:
            session = self._sessions[handle]
            return policies[handle].select(session.expansions, budgets[handle], session.max_depth)

        selections = {handle: select(handle) for handle in budgets}
        for num_passes in itertools.count():
            frontiers = {}
            for handle, selection in selections.items():
                growth, session = policies[handle], self._sessions[handle]
                if num_passes >= min(growth.max_passes, max_passes):
                    continue
                if nodes := self._frontier(growth, session, selection, budgets[handle]):
                    frontiers[handle] = nodes
            if not frontiers or not self._frontiers_pay(frontiers, selections, tokens_per_s):
                break
            self._compute(frontiers, selections)
            selections |= {handle: select(handle) for handle in frontiers}
        return selections

    def _frontier(
        self, growth: Growth, session: Evergreen, selection: Selection, max_nodes: int
    ) -> list[int]:
        room = max(0, self._max_rows - len(session.expansions))
        return growth.frontier(selection, max_nodes, session.max_depth)[:room]

    def _frontiers_pay(
        self,
        frontiers: dict[int, list[int]],
        selections: dict[int, Selection],
        tokens_per_s: float,
    ) -> bool:
        """Whether to compute these nodes; a shape that was asked for is."""
        if any(self._sessions[handle].growth.is_fixed for handle in frontiers):
            return True
        reached = 0.0
        for handle, frontier in frontiers.items():
            paths = selections[handle].tree.path_confidence()
            reached += sum(paths[node] for node in frontier)
        num_rows = sum(len(frontier) for frontier in frontiers.values())
        return self._pays(reached, num_rows, tokens_per_s)

    def _compute(self, frontiers: dict[int, list[int]], selections: dict[int, Selection]) -> None:
        """One packed pass over the sessions' frontiers."""
        segments = []
        for handle, frontier in frontiers.items():
            selection = selections[handle]
            tokens = [selection.tree.tokens[node] for node in frontier]
            parents = [selection.expansion_of(selection.tree.parents[node]) for node in frontier]
            sequence = self._sessions[handle].sequence
            segments.append(Segment(sequence, tokens, parents, range(len(frontier))))
        rows = self._forward(segments)
        for (handle, frontier), segment, logits in zip(
            frontiers.items(), segments, rows, strict=True
        ):
            paths = [selections[handle].tree.sequence(node) for node in frontier]
            self._sessions[handle].take_nodes(segment, logits, paths)

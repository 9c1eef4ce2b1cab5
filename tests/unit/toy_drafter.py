"""A drafter for the toy model: right as often as it is told to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treecast.drafting.base import DraftRequest
from treecast.engine.toy import toy_logits, toy_state
from treecast.errors import Overloaded
from treecast.sampling.pick import Picker
from treecast.sampling.transforms import Context
from treecast.tree import MAX_DEPTH, ROOT, TokenTree

_SCALE = 1_000_003


@dataclass(slots=True)
class _Session:
    request: DraftRequest
    tokens: list[int]


class ToyDrafter:
    """Proposes the toy model's own picks, but for a share of wrong ones; deterministic."""

    def __init__(
        self,
        vocab_size: int = 97,
        error_rate: float = 0.0,
        width: int = 2,
        max_depth: int = 8,
        capacity: int = 64,
    ) -> None:
        """Make a drafter.

        Args:
            vocab_size: the toy model's.
            error_rate: share of texts after which the model's pick is not among the children.
            width: children per node: the pick, then tokens that are wrong on purpose.
            max_depth: of the trees.
            capacity: most sessions at a time.
        """
        self._vocab_size = vocab_size
        self._error_rate = error_rate
        self._width = width
        self._max_depth = min(max_depth, MAX_DEPTH)
        self._capacity = capacity
        self._sessions: dict[int, _Session] = {}

    @property
    def name(self) -> str:
        return "toy"

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def num_sessions(self) -> int:
        return len(self._sessions)

    def open(self, handle: int, request: DraftRequest) -> None:
        if len(self._sessions) >= self._capacity:
            raise Overloaded(f"toy drafter has {len(self._sessions)} sessions; the limit is that")
        self._sessions[handle] = _Session(request, list(request.tokens))

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        self._sessions[handle].tokens.extend(tokens)

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        return {
            handle: self._grow(self._sessions[handle], budget)
            for handle, budget in budgets.items()
            if handle in self._sessions
        }

    def close(self, handle: int) -> None:
        self._sessions.pop(handle, None)

    def _grow(self, session: _Session, budget: int) -> TokenTree:
        """Level by level, children in order; only nodes that may be right have children."""
        tree, frontier = TokenTree(), [ROOT]
        for _ in range(self._max_depth):
            next_frontier: list[int] = []
            for parent in frontier:
                text = [*session.tokens, *tree.sequence(parent)]
                for rank, token in enumerate(self._children(session, text)):
                    if len(tree) >= budget:
                        return tree
                    node = tree.add(token, parent, confidence=0.5**rank)
                    next_frontier += [node] if rank == 0 else []
            frontier = next_frontier
        return tree

    def _children(self, session: _Session, text: list[int]) -> list[int]:
        picked = self._pick(session, text)
        wrong_first = int(_is_wrong(text, self._error_rate))
        offsets = range(wrong_first, min(wrong_first + self._width, self._vocab_size))
        return [(picked + offset) % self._vocab_size for offset in offsets]

    def _pick(self, session: _Session, text: list[int]) -> int:
        """The target's own pick: this drafter sees its noise."""
        request = session.request
        context = Context(text[: request.prompt_len], text[request.prompt_len :])
        picker = Picker(request.sampling, request.noise_key, context)
        return picker.pick(toy_logits(text, self._vocab_size))


def _is_wrong(text: list[int], error_rate: float) -> bool:
    """Whether to err after this text: a fixed function, true for a share `error_rate` of texts."""
    state = toy_state(text)
    scattered = (state.weighted_sum * 7919 + state.length * 104729) % _SCALE
    return scattered / _SCALE < error_rate

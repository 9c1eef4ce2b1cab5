"""The whole loop in one process, the oracle of the mesh: draft, forward, walk, commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from treecast.drafting.base import Drafter, DraftRequest, ModelDrafter
from treecast.engine.base import Engine, KVSequence, LogitRows, ModelInfo, Segment
from treecast.errors import InvalidRequest, PromptTooLong
from treecast.sampling.grammar import Grammars, draft_matcher, matcher_for
from treecast.sampling.laws import AcceptanceRule, Walk, acceptance_rule, walk
from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.noise import derived_key
from treecast.sampling.params import SamplingParams, SpeculationParams
from treecast.sampling.pick import Picker
from treecast.sampling.stops import Stop, StopRules
from treecast.sampling.transforms import Context
from treecast.tree import MAX_DEPTH, TokenTree


@dataclass(slots=True)
class Generation:
    """An output and what it took.

    Attributes:
        steps: passes that verified output; prefill is not counted.
        drafted: tree nodes verified.
        accepted: tree nodes accepted.
        accepted_by_depth: element d counts the accepted paths of more than d nodes.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop: Stop | None = None
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    def add(self, tree: TokenTree, walked: Walk) -> None:
        """Count one step, in place."""
        self.tokens += walked.tokens
        self.logprobs += walked.logprobs
        self.stop = walked.stop
        self.steps += 1
        self.drafted += len(tree)
        self.accepted += len(walked.accepted)
        for depth in range(len(walked.accepted)):
            self.accepted_by_depth[depth] += 1


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how it is to be answered.

    Attributes:
        prompt: token ids, at least one.
        sampling: what is asked; `seed` has gone into `noise_key`.
        noise_key: of `noise.noise_key`.
        speculation: the law, and what it asks of the drafter.
        adapter: that the engine computes with; the drafter does without.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    noise_key: int
    speculation: SpeculationParams = SpeculationParams()  # noqa: RUF009  frozen
    adapter: str = ""


def generate(
    engine: Engine,
    prompt: Sequence[int],
    sampling: SamplingParams,
    noise_key: int,
    drafter: Drafter | None = None,
    max_nodes: int = 16,
    chunk_tokens: int = 64,
    decode: Callable[[Sequence[int]], str] | None = None,
    speculation: SpeculationParams = SpeculationParams(),  # noqa: B008  frozen
    grammars: Grammars | None = None,
    adapter: str = "",
) -> Generation:
    """Answer one prompt; see `generate_together`."""
    request = Request(prompt, sampling, noise_key, speculation, adapter)
    return generate_together(engine, [request], drafter, max_nodes, chunk_tokens, decode, grammars)[
        0
    ]


def generate_together(
    engine: Engine,
    requests: Sequence[Request],
    drafter: Drafter | None = None,
    max_nodes: int = 16,
    chunk_tokens: int = 64,
    decode: Callable[[Sequence[int]], str] | None = None,
    grammars: Grammars | None = None,
) -> list[Generation]:
    """Answer prompts, a pass for all of them a step; plainly where there is no drafter. Blocks.

    Under `exact` numerics no answer depends on the others.

    Args:
        engine: left with the free pages that it had.
        drafter: its sessions 0, 1, .. are opened and closed here.
        max_nodes: most tree nodes of each per step, where its `speculation` leaves that open.
        chunk_tokens: most prompt tokens per prefill pass.
        decode: text of output tokens, for stop strings.
        grammars: of the model's tokenizer, for constrained requests.

    Returns:
        As many, in the requests' order.

    Raises:
        InvalidRequest: no prompt, a token id that the model lacks, a constraint that is malformed.
        PromptTooLong: prompt and output do not fit the context.
        NotServed: the engine has no such adapter.
        Overloaded: too few free pages.
        InvalidTree: the drafter does not serve the law.
    """
    with ExitStack() as held:
        sessions: list[_Session] = []
        for handle, request in enumerate(requests):
            session = _Session.begin(engine, request, max_nodes, decode, grammars)
            held.callback(engine.free, session.sequence)
            if drafter:
                held.callback(drafter.close, handle)
                draft = draft_request(
                    request.prompt, request.sampling, request.noise_key, request.speculation
                )
                drafter.open(
                    handle, replace(draft, grammar=draft_matcher(grammars, draft.sampling))
                )
            prefill(engine, session.sequence, request.prompt[:-1], chunk_tokens)
            sessions.append(session)
        while going := {k: one for k, one in enumerate(sessions) if one.done.stop is None}:
            _step(engine, going, drafter)
    return [session.done for session in sessions]


def draft_request(
    prompt: Sequence[int], sampling: SamplingParams, noise_key: int, speculation: SpeculationParams
) -> DraftRequest:
    """What `generate` tells a drafter of a prompt: the same, and it draws the same."""
    draft_key = derived_key(noise_key, "local")
    return DraftRequest(prompt, len(prompt), sampling, noise_key, speculation, draft_key)


def check_prompt(prompt: Sequence[int], sampling: SamplingParams, info: ModelInfo) -> None:
    """Refuse what the model cannot answer; see `generate`."""
    if not prompt:
        raise InvalidRequest("prompt is empty")
    for token in prompt:
        if not 0 <= token < info.vocab_size:
            raise InvalidRequest(
                f"token id {token} is unknown; the vocabulary has {info.vocab_size}"
            )
    sampling.check_vocabulary(info.vocab_size)
    if len(prompt) + sampling.max_tokens > info.context_tokens:
        raise PromptTooLong(
            f"prompt has {len(prompt)} tokens and max_tokens is {sampling.max_tokens}; "
            f"the limit is {info.context_tokens} together"
        )


def prefill(engine: Engine, sequence: KVSequence, tokens: Sequence[int], chunk_tokens: int) -> None:
    """Compute and keep the KV of a text's beginning, in passes of `chunk_tokens` rows at most."""
    for start in range(0, len(tokens), chunk_tokens):
        chunk = tokens[start : start + chunk_tokens]
        engine.forward([Segment.chain(sequence, chunk, wanted=())])
        engine.commit(sequence, range(len(chunk)))


@dataclass(slots=True)
class _Session:
    """A text while it is decoded; the last token's KV is still missing."""

    sequence: KVSequence
    picker: Picker
    stops: StopRules
    law: AcceptanceRule
    max_nodes: int
    root: int
    done: Generation = field(default_factory=Generation)

    @classmethod
    def begin(
        cls,
        engine: Engine,
        request: Request,
        max_nodes: int,
        decode: Callable[[Sequence[int]], str] | None,
        grammars: Grammars | None,
    ) -> _Session:
        """With a reservation for its longest output; see `generate_together`."""
        prompt, sampling, speculation = request.prompt, request.sampling, request.speculation
        check_prompt(prompt, sampling, engine.info)
        context = Context(prompt, grammar=matcher_for(grammars, sampling))
        max_nodes = max_nodes if speculation.max_nodes is None else speculation.max_nodes
        return cls(
            picker=Picker(sampling, request.noise_key, context),
            stops=StopRules(engine.info.eos_token_ids, sampling, decode),
            law=acceptance_rule(speculation.law),
            max_nodes=max_nodes,
            root=prompt[-1],
            sequence=engine.allocate(
                len(prompt) + sampling.max_tokens + max_nodes, request.adapter
            ),
        )

    def fit(self, tree: TokenTree) -> TokenTree:
        """As much of a tree as the law, the budget and the tokens left take."""
        self.law.check(tree)
        tokens_left = self.picker.sampling.max_tokens - len(self.done.tokens)
        return tree.limit(self.max_nodes, min(tokens_left - 1, MAX_DEPTH))

    def take(self, tree: TokenTree, rows: LogitRows) -> Walk:
        """Walk the tree that was verified."""
        walked = walk(tree, rows, self.picker, self.stops.check, self.law)
        self.done.add(tree, walked)
        self.root = walked.tokens[-1]
        return walked


def _step(engine: Engine, going: Mapping[int, _Session], drafter: Drafter | None) -> None:
    """One pass: each session's root and tree."""
    budgets = {handle: session.max_nodes for handle, session in going.items()}
    drafted = _drafted(drafter, budgets) if drafter else {}
    trees = [one.fit(drafted.get(handle, TokenTree())) for handle, one in going.items()]
    passed = engine.forward(
        [
            Segment.rooted(one.sequence, [one.root], tree)
            for one, tree in zip(going.values(), trees, strict=True)
        ]
    )
    for (handle, session), tree, rows in zip(going.items(), trees, passed, strict=True):
        walked = session.take(tree, rows)
        engine.commit(session.sequence, [0, *(node + 1 for node in walked.accepted)])
        if drafter:
            drafter.commit(handle, walked.tokens)


def _drafted(drafter: Drafter, budgets: Mapping[int, int]) -> dict[int, TokenTree]:
    """Drafted until all text is read: here nobody gains by going on without a tree."""
    trees: dict[int, TokenTree] = {}
    left = {handle: budget for handle, budget in budgets.items() if budget}
    while left:
        trees |= drafter.draft(left)
        behind = drafter.is_behind if isinstance(drafter, ModelDrafter) else lambda _: False
        left = {handle: budget for handle, budget in left.items() if behind(handle)}
    return trees

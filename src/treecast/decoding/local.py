"""The whole loop in one process, the oracle of the mesh: draft, forward, walk, commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from treecast.tree import MAX_DEPTH, ROOT, TokenTree

_HANDLE = 0


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
    """Answer one prompt; plain decoding when there is no drafter. Blocks.

    Args:
        engine: left with the free pages that it had.
        prompt: token ids, at least one.
        sampling: what is asked; `seed` has gone into `noise_key`.
        noise_key: of `noise.noise_key`.
        drafter: opened and closed here.
        max_nodes: most tree nodes per step, where `speculation` leaves that open.
        chunk_tokens: most prompt tokens per prefill pass.
        decode: text of output tokens, for stop strings.
        speculation: the law, and what it asks of the drafter.
        grammars: of the model's tokenizer, for constrained requests.
        adapter: that the engine computes with; the drafter does without.

    Raises:
        InvalidRequest: no prompt, a token id that the model lacks, a constraint that is malformed.
        PromptTooLong: prompt and output do not fit the context.
        NotServed: the engine has no such adapter.
        Overloaded: too few free pages.
        InvalidTree: the drafter does not serve the law.
    """
    check_prompt(prompt, sampling, engine.info)
    stops = StopRules(engine.info.eos_token_ids, sampling, decode)
    picker = Picker(sampling, noise_key, Context(prompt, grammar=matcher_for(grammars, sampling)))
    request = replace(
        draft_request(prompt, sampling, noise_key, speculation),
        grammar=draft_matcher(grammars, sampling),
    )
    max_nodes = max_nodes if speculation.max_nodes is None else speculation.max_nodes
    law = acceptance_rule(speculation.law)
    draft = _Draft(drafter, request, law)
    sequence = engine.allocate(len(prompt) + sampling.max_tokens + max_nodes, adapter)
    try:
        draft.open()
        prefill(engine, sequence, prompt[:-1], chunk_tokens)
        return _decode(engine, sequence, prompt[-1], picker, stops, draft, max_nodes)
    finally:
        draft.close()
        engine.free(sequence)


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


def _decode(
    engine: Engine,
    sequence: KVSequence,
    root: int,
    picker: Picker,
    stops: StopRules,
    draft: _Draft,
    max_nodes: int,
) -> Generation:
    """One pass per step: the root, whose KV is still missing, and the tree below it."""
    done = Generation()
    while done.stop is None:
        tokens_left = picker.sampling.max_tokens - len(done.tokens)
        tree = draft.tree(max_nodes, max_depth=tokens_left - 1)
        rows = _forward(engine, sequence, root, tree)
        walked = walk(tree, rows, picker, stops.check, draft.law)
        engine.commit(sequence, [0, *(node + 1 for node in walked.accepted)])
        draft.commit(walked.tokens)
        done.add(tree, walked)
        root = walked.tokens[-1]
    return done


def _forward(engine: Engine, sequence: KVSequence, root: int, tree: TokenTree) -> LogitRows:
    tokens = [root, *tree.tokens]
    parents = [-1, *(0 if parent == ROOT else parent + 1 for parent in tree.parents)]
    return engine.forward([Segment(sequence, tokens, parents, range(len(tokens)))])[0]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A drafter, or none, at work on the one session."""

    drafter: Drafter | None
    request: DraftRequest
    law: AcceptanceRule

    def open(self) -> None:
        if self.drafter:
            self.drafter.open(_HANDLE, self.request)

    def tree(self, max_nodes: int, max_depth: int) -> TokenTree:
        if not self.drafter or max_nodes == 0:
            return TokenTree()
        tree = self._grown(self.drafter, max_nodes)
        self.law.check(tree)
        return tree.limit(max_nodes, min(max_depth, MAX_DEPTH))

    def _grown(self, drafter: Drafter, max_nodes: int) -> TokenTree:
        """Drafted until the text is read: here nobody gains by going on without a tree."""
        trees = drafter.draft({_HANDLE: max_nodes})
        while isinstance(drafter, ModelDrafter) and drafter.is_behind(_HANDLE):
            trees = drafter.draft({_HANDLE: max_nodes})
        return trees.get(_HANDLE, TokenTree())

    def commit(self, tokens: Sequence[int]) -> None:
        if self.drafter:
            self.drafter.commit(_HANDLE, tokens)

    def close(self) -> None:
        if self.drafter:
            self.drafter.close(_HANDLE)

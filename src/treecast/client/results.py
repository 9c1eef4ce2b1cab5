"""What a generation yields: chunks while it runs, one result when it is done."""

from __future__ import annotations

from dataclasses import dataclass

from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.stops import FinishReason
from treecast.wire.frames import Usage
from treecast.wire.rounds import Round


@dataclass(frozen=True, slots=True)
class RoundReport:
    """How some of the output came about: one tree, and what became of it.

    Attributes:
        text: what became final with the round's tokens; a part of the chunk's text.
        node_texts: each node's token by itself; empty for a model without a tokenizer, as is
            `bonus_text`.
    """

    round: Round
    text: str
    node_texts: tuple[str, ...]
    bonus_text: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Newly generated text of one sample.

    Attributes:
        text: final text; multi-byte characters are never split, so it may be empty or lag behind
            the tokens.
        token_ids: the tokens committed with it.
        logprobs: one per token if they were asked for, else empty.
        sample_index: which of `num_samples`.
        rounds: if they were asked for, those that the tokens came from; the first 256 of a sample.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    sample_index: int = 0
    rounds: tuple[RoundReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished continuation of the prompt.

    Attributes:
        usage: what it cost, on all verifiers that served it; after the loss of a router, from then
            on. What was cached, and the numbers by depth, are the last verifier's.
        placements: verifiers that served it, one if nothing was lost.
        same_numerics: False if it went on between verifiers of different numerics, where a
            near-tie may fall differently than in an undisturbed run.
        rounds: if they were asked for, in order; their times start anew on another verifier.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    usage: Usage
    placements: int = 1
    same_numerics: bool = True
    rounds: tuple[RoundReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request. `text`, `usage` and the like are those of the first sample.

    Attributes:
        seed: the seed used, also when the router drew it; the same seed gives the same text.
        prompt_ids: the prompt as the model saw it.
        adapter: that the model was computed with; empty for none.
        resumes: how often this client had to continue the stream on a new connection.
    """

    request_id: str
    seed: int
    prompt_ids: tuple[int, ...]
    model: str
    model_revision: str
    numerics_fingerprint: str
    samples: tuple[Sample, ...]
    resumes: int = 0
    adapter: str = ""

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return self.samples[0].logprobs

    @property
    def rounds(self) -> tuple[RoundReport, ...]:
        return self.samples[0].rounds

    @property
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason

    @property
    def usage(self) -> Usage:
        return self.samples[0].usage


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for; `verifiers` serve it, some of them with `adapters` too."""

    name: str
    revision: str
    vocab_size: int
    context_tokens: int
    verifiers: int
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VerifierStatus:
    """One verifier as its router sees it."""

    address: str
    healthy: bool
    instance_id: str
    model: str
    model_revision: str
    running: int
    waiting: int
    kv_pages_free: int
    kv_pages_total: int
    speculators: tuple[str, ...]
    numerics_fingerprint: str
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Status:
    """What a router knows of its workers and queue."""

    verifiers: tuple[VerifierStatus, ...]
    queued: int
    running: int
    redis_ok: bool
    draining: bool = False

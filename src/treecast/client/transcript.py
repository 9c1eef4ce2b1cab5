"""What a request has received, and how it goes on from there: no sockets here.

The state behind both clients. One sample continues with `Resume`, so that no token is computed
twice. With several, the whole request runs again under its seed, and what had already been
received is checked and skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from treecast.errors import InvalidFrame, TreecastError
from treecast.sampling.logprobs import TokenLogprobs
from treecast.v1 import router_pb2
from treecast.wire import codec
from treecast.wire.codec.bounds import check_at_most
from treecast.wire.rounds import MAX_ROUNDS

from .results import Chunk, Result, RoundReport, Sample


@dataclass(slots=True)
class _Received:
    """One sample so far; `skip_*` count what a repeated stream will send again.

    Attributes:
        tail_characters: at the end of the text, those that came without a token: what was held back
            until the end was known, and will be told again by who is asked for the rest.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    rounds: list[RoundReport] = field(default_factory=list)
    finished: router_pb2.Finished | None = None
    tail_characters: int = 0
    skip_tokens: int = 0
    skip_characters: int = 0


class Transcript:
    """Folds responses into chunks; can say at any time how to ask for the rest."""

    def __init__(self, request: router_pb2.GenerateRequest) -> None:
        self._request = request
        self._started: router_pb2.Started | None = None
        self._samples = [_Received() for _ in range(max(request.num_samples, 1))]

    @property
    def begun(self) -> bool:
        """A response has been received."""
        return self._started is not None

    @property
    def complete(self) -> bool:
        return all(sample.finished is not None for sample in self._samples)

    @property
    def num_tokens(self) -> int:
        """Output tokens received, over all samples."""
        return sum(len(sample.token_ids) for sample in self._samples)

    @property
    def request_id(self) -> str | None:
        """Known from the first response on, or from the start if the caller chose it."""
        if self._started is not None:
            return self._started.request_id
        return self._request.request_id or None

    def next_request(self) -> router_pb2.GenerateRequest:
        """What to send now: the request, or what continues it. Resets what will be skipped."""
        if self._started is None:
            return self._request
        request = router_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.request_id = self._started.request_id
        request.model = self._started.model
        request.adapter = self._started.adapter
        request.tokens.ids[:] = self._started.prompt_ids
        request.sampling.seed = self._started.seed
        if len(self._samples) == 1:
            [sample] = self._samples
            sample.skip_characters = sample.tail_characters
            request.resume.committed.extend(sample.token_ids)
            request.resume.model_revision = self._started.model_revision
            request.resume.numerics_fingerprint = self._started.numerics_fingerprint
            request.resume.adapter_revision = self._started.adapter_revision
            return request
        for sample in self._samples:
            sample.skip_tokens, sample.skip_characters = len(sample.token_ids), len(sample.text)
        return request

    def fold(self, response: router_pb2.GenerateResponse) -> Chunk | None:
        """Take in one response; returns what is new to the caller, if anything.

        Raises:
            TreecastError: a repeated stream said something else than the first one, as it would
                again; or the response is no answer to this request.
        """
        if response.sample_index >= len(self._samples):
            raise TreecastError(
                f"the router sent sample {response.sample_index} of {len(self._samples)}"
            )
        sample = self._samples[response.sample_index]
        match response.WhichOneof("event"):
            case "started" if self._started is None:
                self._started = response.started
            case "finished":
                sample.finished = response.finished
            case "delta" if sample.finished is None:
                return self._extend(sample, response.sample_index, response.delta)
        return None

    def result(self, resumes: int) -> Result:
        """The finished request. Call it only when `complete`."""
        assert self._started is not None
        return Result(
            request_id=self._started.request_id,
            seed=self._started.seed,
            prompt_ids=tuple(self._started.prompt_ids),
            model=self._started.model,
            model_revision=self._started.model_revision,
            numerics_fingerprint=self._started.numerics_fingerprint,
            adapter=self._started.adapter,
            samples=tuple(_sample(at, got) for at, got in enumerate(self._samples)),
            resumes=resumes,
        )

    def _extend(self, sample: _Received, index: int, delta: router_pb2.Delta) -> Chunk | None:
        ids, text = tuple(delta.token_ids), delta.text
        logprobs = tuple(codec.decode_logprobs(item) for item in delta.logprobs)
        if again := min(sample.skip_tokens, len(ids)):
            at = len(sample.token_ids) - sample.skip_tokens
            if tuple(sample.token_ids[at : at + again]) != ids[:again]:
                raise TreecastError("the stream cannot go on: its tokens came out otherwise")
            ids, logprobs = ids[again:], logprobs[again:]
            sample.skip_tokens -= again
        skipped = min(sample.skip_characters, len(text))
        text = text[skipped:]
        sample.skip_characters -= skipped
        rounds = tuple(_new_rounds(delta, len(sample.token_ids)))
        sample.rounds.extend(rounds)
        sample.token_ids.extend(ids)
        sample.logprobs.extend(logprobs)
        sample.text += text
        sample.tail_characters = 0 if ids else sample.tail_characters + len(text)
        return Chunk(text, ids, logprobs, index, rounds) if ids or text else None


def _new_rounds(delta: router_pb2.Delta, num_tokens: int) -> Iterator[RoundReport]:
    """Those of tokens that were not received before."""
    check_at_most(len(delta.rounds), MAX_ROUNDS, "number of rounds in a delta")
    for item in delta.rounds:
        if item.round.from_index < num_tokens:
            continue
        one = codec.decode_round(item.round)
        if len(item.node_texts) not in (0, len(one.tree)):
            raise InvalidFrame(f"round has {len(item.node_texts)} texts of {len(one.tree)} nodes")
        yield RoundReport(one, item.text, tuple(item.node_texts), item.bonus_text)


def _sample(index: int, received: _Received) -> Sample:
    finished = received.finished
    assert finished is not None
    return Sample(
        index=index,
        text=received.text,
        token_ids=tuple(received.token_ids),
        logprobs=tuple(received.logprobs),
        finish_reason=codec.decode_finish_reason(finished.reason),
        usage=codec.decode_usage(finished.usage),
        placements=finished.placements,
        same_numerics=finished.same_numerics,
        rounds=tuple(received.rounds),
    )

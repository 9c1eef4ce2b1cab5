"""The target's own answers: recorded once, since trees change none of them under `replay`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from treecast.decoding.local import Request, generate_together
from treecast.engine.base import Engine
from treecast.engine.kv_pool import num_pages
from treecast.prefix import PAGE_TOKENS
from treecast.sampling.noise import derived_key
from treecast.sampling.params import SamplingParams
from treecast.tuning.corpus import Record, append_records, read_begun

PREFILL_TOKENS = 256
BATCH = 16
"""Questions answered at once, and answers drafted for at once."""
NOISE = 0x5EEE
"""Of all answers; whatever else changes the text for a prompt and a key changes this."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as token ids."""

    id: str
    category: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded; everything but the temperature is at its default."""

    name: str
    temperature: float

    def sampling(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=self.temperature, max_tokens=max_tokens)


GREEDY = Decoding("greedy", 0.0)
STOCHASTIC = Decoding("stochastic", 1.0)
DECODINGS = (GREEDY, STOCHASTIC)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target says to a question by itself."""

    question: Question
    decoding: Decoding
    tokens: tuple[int, ...]

    @property
    def sampling(self) -> SamplingParams:
        """As the answer was sampled, with room for exactly its tokens."""
        return self.decoding.sampling(len(self.tokens))

    @property
    def noise_key(self) -> int:
        return key_of(self.question)


def key_of(question: Question) -> int:
    """Noise of its own for every prompt: with a common one, answers would be correlated."""
    return derived_key(NOISE, repr(question.token_ids))


def record_answers(
    target: Engine, questions: Sequence[Question], decoding: Decoding, max_tokens: int
) -> list[Answer]:
    """Let the target answer, to all at once: a pass of many texts costs little more than of one.

    Blocks.

    Raises:
        Overloaded: too few free pages; see `in_batches`.
    """
    asked = [Request(q.token_ids, decoding.sampling(max_tokens), key_of(q)) for q in questions]
    answers = generate_together(target, asked, max_nodes=0, chunk_tokens=PREFILL_TOKENS)
    return [
        Answer(question, decoding, tuple(done.tokens))
        for question, done in zip(questions, answers, strict=True)
    ]


def in_batches(
    questions: Sequence[Question], room: int, pool_tokens: int
) -> Iterator[list[Question]]:
    """Neighbours, at most `BATCH` that fit the pool together with `room` positions for each."""
    batch: list[Question] = []
    taken = 0
    for question in questions:
        size = num_pages(len(question.token_ids) + room) * PAGE_TOKENS
        if batch and (len(batch) == BATCH or taken + size > pool_tokens):
            yield batch
            batch, taken = [], 0
        batch.append(question)
        taken += size
    if batch:
        yield batch


class AnswerFile:
    """Answers of one decoding in a folder, kept by the batch: a corpus that others can read too."""

    def __init__(self, folder: Path, decoding: Decoding, origin: str) -> None:
        """Read what is there; takes off a batch that an interruption cut.

        Args:
            origin: what answers depend on beside prompt and decoding; others are not read.
        """
        digest = hashlib.sha256(origin.encode()).hexdigest()[:8]
        self._file = folder / f"answers-{decoding.name}-{digest}.jsonl.gz"
        self._decoding = decoding
        known = read_begun(self._file)
        self._tokens = {record.prompt_ids: record.completion_ids for record in known}

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """Those that have no answer yet."""
        return [each for each in questions if each.token_ids not in self._tokens]

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep answers, in the file too."""
        said = {answer.question.token_ids: answer.tokens for answer in answers}
        temperature = self._decoding.temperature
        append_records(self._file, [Record(*one, temperature) for one in said.items()])
        self._tokens |= said

    def read(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to these questions, all of which have one."""
        return [Answer(each, self._decoding, self._tokens[each.token_ids]) for each in questions]

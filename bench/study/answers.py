"""The target's own answers: recorded once, since trees change none of them under `replay`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treecast.decoding.local import generate
from treecast.drafting.ngram import NgramDrafter
from treecast.engine.base import Engine
from treecast.sampling.noise import derived_key
from treecast.sampling.params import SamplingParams
from treecast.tuning.corpus import Record, append_records, read_corpus

PREFILL_TOKENS = 256
_KEY = 0x5EED


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
    """Noise of its own for every question: with a common one, answers would be correlated."""
    return derived_key(_KEY, question.id)


def record_answer(
    target: Engine, question: Question, decoding: Decoding, max_tokens: int
) -> Answer:
    """Let the target answer. Blocks. Lookup makes it quicker and changes nothing."""
    said = generate(
        target,
        question.token_ids,
        decoding.sampling(max_tokens),
        key_of(question),
        NgramDrafter(),
        chunk_tokens=PREFILL_TOKENS,
    )
    return Answer(question, decoding, tuple(said.tokens))


class AnswerFile:
    """Answers of one decoding in a folder, kept as they come: a corpus that others can read too."""

    def __init__(self, folder: Path, decoding: Decoding) -> None:
        self._file = folder / f"answers-{decoding.name}.jsonl.gz"
        self._decoding = decoding
        known = read_corpus(self._file).records if self._file.is_file() else ()
        self._tokens = {record.prompt_ids: record.completion_ids for record in known}

    def missing(self, questions: Sequence[Question]) -> list[Question]:
        """Those that have no answer yet."""
        return [each for each in questions if each.token_ids not in self._tokens]

    def add(self, answer: Answer) -> None:
        """Keep an answer, in the file too."""
        prompt, tokens = answer.question.token_ids, answer.tokens
        append_records(self._file, [Record(prompt, tokens, self._decoding.temperature)])
        self._tokens[prompt] = tokens

    def read(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to these questions, all of which have one."""
        return [Answer(each, self._decoding, self._tokens[each.token_ids]) for each in questions]

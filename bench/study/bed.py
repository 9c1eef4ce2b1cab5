"""What measurements are made with: settings, questions, and models loaded when first needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from treecast.bench.prompts import BenchPrompt, read_prompts
from treecast.checkpoints import ensure_folder
from treecast.drafting.merge import MergedDrafter
from treecast.engine.base import Engine
from treecast.prefix import PAGE_TOKENS
from treecast.services.speculator.loading import load_engines, make_drafter
from treecast.services.speculator.metrics import SpeculatorMetrics
from treecast.services.speculator.settings import DrafterSpec, SpeculatorSettings
from treecast.settings import DType, Numerics

from .answers import NOISE, Answer, AnswerFile, Decoding, Question, in_batches, record_answers


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What figures depend on, beside machine and versions. A folder holds figures of one only.

    Attributes:
        drafters: as of a speculator; all in one process.
        growth: of trees as served.
        max_nodes: of trees as served.
        num_prompts: questions asked.
        prompts_hash: of their ids and tokens; empty until they are known.
        revisions: of the weights of target and draft models; empty until they are loaded.
    """

    model: str = "default"
    draft: str = "default"
    drafters: tuple[str, ...] = ("ssm", "ngram")
    growth: str = "best-first"
    max_nodes: int = 24
    max_tokens: int = 96
    dtype: DType = "auto"
    numerics: Numerics = "exact"
    threads: int = 2
    num_prompts: int = 0
    prompts_hash: str = ""
    revisions: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """As JSON gives them back."""
        lists = {"drafters": list(self.drafters), "revisions": list(self.revisions)}
        return asdict(self) | lists

    def asking(self, questions: Sequence[Question], engines: Sequence[Engine]) -> StudySettings:
        """The same with these questions, of these models."""
        asked = repr([(question.id, question.token_ids) for question in questions]).encode()
        return replace(
            self,
            num_prompts=len(questions),
            prompts_hash=hashlib.sha256(asked).hexdigest()[:16],
            revisions=tuple(engine.info.revision for engine in engines),
        )


def ask(model: Path, prompts: Path, limit: int | None) -> list[Question]:
    """The prompts of a file as the model's chat template puts them."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def encode(prompt: BenchPrompt) -> tuple[int, ...]:
        if not tokenizer.chat_template:
            return tuple(tokenizer(prompt.text)["input_ids"])
        turn = [{"role": "user", "content": prompt.text}]
        return tuple(
            tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        )

    return [
        Question(prompt.id, prompt.category, encode(prompt))
        for prompt in read_prompts(prompts, limit)
    ]


class Bed:
    """One folder's measurements are made on one bed."""

    def __init__(
        self,
        settings: StudySettings,
        questions: Sequence[Question],
        folder: Path,
        load_target: Callable[[StudySettings], Engine] | None = None,
        load_drafts: Callable[[SpeculatorSettings], Sequence[Engine]] = load_engines,
    ) -> None:
        """Load nothing yet.

        Args:
            settings: as asked; the attribute also has what is known once models are loaded.
            folder: where answers are kept.
            load_target: by default the settings' model, in this process.
            load_drafts: the engines of the `ssm` drafters, in order.
        """
        self._asked = settings
        self.questions = tuple(questions)
        self._folder = folder
        self._load_target = load_target or _load_target
        self._load_drafts = load_drafts
        self._specs = self._speculator(settings.drafters).specs

    @cached_property
    def settings(self) -> StudySettings:
        return self._asked.asking(self.questions, [self.target, *self._drafts.values()])

    @cached_property
    def target(self) -> Engine:
        return self._load_target(self._asked)

    @cached_property
    def _drafts(self) -> dict[str, Engine]:
        """Draft models by drafter name."""
        engines = self._load_drafts(self._speculator(self._asked.drafters))
        return dict(zip([spec.name for spec in self.drafts], engines, strict=True))

    @property
    def specs(self) -> tuple[DrafterSpec, ...]:
        """The drafters asked for."""
        return self._specs

    @property
    def drafts(self) -> tuple[DrafterSpec, ...]:
        """Those of them that are models."""
        return tuple(spec for spec in self.specs if spec.kind == "ssm")

    def drafter(self, specs: Sequence[DrafterSpec]) -> MergedDrafter:
        """New drafters over the loaded models, merged."""
        texts = [f"ssm={spec.model}" if spec.model else spec.kind for spec in specs]
        engines = [self._drafts[spec.name] for spec in specs if spec.kind == "ssm"]
        return make_drafter(self._speculator(texts), engines, SpeculatorMetrics())

    def missing(self, decoding: Decoding) -> Iterator[list[Question]]:
        """Questions that the target has not answered yet, in batches."""
        yield from self.together(self._file(decoding).missing(self.questions))

    def together(
        self, questions: Sequence[Question], max_nodes: int = 0
    ) -> Iterator[list[Question]]:
        """Batches that the target can answer at once, with trees of so many nodes."""
        pool_tokens = self.target.usage.total * PAGE_TOKENS
        yield from in_batches(questions, self._asked.max_tokens + max_nodes, pool_tokens)

    def record(self, questions: Sequence[Question], decoding: Decoding) -> None:
        """Have the target answer, and keep it."""
        answers = record_answers(self.target, questions, decoding, self._asked.max_tokens)
        self._file(decoding).add(answers)

    def answers(self, decoding: Decoding) -> list[Answer]:
        """The recorded answers to all questions."""
        return self._file(decoding).read(self.questions)

    def _file(self, decoding: Decoding) -> AnswerFile:
        origin = f"{self.target.info.fingerprint} {self._asked.max_tokens} {NOISE}"
        return AnswerFile(self._folder, decoding, origin)

    def _speculator(self, drafters: Sequence[str]) -> SpeculatorSettings:
        settings = self._asked
        flags = {
            "drafters": ",".join(drafters),
            "model": settings.draft,
            "growth": settings.growth,
            "dtype": settings.dtype,
            "torch-threads": settings.threads,
        }
        return SpeculatorSettings.load([f"--{k}={v}" for k, v in flags.items()], "treecast bench")


def _load_target(settings: StudySettings) -> Engine:
    from treecast.engine.hf import HFEngine

    return HFEngine.load(
        ensure_folder(settings.model),
        dtype=settings.dtype,
        numerics=settings.numerics,
        threads=settings.threads,
    )

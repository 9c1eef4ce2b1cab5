"""What all drafts of a run share: corpus, held-out records, the target and its labels."""

import hashlib
from dataclasses import dataclass
from typing import Any

from treecast.engine.loading import DTYPES, resolve_dtype
from treecast.model_folder import check_model_dir, model_revision
from treecast.tuning.batches import Split, shared_prefix, split_records
from treecast.tuning.corpus import Corpus, Record, check_vocabulary, read_corpus
from treecast.tuning.labels import Teacher
from treecast.tuning.plain_head import check_plain_head
from treecast.tuning.settings import TuneSettings


@dataclass(frozen=True)
class Material:
    """Read once per run; only the teacher changes, by what it remembers."""

    corpus: Corpus
    split: Split
    target: Any
    first: int | None  # place of the first token to learn; None learns completions alone
    teacher: Teacher
    identity: str  # a hash of all this

    @property
    def records(self) -> tuple[Record, ...]:
        return self.corpus.records

    @property
    def vocab_size(self) -> int:
        return int(self.target.config.vocab_size)


def gather(settings: TuneSettings) -> Material:
    """Read the corpus and load the target. Blocks.

    Raises:
        ModelError: the target is no causal LM, or its logits are not its head's rows alone.
        CorpusError: the corpus has no complete record, or token ids beyond the vocabulary.
    """
    check_model_dir(settings.target)
    corpus = read_corpus(settings.corpus)
    records = corpus.records
    split = split_records(records, settings.heldout_fraction, settings.heldout_limit, settings.seed)
    target = _load_target(settings)
    check_plain_head(target)
    check_vocabulary(records, target.config.vocab_size)
    first = shared_prefix(records) if settings.learn_user_turns else None
    revision = model_revision(settings.target)
    teacher = Teacher(target, revision, records, first, settings.teacher_top_k)
    return Material(corpus, split, target, first, teacher, _identity(settings, records, first))


def _load_target(settings: TuneSettings) -> Any:
    from transformers import AutoModelForCausalLM

    target: Any = AutoModelForCausalLM.from_pretrained(
        settings.target, dtype=DTYPES[resolve_dtype("auto")]
    )
    return target.eval().requires_grad_(False)


def _identity(settings: TuneSettings, records: tuple[Record, ...], first: int | None) -> str:
    digest = hashlib.sha256(model_revision(settings.target).encode())
    digest.update(repr((settings.batch_size, settings.seed, settings.heldout_fraction)).encode())
    digest.update(repr((settings.heldout_limit, settings.teacher_share)).encode())
    digest.update(repr((first, settings.teacher_top_k, len(records))).encode())
    digest.update(repr([record.token_ids for record in records]).encode())
    return digest.hexdigest()

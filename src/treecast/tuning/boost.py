"""Tune a draft on what its target writes.

SpecInfer boosts a collective of drafts, one after the other, each on what those before it miss.
This trains its first member. The next would be one more `_Run`, its batches narrowed to the
positions that the first draft's guesses do not hold (`heldout` counts the same thing).

Source: Miao et al., arXiv 2305.09781, section 3.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from treecast.checkpoints import assemble_draft, check_model_dir, model_revision
from treecast.errors import ModelError
from treecast.tuning.batches import Batch, epoch_batches, make_batch, shared_prefix, split_records
from treecast.tuning.corpus import check_vocabulary, read_corpus
from treecast.tuning.cut_head import CutHead
from treecast.tuning.draft import cut_draft, default_layers, save_trained
from treecast.tuning.head_loss import frozen_head_loss
from treecast.tuning.heldout import top_success
from treecast.tuning.labels import Labels, Teacher, hard_labels
from treecast.tuning.optimizer import MasterAdamW
from treecast.tuning.settings import ProgressFn, TuneProgress, TuneReport, TuneSettings

TRAINED_FILE = "trained.safetensors"

_PROGRESS_EVERY_S = 5.0
_PROGRESS_HELDOUT = 24
# Tokens outside the corpus would drift up unseen if no step ever looked at them.
_WHOLE_HEAD_EVERY = 8
_LOSS_SMOOTHING = 0.98


def tune(settings: TuneSettings, progress: ProgressFn | None = None) -> TuneReport:
    """Train a draft and write it to `settings.out` as a model folder.

    Blocks until the deadline. Safe to interrupt and to run again: training goes on from the last
    checkpoint in `out/training`. A finished run leaves the trained weights alone there, and
    running it again starts anew.

    Raises:
        ModelError: the target is no causal LM, a layer is out of range, or the checkpoint in
            `out` belongs to other settings.
        CorpusError: the corpus has no complete record, or token ids beyond the vocabulary.
    """
    run = _Run(settings)
    run.resume()
    run.train(progress or (lambda _progress: None))
    return run.finish()


class _Run:
    """One draft in training: its weights, its labels, and its place in the corpus."""

    def __init__(self, settings: TuneSettings) -> None:
        check_model_dir(settings.target)
        self.settings = settings
        self.corpus = read_corpus(settings.corpus)
        self.records = self.corpus.records
        self.split = split_records(len(self.records), settings.heldout_fraction, settings.seed)
        target = _load_target(settings.target)
        check_vocabulary(self.records, target.config.vocab_size)
        num_layers = target.config.num_hidden_layers
        self.layers = settings.layers or default_layers(min(2, num_layers), num_layers)
        self.draft = cut_draft(target, self.layers)
        self.optimizer = MasterAdamW(self.draft)
        self.first = shared_prefix(self.records) if settings.learn_user_turns else None
        self.teacher = Teacher(target, self.records, self.first, settings.teacher_top_k)
        self.cut_head = CutHead(self.draft.get_output_embeddings().weight, self.records)
        self.num_steps, self.epoch, self.place = 0, 0, 0
        self.elapsed_s, self.loss = 0.0, 0.0

    @property
    def checkpoint_file(self) -> Path:
        return self.settings.out / "training" / "checkpoint.pt"

    def train(self, progress: ProgressFn) -> None:
        """Step until the deadline; mutates the draft, and writes checkpoints on the way."""
        started = time.monotonic() - self.elapsed_s
        shown_s = saved_s = first_s = self.elapsed_s
        num_targets = 0
        for batch in self._batches():
            self.elapsed_s = time.monotonic() - started
            if (done := self._share_done()) >= 1.0:
                return
            self._step(batch, learning_rate=self._learning_rate(done))
            num_targets += len(batch.next_ids)
            rate = num_targets / max(self.elapsed_s - first_s, 1e-9)
            if self.elapsed_s - saved_s >= self.settings.checkpoint_every_s:
                saved_s = shown_s = self.elapsed_s
                self.save()
                progress(self._progress(rate, self._heldout(_PROGRESS_HELDOUT)))
            elif self.elapsed_s - shown_s >= _PROGRESS_EVERY_S:
                shown_s = self.elapsed_s
                progress(self._progress(rate, None))

    def finish(self) -> TuneReport:
        """Measure the draft on all held-out records, write its folder, drop the checkpoint."""
        success = self._heldout(len(self.split.heldout))
        self.save_trained(success)
        assemble_draft(self._trained_file, self.settings.target, self.settings.out)
        self.checkpoint_file.unlink(missing_ok=True)
        return TuneReport(
            out=self.settings.out,
            layers=self.layers,
            num_steps=self.num_steps,
            num_epochs=self.epoch,
            elapsed_s=self.elapsed_s,
            loss=self.loss,
            heldout_success=success,
            num_records=len(self.records),
            num_heldout=len(self.split.heldout),
            corpus_problems=self.corpus.problems,
        )

    def save(self) -> None:
        """Write the checkpoint, all or nothing, and the trained weights beside it."""
        state = {
            "identity": self._identity(),
            "place": (self.num_steps, self.epoch, self.place, self.elapsed_s, self.loss),
            "optimizer": self.optimizer.state_dict(),
            "teacher": self.teacher.state_dict(),
        }
        self.checkpoint_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_file)
        self.save_trained(())

    def save_trained(self, success: tuple[float, ...]) -> None:
        notes = {"heldout_success": json.dumps([round(share, 4) for share in success])}
        save_trained(self.draft, self.layers, self._trained_file, notes)

    def resume(self) -> None:
        """Take up the checkpoint of an interrupted run, if there is one.

        Raises:
            ModelError: it was trained from another corpus, target or layers.
        """
        if not self.checkpoint_file.is_file():
            return
        state = torch.load(self.checkpoint_file, weights_only=True)
        if state["identity"] != self._identity():
            raise ModelError(
                f"{self.checkpoint_file} belongs to another corpus, target or choice of layers; "
                "remove it, or name another output folder"
            )
        self.num_steps, self.epoch, self.place, self.elapsed_s, self.loss = state["place"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.teacher.load_state_dict(state["teacher"])

    @property
    def _trained_file(self) -> Path:
        return self.settings.out / "training" / TRAINED_FILE

    def _identity(self) -> str:
        """What a checkpoint depends on, hashed."""
        settings = self.settings
        digest = hashlib.sha256(model_revision(settings.target).encode())
        digest.update(repr((self.layers, settings.batch_size, settings.seed)).encode())
        digest.update(repr((self.first, settings.teacher_top_k, len(self.records))).encode())
        digest.update(repr([record.token_ids for record in self.records]).encode())
        return digest.hexdigest()

    def _batches(self) -> Iterator[Batch]:
        """Batches from the run's place on, epoch after epoch, without end."""
        while True:
            seed = f"{self.settings.seed}:{self.epoch}"
            batches = epoch_batches(self.records, self.split.train, self.settings.batch_size, seed)
            while self.place < len(batches):
                # Advanced first: a checkpoint taken during a step must not repeat its batch.
                self.place += 1
                yield make_batch(self.records, batches[self.place - 1], self.first)
            self.epoch, self.place = self.epoch + 1, 0

    def _share_done(self) -> float:
        """How much of the run is over, by time or by steps, 0 to 1."""
        by_time = self.elapsed_s / (60.0 * self.settings.minutes)
        by_steps = self.num_steps / (self.settings.max_steps or float("inf"))
        return max(by_time, by_steps)

    def _learning_rate(self, done: float) -> float:
        warmup = min(1.0, (self.num_steps + 1) / self.settings.warmup_steps)
        return self.settings.learning_rate * warmup * (1.0 - done)

    def _step(self, batch: Batch, learning_rate: float) -> None:
        labels = self._labels(batch)
        hidden = self.draft.base_model(input_ids=batch.input_ids, use_cache=False)[0]
        rows = hidden.flatten(0, 1)[batch.places]
        if self.num_steps % _WHOLE_HEAD_EVERY == 0:
            head = self.draft.get_output_embeddings().weight
        else:
            head, labels = self.cut_head.weight, self.cut_head.renumber(labels)
        loss = frozen_head_loss(rows, head, labels.ids, labels.weights)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(learning_rate)
        value = float(loss.detach())
        smoothing = _LOSS_SMOOTHING if self.num_steps else 0.0
        self.loss = smoothing * self.loss + (1.0 - smoothing) * value
        self.num_steps += 1

    def _labels(self, batch: Batch) -> Labels:
        if self.settings.teacher_share == 0.0:
            return hard_labels(batch)
        return self.teacher.labels(batch, self.settings.teacher_share)

    def _heldout(self, num_records: int) -> tuple[float, ...]:
        return top_success(self.draft, self.records, self.split.heldout[:num_records])

    def _progress(
        self, targets_per_s: float, heldout_success: tuple[float, ...] | None
    ) -> TuneProgress:
        return TuneProgress(
            num_steps=self.num_steps,
            epoch=self.epoch,
            elapsed_s=self.elapsed_s,
            loss=self.loss,
            targets_per_s=targets_per_s,
            heldout_success=heldout_success,
        )


def _load_target(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    target: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    return target.eval().requires_grad_(False)

"""One draft in training: its weights, its place in the corpus, its checkpoint."""

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treecast.checkpoints import assemble_draft, read_trained
from treecast.errors import ModelError
from treecast.tuning.batches import Batch, epoch_batches, make_batch
from treecast.tuning.cut_head import HeadRows, frequent_tokens, used_tokens
from treecast.tuning.draft import check_assembles, cut_draft, load_start, save_trained
from treecast.tuning.head_loss import frozen_head_loss
from treecast.tuning.heldout import completion_tokens, guesses_of, heldout_guesses, success
from treecast.tuning.labels import Labels, hard_labels
from treecast.tuning.material import Material
from treecast.tuning.optimizer import MasterAdamW
from treecast.tuning.settings import DraftReport, ProgressFn, TuneProgress, TuneSettings
from treecast.tuning.whole_file import write_whole

TRAINING = "training"
TRAINED_FILE = "trained.safetensors"

_PROGRESS_EVERY_S = 5.0
_PROGRESS_HELDOUT = 24
# Tokens outside the corpus would drift up unseen if no step ever looked at them.
_WHOLE_HEAD_EVERY = 8
_LOSS_SMOOTHING = 0.98
_FINISHED = "finished"
_COVERED = "covered.pt"


@dataclass(frozen=True)
class DraftPlan:
    """One member of the collective: name and folder, shape, minutes, and weights to start from."""

    name: str
    out: Path
    layers: tuple[int, ...]
    minutes: float
    start: Path | None = None


class DraftRun:
    """Trains one draft on what those before it miss."""

    def __init__(
        self,
        settings: TuneSettings,
        material: Material,
        plan: DraftPlan,
        dropped: Mapping[int, Tensor],
    ) -> None:
        """`dropped` tells by record which positions earlier drafts predict (bool)."""
        self.settings, self.material, self.plan, self.dropped = settings, material, plan, dropped
        self.draft = cut_draft(material.target, plan.layers)
        if plan.start is not None:
            load_start(self.draft, plan.layers, plan.start)
        self.optimizer = MasterAdamW(self.draft)
        self.cut_head = self._cut_head()
        self.num_steps, self.epoch, self.place = 0, 0, 0
        self.elapsed_s, self.loss = 0.0, 0.0
        self._num_shards = 0

    @property
    def head_token_ids(self) -> Tensor | None:
        """What the draft can propose; None is every token."""
        return self.cut_head.token_ids if self.settings.head_rows else None

    def run(self, progress: ProgressFn) -> DraftReport:
        """Train to the end, or take what an earlier run finished. Blocks."""
        finished = self._resume()
        if finished is not None:
            return finished
        check_assembles(self.draft, self.plan.layers, self.settings.target, self._training)
        self.train(progress)
        return self.finish()

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

    def finish(self) -> DraftReport:
        """Measure the draft as stored on all held-out records, and write its folder."""
        self._save_trained({})
        self._covered_file.unlink(missing_ok=True)
        self.draft.load_state_dict(read_trained(self._trained_file).tensors, strict=False)
        shares = self._heldout(len(self.material.split.heldout))
        notes = {"heldout_success": json.dumps([round(share, 4) for share in shares])}
        self._save_trained(notes)
        assemble_draft(self._trained_file, self.settings.target, self.plan.out)
        report = self._report(shares)
        kept = {
            "identity": self._identity(),
            "schedule": self._schedule,
            "num_shards": self._num_shards,
        }
        fields = json.dumps(kept | asdict(report), default=str)
        write_whole(self._training / f"{_FINISHED}.json", fields.encode())
        self._checkpoint_file.unlink(missing_ok=True)
        return report

    def forget(self) -> None:
        """Remove what only a resumed run needs; the trained weights stay."""
        for pattern in (f"{_FINISHED}.json", "labels-*.pt", _COVERED):
            for file in self._training.glob(pattern):
                file.unlink()

    def covered(self) -> dict[int, Tensor]:
        """By training record: which positions are dropped, or predicted by this draft.

        Kept in a file: near-ties may come out otherwise in another process, and what the next draft
        learns must not change while it is trained.
        """
        if not self._covered_file.is_file():
            write_whole(self._covered_file, _serialised(self._count_covered()))
        covered: dict[int, Tensor] = torch.load(self._covered_file, weights_only=True)
        return covered

    @torch.no_grad()
    def _count_covered(self) -> dict[int, Tensor]:
        covered: dict[int, Tensor] = {}
        head, token_ids = self.draft.get_output_embeddings().weight, self.head_token_ids
        if token_ids is not None:
            head = self.cut_head.weight
        indices = self.material.split.train
        for start in range(0, len(indices), self.settings.batch_size):
            chosen = indices[start : start + self.settings.batch_size]
            batch = make_batch(self.material.records, chosen, self.material.first)
            rows = guesses_of(self.draft, batch, head, 1).squeeze(1)
            hits = (rows if token_ids is None else token_ids[rows]) == batch.next_ids
            owner = batch.places // batch.input_ids.shape[1]
            for row, index in enumerate(chosen):
                hit = hits[owner == row]
                covered[index] = hit | self.dropped[index] if index in self.dropped else hit
        return covered

    def save(self) -> None:
        """Write the checkpoint, all or nothing, and the trained weights beside it."""
        if unsaved := self.material.teacher.take_unsaved():
            write_whole(self._shard(self._num_shards), _serialised(unsaved))
            self._num_shards += 1
        state = {
            "identity": self._identity(),
            "place": (self.num_steps, self.epoch, self.place, self.elapsed_s, self.loss),
            "num_shards": self._num_shards,
            "optimizer": self.optimizer.state_dict(),
        }
        write_whole(self._checkpoint_file, _serialised(state))
        self._save_trained({})

    def _resume(self) -> DraftReport | None:
        """Take up the checkpoint of an interrupted run, if there is one.

        Returns:
            The report, where the draft was finished.
        Raises:
            ModelError: it was trained from another corpus, target or layers, or was finished in
                another time.
        """
        finished = self._training / f"{_FINISHED}.json"
        if finished.is_file():
            fields = json.loads(finished.read_text())
            self._check_identity(finished, fields.pop("identity"))
            self._check_schedule(finished, fields.pop("schedule"))
            self._num_shards = fields.pop("num_shards")
            self._restore_labels()
            self.draft.load_state_dict(read_trained(self._trained_file).tensors, strict=False)
            return _read_report(fields)
        if self._checkpoint_file.is_file():
            state = torch.load(self._checkpoint_file, weights_only=True)
            self._check_identity(self._checkpoint_file, state["identity"])
            self.num_steps, self.epoch, self.place, self.elapsed_s, self.loss = state["place"]
            self.optimizer.load_state_dict(state["optimizer"])
            self._num_shards = state["num_shards"]
            self._restore_labels()
        return None

    def _restore_labels(self) -> None:
        """What the target said while this draft was trained serves those after it too."""
        for number in range(self._num_shards):
            self.material.teacher.restore(torch.load(self._shard(number), weights_only=True))

    @property
    def _training(self) -> Path:
        return self.plan.out / TRAINING

    @property
    def _checkpoint_file(self) -> Path:
        return self._training / "checkpoint.pt"

    @property
    def _covered_file(self) -> Path:
        return self._training / _COVERED

    @property
    def _trained_file(self) -> Path:
        return self._training / TRAINED_FILE

    def _shard(self, number: int) -> Path:
        return self._training / f"labels-{number:05d}.pt"

    def _check_identity(self, file: Path, identity: str) -> None:
        if identity != self._identity():
            raise ModelError(
                f"{file} belongs to another corpus, target or choice of layers; "
                "remove it, or name another output folder"
            )

    @property
    def _schedule(self) -> dict[str, float | None]:
        """How long a draft is trained, and how fast: drafts that are compared have the same."""
        settings = self.settings
        return {
            "minutes": self.plan.minutes,
            "max_steps": settings.max_steps,
            "learning_rate": settings.learning_rate,
        }

    def _check_schedule(self, file: Path, schedule: dict[str, float | None]) -> None:
        for name, value in self._schedule.items():
            if schedule[name] != value:
                raise ModelError(
                    f"{file} was finished with {name} {schedule[name]}, and now it is {value}; "
                    "remove it, or name another output folder"
                )

    def _identity(self) -> str:
        """What a checkpoint depends on, hashed."""
        shape = (self.plan.layers, self.settings.head_rows, self.settings.storage)
        digest = hashlib.sha256(f"{self.material.identity}{shape}".encode())
        if self.plan.start is not None:
            digest.update(self.plan.start.read_bytes())
        for index in sorted(self.dropped):
            digest.update(self.dropped[index].numpy().tobytes())
        return digest.hexdigest()

    def _cut_head(self) -> HeadRows:
        head = self.draft.get_output_embeddings().weight
        train = [self.material.records[i] for i in self.material.split.train]
        if self.settings.head_rows:
            ids = frequent_tokens(train, len(head), self.settings.head_rows)
        else:
            ids = used_tokens(train, len(head))
        return HeadRows(head, ids)

    def _batches(self) -> Iterator[Batch]:
        """Batches from the run's place on, epoch after epoch, without end."""
        records, split = self.material.records, self.material.split
        while True:
            seed = f"{self.settings.seed}:{self.epoch}"
            batches = epoch_batches(records, split.train, self.settings.batch_size, seed)
            while self.place < len(batches):
                # Advanced first: a checkpoint taken during a step must not repeat its batch.
                self.place += 1
                chosen = batches[self.place - 1]
                yield make_batch(records, chosen, self.material.first, self.dropped)
            self.epoch, self.place = self.epoch + 1, 0

    def _share_done(self) -> float:
        """How much of the run is over, by time or by steps, 0 to 1."""
        by_time = self.elapsed_s / (60.0 * self.plan.minutes)
        by_steps = self.num_steps / (self.settings.max_steps or float("inf"))
        return max(by_time, by_steps)

    def _learning_rate(self, done: float) -> float:
        warmup = min(1.0, (self.num_steps + 1) / self.settings.warmup_steps)
        return self.settings.learning_rate * warmup * (1.0 - done)

    def _step(self, batch: Batch, learning_rate: float) -> None:
        labels = self._labels(batch)
        hidden = self.draft.base_model(input_ids=batch.input_ids, use_cache=False)[0]
        rows = hidden.flatten(0, 1)[batch.places]
        if not self.settings.head_rows and self.num_steps % _WHOLE_HEAD_EVERY == 0:
            head = self.draft.get_output_embeddings().weight
        else:
            cut = self.cut_head.renumber(labels)
            head, labels, rows = self.cut_head.weight, cut.labels, rows[cut.kept]
        self.num_steps += 1
        if not len(rows):
            return
        loss = frozen_head_loss(rows, head, labels.ids, labels.weights)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(learning_rate)
        value = float(loss.detach())
        smoothing = _LOSS_SMOOTHING if self.num_steps > 1 else 0.0
        self.loss = smoothing * self.loss + (1.0 - smoothing) * value

    def _labels(self, batch: Batch) -> Labels:
        if self.settings.teacher_share == 0.0:
            return hard_labels(batch)
        return self.material.teacher.labels(batch, self.settings.teacher_share)

    def _heldout(self, num_records: int) -> tuple[float, ...]:
        indices = self.material.split.heldout[:num_records]
        guesses = heldout_guesses(self.draft, self.material.records, indices, self.head_token_ids)
        return success(guesses, completion_tokens(self.material.records, indices))

    def _save_trained(self, notes: dict[str, str]) -> None:
        save_trained(
            self.draft,
            self.plan.layers,
            self._trained_file,
            notes,
            self.settings.storage,
            self.head_token_ids,
        )

    def _report(self, heldout_success: tuple[float, ...]) -> DraftReport:
        num_left = sum(int((~gone).sum()) for gone in self.dropped.values())
        num_positions = sum(len(gone) for gone in self.dropped.values())
        return DraftReport(
            name=self.plan.name,
            out=self.plan.out,
            layers=self.plan.layers,
            head_rows=self.settings.head_rows or self.material.vocab_size,
            stored_bytes=self._trained_file.stat().st_size,
            num_steps=self.num_steps,
            num_epochs=self.epoch,
            elapsed_s=self.elapsed_s,
            loss=self.loss,
            train_share=num_left / num_positions if num_positions else 1.0,
            heldout_success=heldout_success,
        )

    def _progress(
        self, targets_per_s: float, heldout_success: tuple[float, ...] | None
    ) -> TuneProgress:
        return TuneProgress(
            draft=self.plan.name,
            num_steps=self.num_steps,
            epoch=self.epoch,
            elapsed_s=self.elapsed_s,
            loss=self.loss,
            targets_per_s=targets_per_s,
            heldout_success=heldout_success,
        )


def _serialised(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _read_report(fields: dict[str, Any]) -> DraftReport:
    report = DraftReport(**fields)
    return replace(
        report,
        out=Path(report.out),
        layers=tuple(report.layers),
        heldout_success=tuple(report.heldout_success),
    )

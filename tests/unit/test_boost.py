"""Several drafts in turn, cut heads, kills and full disks: whole runs on a tiny target."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from treecast.bench.families.check import save_random_model
from treecast.checkpoints import HEAD_TOKENS, read_trained
from treecast.engine.base import Segment
from treecast.engine.hf import HFEngine
from treecast.engine.loading import LoadOptions, load_model
from treecast.errors import ModelError
from treecast.tuning.batch_decode import decode_batch, greedy, nucleus
from treecast.tuning.batches import make_batch
from treecast.tuning.boost import tune
from treecast.tuning.corpus import Record, TopTokens, read_corpus, write_corpus
from treecast.tuning.draft import cut_draft, load_start, save_trained
from treecast.tuning.draft_run import DraftRun
from treecast.tuning.heldout import success, union_sizes, union_success
from treecast.tuning.labels import Teacher
from treecast.tuning.settings import TuneProgress, TuneReport, TuneSettings
from treecast.tuning.whole_file import write_whole

from .tiny_target import VOCAB, tiny_target


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, which wait for each other on busy cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def settings(tmp_path: Path) -> TuneSettings:
    """Texts that count up from 4 + i; what follows 20 depends on the prompt, so nobody knows it."""
    tiny_target().save_pretrained(tmp_path / "target")
    records = [Record((1, 2, 3 + i % 20), tuple(range(4 + i % 20, 16 + i % 20))) for i in range(60)]
    write_corpus(tmp_path / "corpus.jsonl", records)
    return TuneSettings(
        target=tmp_path / "target",
        corpus=tmp_path / "corpus.jsonl",
        out=tmp_path / "draft",
        minutes=1e6,  # so that steps alone set the pace, and runs can be compared
        max_steps=12,
        learning_rate=1e-2,
        warmup_steps=5,
        teacher_share=0.0,
        checkpoint_every_s=0.0,
    )


def weights(file: Path) -> dict[str, torch.Tensor]:
    return dict(read_trained(file).tensors)


def same_weights(one: Path, other: Path) -> bool:
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


# --- the union ---------------------------------------------------------------------------------


def test_union_counts_a_token_once_whoever_guesses_it() -> None:
    truth = torch.tensor([1, 2, 3, 4])
    one = torch.tensor([[1, 9], [8, 2], [7, 9], [7, 9]])  # right at 1st, at 2nd, never, never
    two = torch.tensor([[1, 8], [9, 8], [9, 3], [7, 8]])  # right at 1st, never, at 2nd, never
    assert success(one, truth) == (0.25, 0.5)
    assert success(two, truth) == (0.25, 0.5)
    assert union_success([one, two], truth) == (0.25, 0.75)
    # Distinct first guesses: 1, 2, 2, 1; of both guesses: 3, 3, 3, 3.
    assert union_sizes([one, two]) == (1.5, 3.0)


# --- boosting ----------------------------------------------------------------------------------


def test_next_draft_learns_only_what_the_first_one_misses(settings: TuneSettings) -> None:
    report = tune(replace(settings, drafts=2, max_steps=10))
    first, second = report.drafts
    assert (first.train_share, first.out, second.out) == (
        1.0,
        settings.out / "draft-1",
        settings.out / "draft-2",
    )
    draft = AutoModelForCausalLM.from_pretrained(first.out, dtype=torch.bfloat16)
    # The oracle: the share of positions whose next token is not the first draft's best guess.
    missed = positions = 0
    records = read_corpus(settings.corpus).records
    heldout = {records[i].prompt_ids for i in _heldout_indices(settings, records)}
    for record in records:
        if record.prompt_ids in heldout:
            continue
        logits = draft(torch.tensor([record.token_ids])).logits[0].float()
        guesses = logits[1:-1].argmax(dim=-1).tolist()  # all prompts begin with 1, 2
        missed += sum(a != b for a, b in zip(guesses, record.token_ids[2:], strict=True))
        positions += len(guesses)
    assert 0.1 < second.train_share < 0.9
    assert second.train_share == pytest.approx(missed / positions, abs=0.02)


def _heldout_indices(settings: TuneSettings, records: tuple[Record, ...]) -> tuple[int, ...]:
    from treecast.tuning.batches import split_records

    return split_records(records, settings.heldout_fraction, 200, settings.seed).heldout


def test_union_is_at_least_as_good_as_each_draft_and_beside_a_single_one(
    settings: TuneSettings,
) -> None:
    report = tune(replace(settings, drafts=2, layers=((0, 3), (3,)), compare_single=True))
    assert [draft.layers for draft in report.drafts] == [(0, 3), (3,)]
    assert report.single is not None
    assert report.single.layers == (0, 2, 3)
    assert report.single.num_steps == 12
    for draft in report.drafts:
        pairs = zip(report.union_success, draft.heldout_success, strict=True)
        assert all(union >= alone for union, alone in pairs)
    assert len(report.single_ranks) == 10
    assert list(report.single_ranks[:5]) == pytest.approx(report.single.heldout_success)
    page = (settings.out / "report.md").read_text()
    assert "| union |" in page
    assert "With equally many guesses the union is better than the single draft at" in page
    fields = json.loads((settings.out / "report.json").read_text())
    assert fields["union_success"] == list(report.union_success)
    assert not list(settings.out.glob("*/training/finished.json"))


def test_finished_draft_is_kept_when_the_second_was_interrupted(
    settings: TuneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    learn = Teacher._learn
    monkeypatch.setattr(
        Teacher, "_learn", lambda teacher, indices: (asked.extend(indices), learn(teacher, indices))
    )
    both = replace(settings, drafts=2, teacher_share=0.5)
    whole = tune(replace(both, out=settings.out.with_name("whole")))
    asked.clear()

    class Interrupted(Exception):
        pass

    def stop(state: TuneProgress) -> None:
        if (state.draft, state.num_steps) == ("draft-2", 5):
            raise Interrupted

    with pytest.raises(Interrupted):
        tune(both, stop)
    with pytest.raises(ModelError, match=r"finished with max_steps 12, and now it is 13; remove"):
        tune(replace(both, max_steps=13))
    seen: list[TuneProgress] = []
    before = set(asked)
    asked.clear()
    # Near-ties may come out otherwise in another process: nobody may count anew what is dropped.
    monkeypatch.delattr(DraftRun, "_count_covered")
    resumed = tune(both, seen.append)
    assert before
    assert not before & set(asked)  # what the target said while the first was trained is kept
    assert {(state.draft, state.num_steps) for state in seen[:1]} == {("draft-2", 6)}
    assert "draft-1" not in {state.draft for state in seen}
    assert resumed.union_success == whole.union_success
    for one, other in zip(resumed.drafts, whole.drafts, strict=True):
        assert replace(one, out=other.out, elapsed_s=0.0) == replace(other, elapsed_s=0.0)
        assert same_weights(
            one.out / "training" / "trained.safetensors",
            other.out / "training" / "trained.safetensors",
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafts": 0}, "drafts is 0; it must be 1 or more"),
        ({"minutes": float("nan")}, "minutes is nan; it must be a number above 0"),
        ({"layers": ((0,), (3,))}, "2 lists of layers for 1 drafts"),
        (
            {"head_rows": 9, "drafts": 2, "compare_single": True},
            "a head of 9 tokens is too small for the single draft's 10 guesses",
        ),
        ({"head_rows": 49}, "a head of 49 tokens is out of range; allowed: 5..48"),
    ],
)
def test_tune_refuses_when_settings_are_out_of_range(
    settings: TuneSettings, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        tune(replace(settings, **change))
    assert caught.value.message == message


@pytest.mark.parametrize(("drafts", "place"), [(1, "."), (2, "draft-2"), (2, "single")])
def test_tune_refuses_when_a_folder_holds_a_model_that_is_no_draft(
    settings: TuneSettings, drafts: int, place: str
) -> None:
    folder = settings.out / place
    tiny_target(vocab_size=40).save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        tune(replace(settings, drafts=drafts, compare_single=place == "single"))
    assert caught.value.message == (
        f"{folder} holds a model that was not tuned there; name another folder"
    )
    # The control: the folder of a finished draft is trained anew.
    (folder / "training").mkdir()
    tune(replace(settings, drafts=drafts, compare_single=place == "single", max_steps=1))


def test_tune_refuses_when_the_folder_is_the_target_s(settings: TuneSettings) -> None:
    (settings.target / "training").mkdir()
    with pytest.raises(ModelError, match=f"^{settings.target} is the target's own folder"):
        tune(replace(settings, out=settings.target))


def test_tune_refuses_when_it_would_overwrite_its_start(settings: TuneSettings) -> None:
    (draft,) = tune(replace(settings, max_steps=1)).drafts
    start = draft.out / "training" / "trained.safetensors"
    held = start.read_bytes()
    with pytest.raises(ModelError) as caught:
        tune(replace(settings, start=(start,)))
    assert caught.value.message == (
        f"the start {start} would be overwritten; name another output folder"
    )
    assert start.read_bytes() == held


def test_tune_refuses_before_the_first_step_when_a_later_draft_does_not_fit_its_start(
    settings: TuneSettings, tmp_path: Path
) -> None:
    deep, shallow = tmp_path / "deep", tmp_path / "shallow"
    for file, layers in ((deep, (0, 2)), (shallow, (2,))):
        save_trained(cut_draft(tiny_target(), layers), layers, file, {})
    asked = replace(settings, drafts=2, layers=((0, 2), (2,)), start=(deep,), max_steps=2)
    with pytest.raises(ModelError) as lacking:
        tune(asked, lambda _: pytest.fail("a step was taken"))
    assert lacking.value.message == f"{deep} has layers [0, 2]; the draft has [2], which lacks [0]"
    assert len(tune(replace(asked, start=(deep, shallow))).drafts) == 2  # one for each


# --- other families ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "mpt"])
def test_draft_is_loadable_when_the_family_names_its_sizes_otherwise(
    settings: TuneSettings, family: str
) -> None:
    save_random_model(family, settings.target)
    (draft,) = tune(replace(settings, layers=((1,),), max_steps=1)).drafts
    loaded, found = AutoModelForCausalLM.from_pretrained(draft.out, output_loading_info=True)
    assert not found["missing_keys"]
    assert loaded.config.num_hidden_layers == 1
    # Of global and local layers, the second is local.
    assert getattr(loaded.config, "attention_layers", ["local"]) == ["local"]


def test_tune_refuses_before_the_first_step_when_a_draft_could_not_be_assembled(
    settings: TuneSettings,
) -> None:
    (settings.target / "model.safetensors").unlink()
    torch.save(tiny_target().state_dict(), settings.target / "pytorch_model.bin")
    seen: list[TuneProgress] = []
    with pytest.raises(ModelError, match=r"has no safetensors to take the embedding from"):
        tune(settings, seen.append)
    assert not seen


def test_tune_refuses_before_the_first_step_when_out_cannot_be_written(
    settings: TuneSettings,
) -> None:
    settings.out.write_text("a file")
    seen: list[TuneProgress] = []
    with pytest.raises(ModelError, match=f"no draft of .* can be made in {settings.out}"):
        tune(settings, seen.append)
    assert not seen


def test_draft_drops_nothing_out_when_its_success_is_measured(settings: TuneSettings) -> None:
    save_random_model("gpt2", settings.target)
    target = AutoModelForCausalLM.from_pretrained(settings.target)
    draft = cut_draft(target, (0, 1))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(draft(ids).logits, target.eval()(ids).logits)


# --- starting from weights ---------------------------------------------------------------------


def test_deeper_draft_computes_what_its_start_did_until_it_is_trained(tmp_path: Path) -> None:
    target = tiny_target()
    start = cut_draft(target, (0, 3))
    with torch.no_grad():
        for param in start.parameters():
            if param.requires_grad:
                param.add_(0.05)
    save_trained(start, (0, 3), tmp_path / "start", {})
    deeper = cut_draft(target, (0, 1, 3))
    ids = torch.tensor([[1, 5, 9, 13]])
    before = deeper(ids).logits
    load_start(deeper, (0, 1, 3), tmp_path / "start")
    torch.testing.assert_close(deeper(ids).logits, start(ids).logits, rtol=0.02, atol=0.02)
    assert not torch.allclose(before, start(ids).logits, rtol=0.02, atol=0.02)


def test_start_is_refused_when_its_vocabulary_or_layers_differ(tmp_path: Path) -> None:
    file = tmp_path / "start"
    save_trained(cut_draft(tiny_target(vocab_size=40), (0, 3)), (0, 3), file, {})
    with pytest.raises(ModelError) as caught:
        load_start(cut_draft(tiny_target(), (0, 3)), (0, 3), file)
    assert caught.value.message == (
        f"draft weights {file} have vocabulary size 40; the target has 48"
    )
    save_trained(cut_draft(tiny_target(), (0, 3)), (0, 3), file, {})
    with pytest.raises(ModelError) as lacking:
        load_start(cut_draft(tiny_target(), (0, 1)), (0, 1), file)
    assert (
        lacking.value.message == f"{file} has layers [0, 3]; the draft has [0, 1], which lacks [3]"
    )


# --- cut heads ---------------------------------------------------------------------------------


def test_served_draft_gives_the_full_head_s_logits_for_the_tokens_that_it_kept(
    settings: TuneSettings,
) -> None:
    (draft,) = tune(replace(settings, head_rows=30, max_steps=20)).drafts
    kept = read_trained(draft.out / "training" / "trained.safetensors").head_token_ids
    assert kept is not None
    assert len(kept) == draft.head_rows == 30
    whole = AutoModelForCausalLM.from_pretrained(draft.out, dtype=torch.float32)
    text = [1, 2, 7, 8, 9]
    expected = whole(torch.tensor([text])).logits[0, -1]

    engine = HFEngine.load(draft.out, dtype="float32", numerics="fast")
    assert engine.info.vocab_size == VOCAB
    (rows,) = engine.forward([Segment.chain(engine.allocate(8), text, [4])])
    logits = torch.from_numpy(rows[0].copy())
    torch.testing.assert_close(logits[list(kept)], expected[list(kept)], rtol=1e-4, atol=1e-4)
    cut = [token for token in range(VOCAB) if token not in kept]
    assert logits[cut].eq(-torch.inf).all()


def test_cut_head_is_refused_when_its_tokens_are_no_part_of_the_vocabulary(
    settings: TuneSettings,
) -> None:
    (draft,) = tune(replace(settings, head_rows=30, max_steps=1)).drafts
    config = json.loads((draft.out / "config.json").read_text())
    for ids, complaint in (
        ([3, 4, 48], "head_token_ids go from 3 to 48; the vocabulary has 48"),
        ([4, 3], "head_token_ids are 2 ids that do not ascend"),
    ):
        (draft.out / "config.json").write_text(json.dumps(config | {HEAD_TOKENS: ids}))
        with pytest.raises(ModelError) as caught:
            HFEngine.load(draft.out)
        assert caught.value.message == complaint


# --- labels that the corpus brings -------------------------------------------------------------


def test_teacher_takes_labels_from_the_corpus_when_it_has_them(tmp_path: Path) -> None:
    target = tiny_target()
    plain = Record((1, 2, 7, 3), (6, 4, 4))
    learned = Teacher(target, "mine", [plain], 2, top_k=4)
    batch = make_batch([plain], (0,), first=2)
    expected = learned.labels(batch, share=0.6)
    ((ids, probs),) = learned.take_unsaved().values()
    noted = replace(plain, top=TopTokens(ids.numpy(), probs.numpy(), "mine"))
    write_corpus(tmp_path / "corpus.jsonl.gz", [noted])

    (read,) = read_corpus(tmp_path / "corpus.jsonl.gz").records
    taught = Teacher(None, "mine", [read], 2, top_k=4)  # without a target, it can only read
    labels = taught.labels(batch, share=0.6)
    assert torch.equal(labels.ids, expected.ids)
    assert torch.equal(labels.weights, expected.weights)
    assert taught.take_unsaved() == {}


@pytest.mark.parametrize("revision", ["another", ""])
def test_teacher_asks_the_target_when_another_model_noted_its_labels(revision: str) -> None:
    wrong = TopTokens(np.full((6, 4), 9, np.int32), np.full((6, 4), 0.25, np.float16), revision)
    plain = Record((1, 2, 7, 3), (6, 4, 4))
    target, batch = tiny_target(), make_batch([plain], (0,), first=2)
    expected = Teacher(target, "mine", [plain], 2, top_k=4).labels(batch, share=0.6)
    labels = Teacher(target, "mine", [replace(plain, top=wrong)], 2, top_k=4).labels(batch, 0.6)
    assert torch.equal(labels.ids, expected.ids)


# --- kills and full disks ----------------------------------------------------------------------

_CHILD = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from treecast.tuning.boost import tune
from treecast.tuning.settings import TuneSettings
torch.set_num_threads(1)
settings = TuneSettings(
    target=Path(sys.argv[1]), corpus=Path(sys.argv[2]), out=Path(sys.argv[3]), minutes=1e6,
    max_steps=int(sys.argv[4]), learning_rate=1e-2, warmup_steps=5, teacher_share=0.7,
    teacher_top_k=4, checkpoint_every_s=0.0,
)
tune(settings, lambda now: print("step", now.num_steps, flush=True))
"""


def test_run_goes_on_from_its_last_checkpoint_when_it_was_killed(settings: TuneSettings) -> None:
    settings = replace(settings, teacher_share=0.7, teacher_top_k=4, max_steps=40)
    whole = tune(replace(settings, out=settings.out.with_name("whole")))
    folders = map(str, (settings.target, settings.corpus, settings.out))
    command = [sys.executable, "-c", _CHILD, *folders, "40"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        reached = 0
        for line in child.stdout:
            reached = int(line.split()[1])
            if reached == 6:
                os.kill(child.pid, signal.SIGKILL)
                break
        assert child.wait() == -signal.SIGKILL
    assert reached == 6

    seen: list[TuneProgress] = []
    resumed = tune(settings, seen.append)
    # Every step was saved before it was told: nothing that was told is lost, nothing done twice.
    assert 7 <= seen[0].num_steps < 40
    assert seen[-1].num_steps == 40
    assert _trained(resumed).keys() == _trained(whole).keys()
    assert all(torch.equal(w, _trained(whole)[name]) for name, w in _trained(resumed).items())


def _trained(report: TuneReport) -> dict[str, torch.Tensor]:
    return weights(report.drafts[0].out / "training" / "trained.safetensors")


def test_checkpoint_is_whole_and_the_run_goes_on_when_the_disk_was_full(
    settings: TuneSettings,
) -> None:
    training = settings.out / "training"
    partial = training / ".partial-checkpoint.pt"

    def fill(state: TuneProgress) -> None:
        if state.num_steps == 4:
            partial.symlink_to("/dev/full")  # the next write fails as on a full disk

    with pytest.raises(ModelError) as caught:
        tune(settings, fill)
    assert caught.value.message.startswith(f"cannot write {training / 'checkpoint.pt'} (0.")
    assert caught.value.message.endswith(
        "MB): No space left on device; what was there before is whole, "
        "and the same command goes on from it"
    )
    assert not partial.is_symlink()
    seen: list[TuneProgress] = []
    tune(settings, seen.append)
    assert seen[0].num_steps == 5


def test_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    write_whole(file, b"old")
    (tmp_path / "deep" / ".partial-file").symlink_to("/dev/full")
    with pytest.raises(ModelError, match=r"cannot write .* No space left on device"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in file.parent.iterdir()] == ["file"]
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"


# --- batched decoding --------------------------------------------------------------------------


def test_batch_decodes_what_each_text_does_alone(tmp_path: Path) -> None:
    tiny_target().save_pretrained(tmp_path / "target")
    model = load_model(tmp_path / "target", LoadOptions("float32", "fast", "cpu", None))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float32)
    prompts = [(1, 5), (1, 9, 4, 30, 7), (1, 8, 3)]
    expected = [_greedy_alone(plain, prompt, 8) for prompt in prompts]
    stop = expected[1][3]  # at the latest the second text ends early, and leaves the batch
    ends = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in expected]
    decoded = decode_batch(model, prompts, greedy, 8, frozenset([stop]), top_k=3, first=1)
    assert [list(tokens) for tokens in decoded.tokens] == ends
    assert {len(tokens) for tokens in ends} != {8}
    for prompt, tokens, top in zip(prompts, ends, decoded.top, strict=True):
        assert top is not None
        logits = plain(torch.tensor([[*prompt, *tokens]])).logits[0, :-1]
        best = logits.softmax(dim=-1).topk(3, dim=-1)
        assert top.ids.tolist() == best.indices.tolist()
        torch.testing.assert_close(
            torch.from_numpy(top.probs).float(), best.values, rtol=0.0, atol=2e-3
        )


def _greedy_alone(model: Any, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_nucleus_draws_only_from_the_tokens_that_hold_the_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    draws = nucleus(1.0, 0.75, torch.Generator().manual_seed(1))(logits)
    counts = torch.bincount(draws, minlength=4) / len(draws)
    # .5 + .3 reach .75; renormalised .625 and .375; four standard errors are .031.
    assert counts[2:].tolist() == [0.0, 0.0]
    assert float(counts[0]) == pytest.approx(0.625, abs=0.031)
    # At half the temperature, weights are squared: .25, .09, ..; .25 / .3450 < .75 < .34 / .345.
    cold = nucleus(0.5, 0.75, torch.Generator().manual_seed(1))(logits)
    assert float((cold == 0).float().mean()) == pytest.approx(0.25 / 0.34, abs=0.031)

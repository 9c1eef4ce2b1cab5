"""Corpus, batches, labels and losses against slow oracles; a whole run on a tiny target."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from treecast.bench.families.check import save_random_model
from treecast.errors import CorpusError, ModelError, PromptTooLong
from treecast.tuning.batches import epoch_batches, make_batch, shared_prefix, split_records
from treecast.tuning.boost import tune
from treecast.tuning.corpus import (
    Record,
    TopTokens,
    append_records,
    read_corpus,
    write_corpus,
)
from treecast.tuning.cut_head import HeadRows, frequent_tokens, used_tokens
from treecast.tuning.draft import cut_draft, default_layers
from treecast.tuning.head_loss import frozen_head_loss
from treecast.tuning.heldout import (
    completion_tokens,
    heldout_guesses,
    success,
)
from treecast.tuning.labels import Labels, Teacher
from treecast.tuning.plain_head import check_plain_head
from treecast.tuning.selfplay import SelfPlaySettings, chat_frame, generate_corpus
from treecast.tuning.settings import TuneProgress, TuneReport, TuneSettings

from .tiny_target import VOCAB, tiny_target

ONE = Record((1, 2, 3), (4, 5))
TWO = Record((1, 2, 7, 3), (6, 4, 4))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, which wait for each other on busy cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# --- corpus -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_corpus_comes_back_when_written_and_appended(tmp_path: Path, name: str) -> None:
    write_corpus(tmp_path / name, [ONE])
    append_records(tmp_path / name, [TWO])
    corpus = read_corpus(tmp_path / name)
    assert corpus.records == (ONE, TWO)
    assert corpus.problems == ()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_corpus_keeps_complete_records_when_cut_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, [ONE, TWO, ONE])
    path.write_bytes(path.read_bytes()[:-20])
    corpus = read_corpus(path)
    assert corpus.records == (ONE, TWO)
    assert len(corpus.problems) == 1
    line = '{"prompt_ids": [1, 2, 3], "completion_ids": [4, 5]}\n'
    assert corpus.problems == (
        f"corpus {path}: line 3 dropped: not a complete JSON object ({len(line) - 20} bytes)",
    )


def test_corpus_keeps_complete_records_when_gzip_is_cut_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    records = [Record((1, 2, i), (i, i + 1, i + 2)) for i in range(20_000)]
    write_corpus(path, records)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    corpus = read_corpus(path)
    num_kept = len(corpus.records)
    assert 5_000 < num_kept < 15_000
    assert corpus.records == tuple(records[:num_kept])
    assert len(corpus.problems) == 1
    assert corpus.problems[0].startswith(f"corpus {path}: line {num_kept + 1} dropped: Compressed")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt_ids": [1]}', "completion_ids is not a list of token ids"),
        ('{"prompt_ids": [], "completion_ids": [1]}', "prompt_ids is not a list of token ids"),
        (
            '{"prompt_ids": [1, -2], "completion_ids": [1]}',
            "prompt_ids holds something other than token ids",
        ),
        (
            '{"prompt_ids": [true], "completion_ids": [1]}',
            "prompt_ids holds something other than token ids",
        ),
        ("[1, 2]", "not a JSON object but list"),
    ],
)
def test_corpus_names_the_line_when_it_is_malformed(
    tmp_path: Path, line: str, complaint: str
) -> None:
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, [ONE])
    with path.open("a") as stream:
        stream.write(line + "\n")
    append_records(path, [TWO])
    corpus = read_corpus(path)
    assert corpus.records == (ONE, TWO)
    assert corpus.problems == (f"corpus {path}: line 2 dropped: {complaint}",)


def test_corpus_raises_when_missing_or_without_a_record(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with pytest.raises(CorpusError) as missing:
        read_corpus(path)
    assert missing.value.message == f"corpus {path} does not exist"
    path.write_text('{"prompt')
    with pytest.raises(CorpusError) as empty:
        read_corpus(path)
    assert empty.value.message == (
        f"corpus {path} holds no complete record; "
        f"corpus {path}: line 1 dropped: not a complete JSON object (8 bytes)"
    )


def test_corpus_says_why_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(CorpusError) as caught:
        append_records(path, [ONE])
    assert caught.value.message == (
        f"cannot write corpus {path}: No space left on device; its complete records stay, "
        "and the same command goes on from them"
    )


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ('"temperature": -1', "temperature is -1; it must be a number of 0 or more"),
        ('"top": {"top_k": 1, "ids": "AA", "probs": ""}', "top is not what tuning writes: "),
        (
            '"top": {"top_k": 1, "ids": "AQAAAA==", "probs": ""}',
            "top has 1 and 0 rows for 2 tokens",
        ),
    ],
)
def test_corpus_names_the_line_when_what_was_noted_is_malformed(
    tmp_path: Path, entry: str, complaint: str
) -> None:
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, [ONE])
    with path.open("a") as stream:
        stream.write(f'{{"prompt_ids": [1], "completion_ids": [2], {entry}}}\n')
    corpus = read_corpus(path)
    assert corpus.records == (ONE,)
    assert corpus.problems[0].startswith(f"corpus {path}: line 2 dropped: {complaint}")


def test_temperatures_take_turns_and_are_written_down(self_play: SelfPlaySettings) -> None:
    played = replace(self_play, answer_temperatures=(0.0, 1.5), top_k=2)
    generate_corpus(played)
    records = read_corpus(played.out).records
    assert [record.temperature for record in records] == [0.0] * 3 + [1.5] * 3 + [0.0]
    for record in records:
        assert record.top is not None
        # The user's text, the template behind it and the answer: all but the opening.
        assert record.top.ids.shape == (len(record.token_ids) - 2, 2)
    greedy = [r for r in records if r.temperature == 0.0]
    for record in greedy:
        assert record.top is not None
        rows = record.top.ids[-len(record.completion_ids) :, 0]
        assert rows.tolist() == list(record.completion_ids)


def test_corpus_raises_when_gz_is_not_gzip(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_text('{"prompt_ids": [1], "completion_ids": [1]}\n')
    with pytest.raises(CorpusError, match=r"line 1 dropped: Not a gzipped file"):
        read_corpus(path)


# --- batches ----------------------------------------------------------------------------------


def test_shared_prefix_counts_the_first_tokens_in_common() -> None:
    assert shared_prefix([ONE, TWO]) == 2
    assert shared_prefix([ONE, ONE]) == 3


def test_split_is_disjoint_and_whole_and_holds_out_at_least_one() -> None:
    records = [Record((1, i), (5,)) for i in range(40)]
    split = split_records(records, 0.05, limit=200, seed=3)
    assert len(split.heldout) == 2
    assert sorted(split.train + split.heldout) == list(range(40))
    assert len(split_records(records[:4], 0.05, limit=200, seed=3).heldout) == 1
    assert len(split_records(records, 0.5, limit=7, seed=3).heldout) == 7


def test_split_keeps_a_prompt_on_one_side_and_measures_on_greedy_answers_alone() -> None:
    records = [Record((1, i), (5,), float(n)) for i in range(8) for n in range(3)]
    split = split_records(records, 0.5, limit=200, seed=3)
    assert len(split.train) == 4 * 3
    assert len(split.heldout) == 4
    assert {records[i].temperature for i in split.heldout} == {0.0}
    trained = {records[i].prompt_ids for i in split.train}
    assert not trained & {records[i].prompt_ids for i in split.heldout}
    with pytest.raises(CorpusError, match=r"none of the 12 records held out was answered greedily"):
        split_records([Record((1, i), (5,), 1.0) for i in range(24)], 0.5, limit=200, seed=3)


def test_batch_predicts_completions_alone_when_no_first_place_is_given() -> None:
    batch = make_batch([ONE, TWO], (0, 1), first=None)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 0, 0], [1, 2, 7, 3, 6, 4, 4]]
    assert batch.places.tolist() == [2, 3, 10, 11, 12]
    assert batch.next_ids.tolist() == [4, 5, 6, 4, 4]


def test_batch_predicts_user_turns_too_when_their_first_place_is_given() -> None:
    batch = make_batch([ONE, TWO], (1,), first=2)
    assert batch.places.tolist() == [1, 2, 3, 4, 5]
    assert batch.next_ids.tolist() == [7, 3, 6, 4, 4]


def test_epoch_holds_every_record_once_and_depends_on_the_seed_alone() -> None:
    records = [Record((1,), tuple([3] * (1 + i % 7))) for i in range(50)]
    indices = list(range(3, 50))
    batches = epoch_batches(records, indices, 8, "a")
    assert sorted(index for batch in batches for index in batch) == indices
    assert max(map(len, batches)) == 8
    assert batches == epoch_batches(records, indices, 8, "a")
    assert batches != epoch_batches(records, indices, 8, "b")


# --- losses and labels ------------------------------------------------------------------------


def test_head_loss_and_gradient_equal_plain_cross_entropy() -> None:
    torch.manual_seed(1)
    head = torch.randn(VOCAB, 16)
    label_ids = torch.randint(0, VOCAB, (600, 3))
    weights = torch.rand(600, 3)
    weights /= weights.sum(dim=1, keepdim=True)
    hidden = torch.randn(600, 16, requires_grad=True)
    oracle_hidden = hidden.detach().clone().requires_grad_()
    soft = torch.zeros(600, VOCAB).scatter_add_(1, label_ids, weights)

    loss = frozen_head_loss(hidden, head, label_ids, weights)
    oracle = F.cross_entropy(oracle_hidden @ head.T, soft)
    torch.autograd.backward([2.0 * loss, 2.0 * oracle])

    torch.testing.assert_close(loss, oracle, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, oracle_hidden.grad, rtol=1e-4, atol=1e-6)


def test_cut_head_renumbers_labels_and_shares_out_lost_weight() -> None:
    head = torch.arange(10.0).unsqueeze(1)
    cut = HeadRows(head, used_tokens([Record((1, 4), (9,))], 10))
    assert cut.weight.flatten().tolist() == [1.0, 4.0, 9.0]
    labels = Labels(torch.tensor([[4, 9, 7]]), torch.tensor([[0.25, 0.25, 0.5]]))
    renumbered = cut.renumber(labels)
    assert renumbered.labels.ids.tolist() == [[1, 2, 0]]
    assert renumbered.labels.weights.tolist() == [[0.5, 0.5, 0.0]]
    assert renumbered.kept.tolist() == [True]


def test_cut_head_leaves_out_positions_that_keep_no_weight() -> None:
    cut = HeadRows(torch.arange(10.0).unsqueeze(1), torch.tensor([1, 4]))
    labels = Labels(torch.tensor([[7, 8], [4, 8]]), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    renumbered = cut.renumber(labels)
    assert renumbered.kept.tolist() == [False, True]
    assert renumbered.labels.ids.tolist() == [[1, 0]]
    assert renumbered.labels.weights.tolist() == [[1.0, 0.0]]


def test_frequent_tokens_are_the_most_counted_and_the_lowest_where_equal() -> None:
    records = [Record((9, 9, 9, 8, 8), (7, 7, 3, 5))]
    assert frequent_tokens(records, 10, 5).tolist() == [3, 5, 7, 8, 9]
    assert frequent_tokens(records, 10, 6).tolist() == [0, 3, 5, 7, 8, 9]
    with pytest.raises(ModelError) as caught:
        frequent_tokens(records, 10, 11)
    assert caught.value.message == "a head of 11 tokens is out of range; allowed: 5..10"


def test_teacher_labels_are_the_target_s_own_probabilities() -> None:
    target = tiny_target()
    batch = make_batch([ONE, TWO], (1, 0), first=None)
    labels = Teacher(target, "", [ONE, TWO], None, top_k=4).labels(batch, share=0.6)

    alone = [target(torch.tensor([record.token_ids])).logits[0].float() for record in (TWO, ONE)]
    probs = torch.cat([alone[0][3:6], alone[1][2:4]]).softmax(dim=-1)
    top = probs.topk(4, dim=-1)
    assert labels.ids[:, 0].tolist() == [6, 4, 4, 4, 5]
    assert torch.allclose(labels.weights.sum(dim=1), torch.ones(5))
    assert torch.allclose(labels.weights[:, 0], torch.tensor(0.4))
    expected = 0.6 * top.values / top.values.sum(dim=1, keepdim=True)
    # The batch of two rounds otherwise than each alone, in bfloat16.
    torch.testing.assert_close(labels.weights[:, 1:], expected, rtol=0.0, atol=0.02)


def test_top_success_equals_a_count_one_token_at_a_time() -> None:
    draft = tiny_target()
    records = [ONE, TWO, Record((1, 9), tuple(range(3, 40)))]
    head = draft.get_output_embeddings().weight.float()
    hits, num_targets = [0] * 5, 0
    for record in records:
        for place in range(len(record.prompt_ids), len(record.token_ids)):
            hidden = draft.model(torch.tensor([record.token_ids[:place]]))[0][0, -1].float()
            ranked = (head @ hidden).argsort(descending=True).tolist()
            rank = ranked.index(record.token_ids[place])
            hits = [count + (rank <= guess) for guess, count in enumerate(hits)]
            num_targets += 1
    # A near-tie may fall the other way in a batch of another shape: one token of 42 at most.
    expected = tuple(count / num_targets for count in hits)
    assert num_targets == 42
    guesses = heldout_guesses(draft, records, (0, 1, 2))
    truth = completion_tokens(records, (0, 1, 2))
    assert success(guesses, truth) == pytest.approx(expected, abs=1.01 / 42)
    assert expected[4] > 0.0


# --- drafts -----------------------------------------------------------------------------------


def test_default_layers_are_spread_from_first_to_last() -> None:
    assert default_layers(1, 30) == (29,)
    assert default_layers(2, 30) == (0, 29)
    assert default_layers(4, 30) == (0, 10, 19, 29)
    with pytest.raises(ModelError) as caught:
        default_layers(5, 4)
    assert caught.value.message == "a draft cannot have 5 layers; its target allows 1 to 4"


def test_cut_of_all_layers_computes_what_the_target_does() -> None:
    target = tiny_target()
    ids = torch.tensor([[1, 5, 9, 13]])
    assert torch.equal(cut_draft(target, (0, 1, 2, 3))(ids).logits, target(ids).logits)
    assert not torch.equal(cut_draft(target, (1, 0, 2, 3))(ids).logits, target(ids).logits)


def test_cut_freezes_embedding_and_head_alone() -> None:
    draft = cut_draft(tiny_target(), (0, 3))
    frozen = [name for name, p in draft.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert len(draft.model.layers) == draft.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((0, 4), "layer 4 is out of range; the target has 0..3"),
        ((1, 1), "layers [1, 1] name a layer twice"),
    ],
)
def test_cut_raises_when_layers_are_wrong(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        cut_draft(tiny_target(), layers)
    assert caught.value.message == message


# --- a whole run ------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> TuneSettings:
    """A tiny target, and a corpus with a rule that is quick to learn: the next id is one more."""
    tiny_target().save_pretrained(tmp_path / "target")
    records = [Record((1, 2, 3 + i % 20), tuple(range(4 + i % 20, 16 + i % 20))) for i in range(60)]
    write_corpus(tmp_path / "corpus.jsonl", records)
    return TuneSettings(
        target=tmp_path / "target",
        corpus=tmp_path / "corpus.jsonl",
        out=tmp_path / "draft",
        minutes=1e6,  # so that steps alone set the pace, and runs can be compared
        max_steps=40,
        learning_rate=1e-2,
        warmup_steps=5,
        teacher_share=0.0,
        checkpoint_every_s=0.0,
    )


def run(settings: TuneSettings) -> tuple[TuneReport, list[TuneProgress]]:
    seen: list[TuneProgress] = []
    return tune(settings, seen.append), seen


def draft_weights(report: TuneReport) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(report.drafts[0].out).state_dict())


def test_loss_falls_and_heldout_success_rises_when_tuned(settings: TuneSettings) -> None:
    report, seen = run(settings)
    assert seen[0].loss > 3.0
    assert report.drafts[0].loss < 0.7 * seen[0].loss
    (draft,) = report.drafts
    assert draft.heldout_success[0] > 0.8
    assert list(draft.heldout_success) == sorted(draft.heldout_success)
    assert report.union_success == draft.heldout_success
    assert (draft.num_steps, report.num_records, report.num_heldout) == (40, 60, 3)
    assert draft.layers == (0, 3)


def test_out_is_a_model_folder_when_a_run_is_finished(settings: TuneSettings) -> None:
    report, _ = run(replace(settings, max_steps=3))
    draft = AutoModelForCausalLM.from_pretrained(report.drafts[0].out)
    target = AutoModelForCausalLM.from_pretrained(settings.target)
    assert draft.config.num_hidden_layers == 2
    assert torch.equal(draft.get_input_embeddings().weight, target.get_input_embeddings().weight)
    assert [path.name for path in (report.drafts[0].out / "training").iterdir()] == [
        "trained.safetensors"
    ]


class Interrupted(Exception):
    pass


def interrupt_at(step: int) -> Any:
    def progress(state: TuneProgress) -> None:
        if state.num_steps == step:
            raise Interrupted

    return progress


@pytest.mark.parametrize("teacher_share", [0.0, 0.7])
def test_resumed_run_ends_where_an_uninterrupted_one_does(
    settings: TuneSettings, tmp_path: Path, teacher_share: float
) -> None:
    settings = replace(settings, max_steps=12, teacher_share=teacher_share, teacher_top_k=4)
    whole, _ = run(replace(settings, out=tmp_path / "whole"))
    with pytest.raises(Interrupted):
        tune(settings, interrupt_at(step=5))
    resumed, seen = run(settings)

    assert seen[0].num_steps == 6
    assert resumed.drafts[0].num_steps == whole.drafts[0].num_steps == 12
    assert resumed.drafts[0].loss == whole.drafts[0].loss
    expected = draft_weights(whole)
    assert all(torch.equal(w, expected[name]) for name, w in draft_weights(resumed).items())


def test_run_starts_anew_when_there_is_no_checkpoint(settings: TuneSettings) -> None:
    """The control of the test above: without the checkpoint, steps are counted from 1."""
    settings = replace(settings, max_steps=12)
    with pytest.raises(Interrupted):
        tune(settings, interrupt_at(step=5))
    (settings.out / "training" / "checkpoint.pt").unlink()
    assert run(settings)[1][0].num_steps == 1


def test_run_refuses_a_checkpoint_when_the_corpus_is_another(settings: TuneSettings) -> None:
    with pytest.raises(Interrupted):
        tune(settings, interrupt_at(step=1))
    append_records(settings.corpus, [ONE])
    with pytest.raises(ModelError) as caught:
        tune(settings)
    assert caught.value.message == (
        f"{settings.out / 'training' / 'checkpoint.pt'} belongs to another corpus, target or "
        "choice of layers; remove it, or name another output folder"
    )


def test_run_refuses_a_corpus_when_an_id_is_beyond_the_vocabulary(settings: TuneSettings) -> None:
    append_records(settings.corpus, [Record((1,), (VOCAB,))])
    with pytest.raises(CorpusError) as caught:
        tune(settings)
    assert caught.value.message == "corpus record 61 has token id 48; the vocabulary has 48"


def test_run_refuses_a_corpus_when_a_noted_id_is_beyond_the_vocabulary(
    settings: TuneSettings,
) -> None:
    top = TopTokens(np.array([[4, VOCAB + 1]], np.int32), np.array([[0.5, 0.5]], np.float16))
    append_records(settings.corpus, [replace(ONE, top=top)])
    with pytest.raises(CorpusError) as caught:
        tune(settings)
    assert caught.value.message == "corpus record 61 has token id 49; the vocabulary has 48"


def test_run_refuses_a_corpus_when_it_has_one_record(settings: TuneSettings) -> None:
    write_corpus(settings.corpus, [ONE])
    with pytest.raises(CorpusError) as caught:
        tune(settings)
    assert caught.value.message == "the corpus has 1 complete record; tuning needs 2"


def test_run_ends_when_its_minutes_are_over(settings: TuneSettings) -> None:
    report, _ = run(replace(settings, minutes=1e-9, max_steps=None))
    assert report.drafts[0].num_steps == 0


# --- self-play --------------------------------------------------------------------------------


@pytest.fixture
def chat_target(tmp_path: Path) -> Path:
    target = tiny_target()
    target.save_pretrained(tmp_path / "chat")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "user": 3, "bot": 4}
    words |= {f"w{i}": i for i in range(5, VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %} <s> bot"
    )
    wrapped.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


@pytest.fixture
def self_play(chat_target: Path, tmp_path: Path) -> SelfPlaySettings:
    return SelfPlaySettings(
        target=chat_target,
        out=tmp_path / "played.jsonl.gz",
        num_records=7,
        batch_size=3,
        max_user_tokens=4,
        max_answer_tokens=6,
        dtype="float32",
    )


def test_chat_frame_splits_the_template_around_the_user_text(chat_target: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(chat_target)
    frame = chat_frame(tokenizer)
    assert (frame.before_ids, frame.after_ids) == ((1, 3), (2, 1, 4))


def test_answers_are_the_target_s_greedy_text_when_self_played(
    self_play: SelfPlaySettings,
) -> None:
    counts: list[tuple[int, int]] = []
    assert generate_corpus(self_play, lambda done, wanted: counts.append((done, wanted))) == 7
    assert counts == [(3, 7), (6, 7), (7, 7)]
    target = AutoModelForCausalLM.from_pretrained(self_play.target, dtype=torch.float32)
    for record in read_corpus(self_play.out).records:
        assert record.prompt_ids[:2] == (1, 3)
        assert record.prompt_ids[-3:] == (2, 1, 4)
        assert 0 <= len(record.prompt_ids) - 5 <= 4
        logits = target(torch.tensor([record.token_ids])).logits[0]
        start = len(record.prompt_ids) - 1
        greedy = tuple(logits[start:-1].argmax(dim=-1).tolist())
        assert greedy == record.completion_ids
        assert len(record.completion_ids) == 6 or record.completion_ids[-1] == 2


def test_user_turns_begin_as_told_in_turn_when_there_are_openings(
    self_play: SelfPlaySettings,
) -> None:
    """Of unlike lengths in one batch; the answers are still the target's own."""
    opened = replace(self_play, openings=("w7", "w9 w10 w11"))
    generate_corpus(opened)
    target = AutoModelForCausalLM.from_pretrained(opened.target, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(opened.target)
    expected = [tuple(tokenizer.encode(o, add_special_tokens=False)) for o in opened.openings]
    assert [len(opening) for opening in expected] == [1, 3]
    for place, record in enumerate(read_corpus(opened.out).records):
        opening = expected[place % 2]
        assert record.prompt_ids[: 2 + len(opening)] == (1, 3, *opening)
        assert 0 <= len(record.prompt_ids) - 5 - len(opening) <= 4
        logits = target(torch.tensor([record.token_ids])).logits[0]
        start = len(record.prompt_ids) - 1
        assert tuple(logits[start:-1].argmax(dim=-1).tolist()) == record.completion_ids


def test_self_play_is_refused_when_an_opening_leaves_no_room(self_play: SelfPlaySettings) -> None:
    long = replace(self_play, openings=("w7", "w8 " * 2000))
    with pytest.raises(PromptTooLong, match=r"^an exchange may have \d+ tokens with the longest"):
        generate_corpus(long)
    assert not self_play.out.exists()


@pytest.mark.parametrize("openings", [("",), ("w7", "w8 w9")], ids=["none", "two"])
def test_self_play_goes_on_to_the_same_corpus_when_it_was_cut(
    self_play: SelfPlaySettings, tmp_path: Path, openings: tuple[str, ...]
) -> None:
    self_play = replace(self_play, openings=openings)
    generate_corpus(self_play)
    whole = read_corpus(self_play.out).records
    cut = replace(self_play, out=tmp_path / "cut.jsonl")
    write_corpus(cut.out, whole[:5])
    with cut.out.open("a") as stream:
        stream.write(json.dumps({"prompt_ids": [1]})[:9])
    assert generate_corpus(cut) == 7
    assert read_corpus(cut.out).records == whole


def test_self_play_adds_nothing_when_the_corpus_is_large_enough(
    self_play: SelfPlaySettings,
) -> None:
    with gzip.open(self_play.out, "wt") as stream:
        for _ in range(7):
            stream.write('{"prompt_ids": [1], "completion_ids": [2]}\n')
    assert generate_corpus(self_play) == 7
    assert len(read_corpus(self_play.out).records) == 7


@pytest.mark.parametrize(
    ("name", "held"),
    [("notes.txt", b"not mine"), ("notes.gz", b"not mine"), ("a.jsonl", b'{"text": 1}\n' * 9)],
)
def test_self_play_leaves_a_file_alone_when_it_is_no_corpus(
    self_play: SelfPlaySettings, tmp_path: Path, name: str, held: bytes
) -> None:
    file = tmp_path / name
    file.write_bytes(held)
    with pytest.raises(CorpusError, match=rf"^{file} is no corpus; name another file"):
        generate_corpus(replace(self_play, out=file))
    assert file.read_bytes() == held


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("framed", [True, False])
def test_self_play_leaves_a_corpus_alone_when_another_wrote_it(
    self_play: SelfPlaySettings, count: int, framed: bool
) -> None:
    """Of another template, or of the same one by other weights."""
    noted = TopTokens(np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float16), "another")
    other = Record((1, 3, 7, 2, 1, 4), (5, 2), top=noted) if framed else ONE
    write_corpus(self_play.out, [other] * count)
    with pytest.raises(CorpusError) as caught:
        generate_corpus(self_play)
    assert caught.value.message == (
        f"{self_play.out} is no corpus that {self_play.target} wrote; name another file"
    )
    assert read_corpus(self_play.out).records == (other,) * count


def test_self_play_begins_anew_when_the_file_is_empty_or_cut_at_once(
    self_play: SelfPlaySettings,
) -> None:
    for left in (b"", b"\x1f\x8b\x08"):
        self_play.out.write_bytes(left)
        assert generate_corpus(self_play) == 7
        assert len(read_corpus(self_play.out).records) == 7


@pytest.mark.parametrize("change", [{"logits_scaling": 4.0}, {"final_logit_softcapping": 2.0}])
def test_corpus_and_tuning_are_refused_when_a_target_alters_its_logits(
    settings: TuneSettings, chat_target: Path, self_play: SelfPlaySettings, change: dict[str, float]
) -> None:
    name = "granite" if "logits_scaling" in change else "gemma2"
    config = AutoConfig.for_model(
        name,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=2,
        **change,
    )
    target = AutoModelForCausalLM.from_config(config)
    for folder in (settings.target, chat_target):
        target.save_pretrained(folder)
    complaint = rf"^{type(target).__name__} has a bias, a scale or a cap on its logits"
    with pytest.raises(ModelError, match=complaint):
        tune(settings)
    with pytest.raises(ModelError, match=complaint):
        generate_corpus(self_play)


def test_tuning_is_refused_when_the_head_has_a_bias(settings: TuneSettings) -> None:
    save_random_model("phi", settings.target)
    target = AutoModelForCausalLM.from_pretrained(settings.target)
    check_plain_head(target)
    torch.nn.init.normal_(target.lm_head.bias)
    with pytest.raises(ModelError, match=r"^PhiForCausalLM has a bias"):
        check_plain_head(target)

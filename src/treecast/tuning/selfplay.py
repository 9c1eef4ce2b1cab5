"""Let a target write its own tuning corpus: it samples the user turn, then answers greedily.

Source: the idea of tuning a draft on what the target itself generates is SpecInfer's
(arXiv 2305.09781, section 3); sampling the user turn too means that no data set is needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from treecast.engine.linears import packed_layers, replace_linears
from treecast.engine.loading import LoadOptions, context_tokens, load_model, resolve_dtype
from treecast.errors import CorpusError, PromptTooLong
from treecast.model_folder import check_model_dir, model_revision
from treecast.settings import DType
from treecast.tuning.batch_decode import Choose, DenseKV, decode_batch, greedy, nucleus
from treecast.tuning.corpus import Record, append_records, read_begun, write_corpus
from treecast.tuning.plain_head import NUM_TOKENS, check_plain_head

_MARK = "\u241e"  # stands for the user's text while the chat template is taken apart


@dataclass(frozen=True)
class SelfPlaySettings:
    """What to generate.

    Batch by batch the temperatures are taken in turn, one for the user's text (`top_p` cuts its
    tail) and one for the answer, 0 being greedy. User turns begin with the `openings` in turn,
    record by record, and the target goes on from there: so it writes of what it would not think
    of by itself. `top_k` of the target's likeliest tokens are written down with every token, so
    that tuning need not ask it again; 0 writes none. The same settings and target give the same
    corpus, however often the run was interrupted.
    """

    target: Path
    out: Path
    num_records: int
    batch_size: int = 64
    openings: tuple[str, ...] = ("",)
    max_user_tokens: int = 48
    max_answer_tokens: int = 192
    user_temperatures: tuple[float, ...] = (1.0,)
    answer_temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 0.95
    top_k: int = 8
    seed: int = 0
    dtype: DType = "auto"


@dataclass(frozen=True)
class ChatFrame:
    """Token ids that stand before and after a user's text in a one-turn chat."""

    before_ids: tuple[int, ...]
    after_ids: tuple[int, ...]


def generate_corpus(
    settings: SelfPlaySettings, progress: Callable[[int, int], None] | None = None
) -> int:
    """Append self-played records to `settings.out` until it holds `num_records`.

    Blocks for as long as generation takes. Safe to interrupt and to run again: a batch is
    appended whole, and what was cut is dropped and made again.

    Args:
        progress: called after each batch with records written and wanted.

    Returns:
        The number of records in the file.

    Raises:
        CorpusError: the file holds something else; it stays as it is.
        ModelError: the target's logits are not its head's rows alone, as tuning needs it.
        PromptTooLong: an opening and what may follow it do not fit the target's context.
    """
    from transformers import AutoTokenizer

    check_model_dir(settings.target)
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.target)
    frame = chat_frame(tokenizer)
    openings = [
        tuple(tokenizer.encode(text, add_special_tokens=False)) for text in settings.openings
    ]
    revision = model_revision(settings.target)
    num_done = _prepare(settings, frame, revision)
    if num_done >= settings.num_records:
        return num_done
    model = load_model(
        settings.target, LoadOptions(resolve_dtype(settings.dtype), "fast", "cpu", None)
    )
    tree = DenseKV(torch.ones(1, NUM_TOKENS, dtype=torch.bool), NUM_TOKENS)
    _check_room(model, frame, openings, settings)
    check_plain_head(model, position_ids=torch.arange(NUM_TOKENS)[None], tree=tree)
    replace_linears(model, packed_layers(min_rows=1))
    while num_done < settings.num_records:
        records = _play(model, frame, openings, settings, num_done)
        append_records(settings.out, [_noted_by(revision, record) for record in records])
        num_done += len(records)
        if progress:
            progress(num_done, settings.num_records)
    return num_done


def chat_frame(tokenizer: Any) -> ChatFrame:
    """Split the chat template around the user's text; without one, text starts at BOS."""
    if not tokenizer.chat_template:
        return ChatFrame((tokenizer.bos_token_id or tokenizer.eos_token_id,), ())
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, after = text.split(_MARK)
    encode = tokenizer.encode
    return ChatFrame(
        tuple(encode(before, add_special_tokens=False)),
        tuple(encode(after, add_special_tokens=False)),
    )


def _noted_by(revision: str, record: Record) -> Record:
    if record.top is None:
        return record
    return replace(record, top=replace(record.top, revision=revision))


def _prepare(settings: SelfPlaySettings, frame: ChatFrame, revision: str) -> int:
    """Count what an earlier run left, cut back to whole batches.

    A batch draws from one seed, so one that was cut in the middle is made again as a whole.
    """
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    records = read_begun(settings.out)
    if len(records) >= settings.num_records:
        return len(records)
    num_whole = len(records) // settings.batch_size * settings.batch_size
    for record in records:
        noted_by = record.top.revision if record.top else ""
        begins = record.prompt_ids[: len(frame.before_ids)] == frame.before_ids
        if not begins or noted_by not in ("", revision):
            raise CorpusError(
                f"{settings.out} is no corpus that {settings.target} wrote; name another file"
            )
    if len(records) > num_whole:
        write_corpus(settings.out, records[:num_whole])
    return num_whole


def _check_room(
    model: Any,
    frame: ChatFrame,
    openings: Sequence[tuple[int, ...]],
    settings: SelfPlaySettings,
) -> None:
    longest = max(map(len, openings)) + settings.max_user_tokens + settings.max_answer_tokens
    longest += len(frame.before_ids) + len(frame.after_ids)
    if longest > (limit := context_tokens(model.config)):
        raise PromptTooLong(
            f"an exchange may have {longest} tokens with the longest opening; the limit is {limit}"
        )


def _play(
    model: Any,
    frame: ChatFrame,
    openings: Sequence[tuple[int, ...]],
    settings: SelfPlaySettings,
    num_done: int,
) -> list[Record]:
    """The batch that follows `num_done` records."""
    # The seed follows the place in the file, so a resumed run draws what it would have drawn.
    draws = torch.Generator().manual_seed(settings.seed * 1_000_003 + num_done)
    num_records = min(settings.batch_size, settings.num_records - num_done)
    user_temperature = _in_turn(settings.user_temperatures, settings, num_done)
    answer_temperature = _in_turn(settings.answer_temperatures, settings, num_done)
    stops = _stop_ids(model)

    def choose(temperature: float) -> Choose:
        return nucleus(temperature, settings.top_p, draws) if temperature else greedy

    begun = [openings[(num_done + k) % len(openings)] for k in range(num_records)]
    users = decode_batch(
        model,
        [(*frame.before_ids, *opening) for opening in begun],
        choose(user_temperature),
        settings.max_user_tokens,
        stops,
    )
    first = len(frame.before_ids)
    said = (_until_stop(ids, stops) for ids in users.tokens)
    prompts = [
        (*frame.before_ids, *opening, *user, *frame.after_ids)
        for opening, user in zip(begun, said, strict=True)
    ]
    answers = decode_batch(
        model,
        prompts,
        choose(answer_temperature),
        settings.max_answer_tokens,
        stops,
        settings.top_k,
        first,
    )
    return [
        Record(prompt, answer, answer_temperature, top)
        for prompt, answer, top in zip(prompts, answers.tokens, answers.top, strict=True)
    ]


def _in_turn(temperatures: tuple[float, ...], settings: SelfPlaySettings, num_done: int) -> float:
    return temperatures[num_done // settings.batch_size % len(temperatures)]


def _stop_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    return frozenset(eos if isinstance(eos, list) else [eos])


def _until_stop(ids: tuple[int, ...], stops: frozenset[int]) -> tuple[int, ...]:
    """The ids before the first stop."""
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)

"""Let a target write its own tuning corpus: it samples the user turn, then answers greedily.

Source: the idea of tuning a draft on what the target itself generates is SpecInfer's
(arXiv 2305.09781, section 3); sampling the user turn too means that no data set is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treecast.checkpoints import check_model_dir
from treecast.errors import CorpusError
from treecast.tuning.corpus import Record, append_records, read_corpus, write_corpus

_MARK = "\u241e"  # stands for the user's text while the chat template is taken apart


@dataclass(frozen=True)
class SelfPlaySettings:
    """What to generate.

    `temperature` and `top_p` shape the user turn; answers are greedy. The same settings and
    target give the same corpus, however often the run was interrupted.
    """

    target: Path
    out: Path
    num_records: int
    batch_size: int = 32
    max_user_tokens: int = 48
    max_answer_tokens: int = 192
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16


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
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_dir(settings.target)
    num_done = _prepare(settings)
    if num_done >= settings.num_records:
        return num_done
    tokenizer: Any = AutoTokenizer.from_pretrained(settings.target)
    model: Any = AutoModelForCausalLM.from_pretrained(settings.target, dtype=settings.dtype).eval()
    frame = chat_frame(tokenizer)
    while num_done < settings.num_records:
        # The seed follows the place in the file, so a resumed run draws what it would have drawn.
        torch.manual_seed(settings.seed * 1_000_003 + num_done)
        wanted = min(settings.batch_size, settings.num_records - num_done)
        append_records(settings.out, _play(model, frame, settings, wanted))
        num_done += wanted
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


def _prepare(settings: SelfPlaySettings) -> int:
    """Count what an earlier run left, cut back to whole batches.

    A batch draws from one seed, so one that was cut in the middle is made again as a whole.
    """
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    if not settings.out.is_file():
        return 0
    try:
        corpus = read_corpus(settings.out)
    except CorpusError:
        settings.out.unlink()
        return 0
    if len(corpus.records) >= settings.num_records:
        return len(corpus.records)
    num_whole = len(corpus.records) // settings.batch_size * settings.batch_size
    if corpus.problems or num_whole < len(corpus.records):
        write_corpus(settings.out, corpus.records[:num_whole])
    return num_whole


@torch.inference_mode()
def _play(
    model: Any, frame: ChatFrame, settings: SelfPlaySettings, num_records: int
) -> list[Record]:
    prefix = torch.tensor([frame.before_ids] * num_records)
    sampled = model.generate(
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        min_new_tokens=1,
        max_new_tokens=settings.max_user_tokens,
    )
    stops = _stop_ids(model)
    users = [_until_stop(row, stops, keep=0) for row in sampled[:, prefix.shape[1] :].tolist()]
    prompts = [(*frame.before_ids, *user, *frame.after_ids) for user in users]
    answers = _answer(model, prompts, settings.max_answer_tokens)
    return [
        Record(prompt, _until_stop(answer, stops, keep=1))
        for prompt, answer in zip(prompts, answers.tolist(), strict=True)
    ]


def _answer(model: Any, prompts: list[tuple[int, ...]], max_new_tokens: int) -> Tensor:
    """Decode greedily. Returns [num_prompts, num_new] token ids, padded behind the end."""
    width = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    answers: Tensor = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return answers[:, width:]


def _stop_ids(model: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    return frozenset(eos if isinstance(eos, list) else [eos])


def _until_stop(ids: list[int], stops: frozenset[int], keep: int) -> tuple[int, ...]:
    """The ids before the first stop, and `keep` of the stop itself."""
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return tuple(ids[: end + keep])

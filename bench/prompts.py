"""Prompt files: one JSON object a line, as Spec-Bench writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treecast.client import ChatMessage, Prompt
from treecast.errors import CorpusError
from treecast.text.tokenizer import TokenizerFiles

DEFAULT_PROMPTS = Path(__file__).parent / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """The first turn of an entry."""

    id: str
    category: str
    text: str

    @property
    def chat(self) -> list[ChatMessage]:
        return user_turn(self.text)


def user_turn(text: str) -> list[ChatMessage]:
    """A chat that begins with this."""
    return [{"role": "user", "content": text}]


def prompts_for(model: Path, prompts: Sequence[BenchPrompt]) -> list[Prompt]:
    """As a mesh of that model folder takes them: chats, or texts without a chat template.

    Raises:
        ModelError: the folder has no tokenizer.
    """
    has_template = bool(TokenizerFiles.read(model).chat_template)
    return [prompt.chat if has_template else prompt.text for prompt in prompts]


def encode_chat(
    tokenizer: Any,  # of transformers
    text: str,
) -> list[int]:
    """Token ids of a chat with one user turn; of the bare text, without a chat template."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    encoded = tokenizer.apply_chat_template(
        user_turn(text), add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])


def read_prompts(path: Path, limit: int | None = None) -> list[BenchPrompt]:
    """Read {"id", "category", "turns"} lines; with a limit, evenly spread over the file.

    Raises:
        CorpusError: the file cannot be read, a line is not such an object, or repeats an id.
    """
    try:
        prompts = list(_parse(path))
    except OSError as error:
        raise CorpusError(f"prompts {path} cannot be read: {error.strerror}") from error
    if not prompts:
        raise CorpusError(f"prompts {path} holds no prompt")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[place * len(prompts) // limit] for place in range(limit)]


def _parse(path: Path) -> Iterator[BenchPrompt]:
    lines_of: dict[str, int] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                prompt = BenchPrompt(
                    str(entry["id"]), str(entry["category"]), str(entry["turns"][0])
                )
            except (ValueError, LookupError, TypeError) as error:
                raise CorpusError(
                    f"prompts {path}: line {number} is no object with id, category and turns"
                ) from error
            if (before := lines_of.setdefault(prompt.id, number)) != number:
                raise CorpusError(
                    f"prompts {path}: line {number} has id {prompt.id!r}, as line {before} has"
                )
            yield prompt

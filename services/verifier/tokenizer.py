"""The model's tokenizer files: served to routers, and used here to find stop strings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from treecast.errors import ModelError


@dataclass(frozen=True)
class TokenizerFiles:
    """What `GetTokenizer` answers; all empty for a model without a tokenizer."""

    definition: bytes = b""
    chat_template: str = ""
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, model_dir: Path) -> TokenizerFiles:
        """Read a Hugging Face model folder.

        Raises:
            ModelError: the folder has no fast tokenizer.
        """
        definition = model_dir / "tokenizer.json"
        if not definition.is_file():
            raise ModelError(f"{model_dir} has no tokenizer.json; a fast tokenizer is needed")
        config = _read_json(model_dir / "tokenizer_config.json")
        template = model_dir / "chat_template.jinja"
        special = {
            name: value if isinstance(value, str) else value["content"]
            for name, value in config.items()
            if name.endswith("_token") and isinstance(value, str | dict)
        }
        return cls(
            definition.read_bytes(),
            template.read_text() if template.is_file() else str(config.get("chat_template") or ""),
            special,
        )

    def decoder(self) -> Callable[[Sequence[int]], str] | None:
        """Token ids to text, special tokens left out; None without a tokenizer."""
        return self._decode if self.definition else None

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.definition.decode())

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


def _read_json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}

"""A model's tokenizer files: read by verifiers, handed to routers, and loaded by both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from treecast.errors import ModelError
from treecast.text.detok import Decode


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What `VerifierService.GetTokenizer` answers; all empty for a model without a tokenizer.

    Attributes:
        definition: the fast tokenizer's JSON.
        special_tokens: by the names that the chat template uses.
    """

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

    def load(self) -> Tokenizer | None:
        """Parse the definition, in seconds where it is large; None without one."""
        if not self.definition:
            return None
        tokenizer = Tokenizer.from_str(self.definition.decode())
        tokenizer.no_truncation()  # a definition may carry the settings of its training
        tokenizer.no_padding()
        return tokenizer

    def decoder(self) -> Decode | None:
        """`decoder_of` the tokenizer; None without one."""
        tokenizer = self.load()
        return None if tokenizer is None else decoder_of(tokenizer)


def decoder_of(tokenizer: Tokenizer) -> Decode:
    """Token ids to text, special tokens left out."""

    def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=True)

    return decode


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest; a byte counts as one or more.

    One by one, so that other threads can run: a large vocabulary takes a tenth of a second.
    """
    pieces = (tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size()))
    return max(len(piece) for piece in pieces if piece)


def _read_json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}

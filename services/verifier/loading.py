"""Making the engine that the settings ask for."""

from __future__ import annotations

from pathlib import Path

import structlog

from treecast.engine.base import Engine
from treecast.engine.exactness import differing_rows
from treecast.engine.toy import ToyEngine
from treecast.errors import ModelError
from treecast.text.tokenizer import TokenizerFiles
from treecast.wire.channel import MAX_ANSWER_BYTES

from .settings import VerifierSettings

_ROOM_BYTES = 1024 * 1024
"""Of the answer that hands out the tokenizer: for its template and special tokens."""

log = structlog.get_logger()


def load_engine(settings: VerifierSettings) -> tuple[Path | None, Engine]:
    """Load the model; returns its folder (None for the toy) and the engine. Blocks.

    Raises:
        ModelError: the folder is missing or holds no causal LM.
    """
    if settings.engine == "toy":
        return None, ToyEngine(pool_tokens=settings.pool_tokens, step_s=settings.toy_step_s)
    from treecast.checkpoints import ensure_default_target
    from treecast.engine.hf import HFEngine

    folder = ensure_default_target() if settings.model == "default" else Path(settings.model)
    log.info("model.loading", folder=str(folder), dtype=settings.dtype, numerics=settings.numerics)
    engine = HFEngine.load(
        folder,
        dtype=settings.dtype,
        numerics=settings.numerics,
        device=settings.device,
        pool_tokens=settings.pool_tokens,
        threads=settings.torch_threads,
    )
    log.info("model.loaded", revision=engine.info.revision, fingerprint=engine.info.fingerprint)
    if settings.numerics == "exact":
        _check_exactness(engine)
    return folder, engine


def _check_exactness(engine: Engine) -> None:
    """Warn where this machine breaks the promise: texts may then differ in near-ties."""
    differing = differing_rows(engine)
    if differing:
        log.warning("numerics.not_exact", differing_rows=differing)


def read_tokenizer(model_dir: Path | None) -> TokenizerFiles:
    """The tokenizer beside the model; an empty one for the toy.

    Raises:
        ModelError: there is none, or it is too large for routers to fetch.
    """
    if model_dir is None:
        return TokenizerFiles()
    files = TokenizerFiles.read(model_dir)
    size, bound = len(files.definition), MAX_ANSWER_BYTES - _ROOM_BYTES
    if size > bound:
        raise ModelError(f"{model_dir}/tokenizer.json has {size} bytes; the limit is {bound}")
    return files

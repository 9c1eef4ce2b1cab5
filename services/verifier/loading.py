"""Making the engine that the settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from treecast.engine.base import Engine
from treecast.engine.exactness import differing_rows
from treecast.engine.sharding.shape import Place
from treecast.engine.toy import ToyEngine
from treecast.errors import ModelError, SettingsError
from treecast.settings import GIB, POOL_TOKENS
from treecast.text.tokenizer import TokenizerFiles
from treecast.wire.channel import MAX_ANSWER_BYTES

from .settings import VerifierSettings

_ROOM_BYTES = 1024 * 1024
"""Of the answer that hands out the tokenizer: for its template and special tokens."""

if TYPE_CHECKING:
    from treecast.engine.offload import Offload
    from treecast.engine.sharding.ranks import Member

log = structlog.get_logger()


def load_engine(settings: VerifierSettings, place: Place | None) -> tuple[Path | None, Engine]:
    """Load the model; returns its folder (None for the toy) and the engine. Blocks.

    Args:
        place: rank 0's, where the model is divided among a group.

    Raises:
        ModelError: the folder is missing or holds no causal LM, or the group cannot divide it.
        EngineLost: another rank of the group is gone.
    """
    check_adapters(settings)
    if settings.engine == "toy":
        pool_tokens = settings.pool_tokens
        pool_tokens = POOL_TOKENS if pool_tokens == "auto" else pool_tokens
        return None, ToyEngine(pool_tokens=pool_tokens, step_s=settings.toy_step_s)
    folder = model_folder(settings)
    engine = _load(settings, folder, place)
    log.info("model.loaded", revision=engine.info.revision, fingerprint=engine.info.fingerprint)
    if settings.numerics == "exact" and settings.offload == "none":
        _check_exactness(engine)
    return folder, engine


def _load(settings: VerifierSettings, folder: Path, place: Place | None) -> Engine:
    from treecast.engine.hf import HFEngine
    from treecast.engine.sharding.ranks import lead

    log.info("model.loading", folder=str(folder), dtype=settings.dtype, numerics=settings.numerics)
    if place is not None:
        return lead(_member(settings, folder, place))
    return HFEngine.load(
        folder,
        dtype=settings.dtype,
        weights=settings.weights,
        numerics=settings.numerics,
        device=settings.device,
        pool_tokens=None if settings.pool_tokens == "auto" else settings.pool_tokens,
        threads=settings.torch_threads,
        adapters=settings.adapter_folders,
        swap_dtype=settings.swap_dtype,
        offload=_offload(settings),
        kv_dtype=settings.kv_dtype,
    )


def _offload(settings: VerifierSettings) -> Offload:
    from treecast.engine.offload import Offload

    share = settings.device_memory
    return Offload(
        settings.offload, None if share is None else int(share * GIB), settings.offload_folder
    )


def check_adapters(settings: VerifierSettings) -> None:
    """Refuse adapters where they cannot be served, before anything is loaded.

    Raises:
        ModelError: the model is divided among a group, is the toy, has layers that are offloaded,
            or is called like an adapter.
    """
    if not settings.adapters:
        return
    if settings.group.size > 1:
        raise ModelError(
            f"adapters are given for a group of {settings.group.size} ranks (--tp {settings.tp}, "
            f"--pp {settings.pp}); they are served by a model in one process alone"
        )
    if settings.engine == "toy":
        raise ModelError("adapters are given for the toy engine, which reads none")
    _offload(settings).check_adapters(settings.adapter_folders)
    name = model_folder(settings).name
    if name in settings.adapter_folders:
        raise ModelError(f"adapter {name!r} has the name of the model itself")


def follow_rank(settings: VerifierSettings, place: Place) -> None:
    """Be a rank of a group other than the first, until that one says stop. Blocks.

    Raises:
        ModelError, EngineLost: as `load_engine`.
    """
    from treecast.engine.sharding.ranks import follow

    follow(_member(settings, model_folder(settings), place))


def _member(settings: VerifierSettings, folder: Path, place: Place) -> Member:
    from treecast.engine.loading import LoadOptions, resolve_dtype
    from treecast.engine.sharding.ranks import Member

    if settings.pool_tokens == "auto":
        raise SettingsError("--pool-tokens auto is not for a group: all ranks must have as many")
    if settings.device not in ("cpu", "cuda"):
        raise SettingsError(
            f"--device {settings.device} is not for a group (--tp {settings.tp}, --pp "
            f"{settings.pp}): each rank takes the GPU of its own number; allowed: cpu, cuda"
        )
    threads = place.threads(settings.torch_threads)
    device = settings.device if settings.device == "cpu" else f"cuda:{place.local_rank}"
    return Member(
        place,
        folder,
        LoadOptions(
            resolve_dtype(settings.dtype, device),
            settings.numerics,
            device,
            threads,
            settings.group,
            swap_dtype=settings.swap_dtype,
            offload=_offload(settings),
            kept_kv=settings.kv_dtype,
            weights=settings.weights,
        ),
        settings.pool_tokens,
        settings.rendezvous,
        settings.rank_timeout_s,
    )


def model_folder(settings: VerifierSettings) -> Path:
    """Where the model lies; the default one, and one in a GGUF file, are unpacked first.

    Raises:
        ModelError: the default model is neither installed nor to be fetched, or the file is none.
    """
    from treecast.checkpoints import ensure_folder

    return ensure_folder(settings.model)


def _check_exactness(engine: Engine) -> None:
    """Warn where this machine breaks the promise: texts may then differ in near-ties.

    Adapters are computed by the same kernels, whichever it is, so one stands for all. Not where
    weights may be moved for each of its fifty passes: that changes no bit.
    """
    for adapter in ("", *(one.name for one in engine.info.adapters[:1])):
        differing = differing_rows(engine, adapter=adapter)
        if differing:
            log.warning("numerics.not_exact", differing_rows=differing, adapter=adapter)


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

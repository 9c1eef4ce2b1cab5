"""Making the drafters that the settings ask for. Torch is imported only if one needs it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from treecast.drafting.base import Drafter, DraftRequest
from treecast.drafting.growth import BestFirst
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.ssm import PREFILL_ROWS, SSMDrafter
from treecast.drafting.suffix import SuffixDrafter
from treecast.drafting.swap import SwappableDrafter
from treecast.engine.base import Engine, ModelInfo
from treecast.engine.curve import measure_curve
from treecast.errors import InvalidRequest, ModelError, SettingsError
from treecast.sampling.grammar import Grammars
from treecast.sampling.params import SamplingParams

from .metrics import SpeculatorMetrics
from .settings import DrafterSpec, SpeculatorSettings

log = structlog.get_logger()

_AHEAD_CONFIDENCE = 0.01
"""Run-ahead looks for the tokens that are not in the tree offered, so it goes where few go."""
_WARM_UP = -1
_MEASURED_ROWS = 32


def load_engines(settings: SpeculatorSettings) -> list[Engine]:
    """Load a draft model for each `ssm` drafter, in order. Blocks.

    Raises:
        ModelError: a folder is missing or holds no causal LM, or their tokenizers differ.
    """
    specs = [spec for spec in settings.specs if spec.kind == "ssm"]
    engines = [_load(settings, spec.model, settings.torch_threads) for spec in specs]
    check_tokenizers([spec.name for spec in specs], [engine.info for engine in engines])
    return engines


def load_grammars(settings: SpeculatorSettings, engines: Sequence[Engine]) -> Grammars | None:
    """What masks drafts of constrained requests; None where no draft model has a tokenizer."""
    models = [spec.model for spec in settings.specs if spec.kind == "ssm"]
    if settings.engine == "toy" or not engines or not engines[0].info.tokenizer_hash:
        return None
    info = engines[0].info
    definition = (_folder(settings, models[0]) / "tokenizer.json").read_bytes()
    return Grammars.for_model(definition, info.eos_token_ids, info.vocab_size)


def _folder(settings: SpeculatorSettings, model: str) -> Path:
    from treecast.checkpoints import draft_folder

    return draft_folder(model or settings.model)


def check_tokenizers(names: Sequence[str], models: Sequence[ModelInfo]) -> None:
    """Draft models of one pod speak of the same tokens: it says one hello for all of them.

    Raises:
        ModelError: two tokenizers differ.
    """
    for name, model in zip(names[1:], models[1:], strict=True):
        if model.tokenizer_hash != models[0].tokenizer_hash:
            raise ModelError(
                f"draft model {name} has tokenizer {model.tokenizer_hash!r}; that of {names[0]} is "
                f"{models[0].tokenizer_hash!r}"
            )


def load_beside(settings: SpeculatorSettings, model: str) -> Engine:
    """Load a draft while another one drafts: on one thread, as only theirs may run more. Blocks.

    Raises:
        ModelError: the folder is missing or holds no causal LM.
    """
    import torch

    torch.get_num_threads()  # a thread's first use of torch takes over what others have set
    torch.set_num_threads(1)
    return _load(settings, model, threads=None)


def _load(settings: SpeculatorSettings, model: str, threads: int | None) -> Engine:
    if settings.engine == "toy":
        from treecast.engine.toy import ToyEngine

        return ToyEngine(pool_tokens=settings.pool_tokens, step_s=settings.toy_step_s)
    from treecast.engine.hf import HFEngine

    folder = _folder(settings, model)
    log.info("model.loading", folder=str(folder), dtype=settings.dtype)
    engine = HFEngine.load(
        folder,
        dtype=settings.dtype,
        weights=settings.weights,
        numerics=settings.numerics,
        device=settings.device,
        pool_tokens=settings.pool_tokens,
        threads=threads,
    )
    log.info("model.loaded", revision=engine.info.revision)
    return engine


def make_drafter(
    settings: SpeculatorSettings, engines: Sequence[Engine], metrics: SpeculatorMetrics
) -> MergedDrafter:
    """The drafters asked for, merged in that order; on the engines' thread, as it times them.

    Raises:
        SettingsError: draft models whose vocabularies differ.
    """
    models = iter(engines)
    drafters = [_make(settings, spec, models) for spec in settings.specs]
    each = settings.draft_threads == "each" and len(engines) > 1
    threads = ThreadPoolExecutor(len(engines), thread_name_prefix="draft") if each else None
    try:
        return MergedDrafter(
            drafters,
            observe=lambda name, seconds: metrics.draft.labels(name).observe(seconds),
            threads=threads,
        )
    except InvalidRequest as error:
        raise SettingsError(error.message) from error


def _make(settings: SpeculatorSettings, spec: DrafterSpec, models: Iterator[Engine]) -> Drafter:
    match spec.kind:
        case "ngram":
            return NgramDrafter(settings.max_sessions, name=spec.name)
        case "suffix":
            return SuffixDrafter(settings.max_sessions, settings.suffix_memory, name=spec.name)
        case _:
            return SwappableDrafter(make_model_drafter(settings, spec, next(models)))


def make_model_drafter(
    settings: SpeculatorSettings, spec: DrafterSpec, engine: Engine
) -> SSMDrafter:
    """A draft model's drafter; on the engines' thread, as it times the engine."""
    return SSMDrafter(
        engine,
        settings.growth,
        settings.max_sessions,
        ahead=BestFirst(min_confidence=_AHEAD_CONFIDENCE),
        name=spec.name,
        pass_s=measure_curve(engine, _MEASURED_ROWS),
    )


def warm_up(drafter: MergedDrafter, engines: Sequence[Engine]) -> float:
    """Draft for a text as long as one draft reads at most; returns the seconds it took.

    Raises:
        ModelError: no drafter could.
    """
    text = [0] * min([PREFILL_ROWS, *(engine.info.context_tokens for engine in engines)])
    sampling = SamplingParams(temperature=0, max_tokens=1)
    began = time.perf_counter()
    drafter.open(_WARM_UP, DraftRequest(text, len(text), sampling, noise_key=0))
    drafter.draft({_WARM_UP: 16})
    lost = drafter.take_lost()
    drafter.close(_WARM_UP)
    if lost:
        raise ModelError(f"drafting failed at warm-up: {lost[_WARM_UP]}") from lost[_WARM_UP]
    return time.perf_counter() - began

"""Making the drafters that the settings ask for. Torch is imported only if one needs it."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from treecast.drafting.base import Drafter, DraftRequest
from treecast.drafting.growth import BestFirst, parse_growth
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.ssm import PREFILL_ROWS, SSMDrafter
from treecast.engine.base import Engine
from treecast.sampling.params import SamplingParams

from .metrics import SpeculatorMetrics
from .settings import SpeculatorSettings

log = structlog.get_logger()

_AHEAD_CONFIDENCE = 0.01
"""Run-ahead looks for the tokens that are not in the tree offered, so it goes where few go."""
_WARM_UP = -1


def load_engine(settings: SpeculatorSettings) -> Engine | None:
    """Load the draft model, or None where no drafter needs one. Blocks.

    Raises:
        ModelError: the folder is missing or holds no causal LM.
    """
    if "ssm" not in settings.drafters:
        return None
    if settings.engine == "toy":
        from treecast.engine.toy import ToyEngine

        return ToyEngine(pool_tokens=settings.pool_tokens, step_s=settings.toy_step_s)
    from treecast.checkpoints import ensure_default_draft
    from treecast.engine.hf import HFEngine

    folder = ensure_default_draft() if settings.model == "default" else Path(settings.model)
    log.info("model.loading", folder=str(folder), dtype=settings.dtype)
    engine = HFEngine.load(
        folder,
        dtype=settings.dtype,
        numerics=settings.numerics,
        pool_tokens=settings.pool_tokens,
        threads=settings.torch_threads,
    )
    log.info("model.loaded", revision=engine.info.revision)
    return engine


def make_drafter(
    settings: SpeculatorSettings, engine: Engine | None, metrics: SpeculatorMetrics
) -> MergedDrafter:
    """One drafter of each kind asked for, merged in that order."""
    drafters: list[Drafter] = []
    for kind in dict.fromkeys(settings.drafters):
        if kind == "ngram":
            drafters.append(NgramDrafter(settings.max_sessions))
        else:
            assert engine is not None
            drafters.append(_ssm(settings, engine))
    return MergedDrafter(
        drafters, observe=lambda name, seconds: metrics.draft.labels(name).observe(seconds)
    )


def warm_up(drafter: MergedDrafter, engine: Engine | None) -> float:
    """Draft for a text as long as one draft reads at most; returns the seconds it took."""
    longest = engine.info.context_tokens if engine else PREFILL_ROWS
    text = [0] * min(PREFILL_ROWS, longest)
    sampling = SamplingParams(temperature=0, max_tokens=1)
    began = time.perf_counter()
    drafter.open(_WARM_UP, DraftRequest(text, len(text), sampling, noise_key=0))
    drafter.draft({_WARM_UP: 16})
    drafter.close(_WARM_UP)
    return time.perf_counter() - began


def _ssm(settings: SpeculatorSettings, engine: Engine) -> SSMDrafter:
    return SSMDrafter(
        engine,
        parse_growth(settings.growth),
        settings.max_sessions,
        ahead=BestFirst(min_confidence=_AHEAD_CONFIDENCE),
    )

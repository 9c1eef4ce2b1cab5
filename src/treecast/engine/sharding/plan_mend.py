"""transformers divides the layers of a stage among its ranks, and stumbles over those it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.distributed import mixin, pipeline_parallel


@contextmanager
def plans_cut_to_stages() -> Iterator[None]:
    """While a model is loaded: apply a tensor-parallel plan to the modules that a stage has.

    transformers (5.17 to 5.23) draws the plan up before it takes the other stages' modules out, and
    then looks all of them up. Changes a name in its module meanwhile: one load at a time.
    """
    apply = mixin.apply_tensor_parallelism

    def apply_here(model: Any, mesh: Any, plan: Mapping[str, str]) -> Any:
        here = _names(model)
        return apply(model, mesh, {name: style for name, style in plan.items() if name in here})

    mixin.apply_tensor_parallelism = apply_here
    try:
        yield
    finally:
        mixin.apply_tensor_parallelism = apply


def _names(model: Any) -> set[str]:
    absent = pipeline_parallel.PipelineIdentityLayer
    modules = {name for name, module in model.named_modules() if not isinstance(module, absent)}
    return modules | {name for name, _ in model.named_parameters()}

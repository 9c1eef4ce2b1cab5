"""Between transformers' modelling code and our attention: one function, reached by every layer."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from treecast.engine.kv_tensors import KVTensors
from treecast.errors import ModelError
from treecast.kernels.plan import LayerAttention
from treecast.kernels.scores import PLAIN, ScoreRule

IMPLEMENTATION = "treecast"
"""Name of our attention in transformers' registry."""


class TreePass(Protocol):
    """What a packed pass does when a layer asks for attention."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, query heads, rows, head dim]
        key: Tensor,  # [1, KV heads, rows, head dim]
        value: Tensor,  # [1, KV heads, rows, value dim]
        scaling: float,
        rule: ScoreRule = PLAIN,
    ) -> Tensor:  # [1, rows, query heads, value dim]
        ...


class KernelPass:
    """A pass over the pool with one of our kernels."""

    def __init__(self, kernel: LayerAttention, tensors: KVTensors, num_rows: int) -> None:
        """`num_rows` are the rows that segments cover; any rows behind them are padding."""
        self._kernel = kernel
        self._tensors = tensors
        self._num_rows = num_rows

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rule: ScoreRule = PLAIN,
    ) -> Tensor:
        rows, heads = query.shape[2], query.shape[1]
        out = value.new_empty((1, rows, heads, value.shape[-1]))
        if rows > self._num_rows:
            out[0, self._num_rows :] = 0
        keys, values = self._tensors.layer(layer)
        self._kernel(query[0], key[0], value[0], keys, values, scaling, out[0], rule)
        return out


_UNSUPPORTED = ("position_bias", "alibi", "head_mask", "indices", "block_indices")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    tree: TreePass | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,  # [query heads], attention sinks
    **features: Any,  # whatever else a model's modelling code passes on
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Raises:
        ModelError: the model wants something that this attention does not do.
    """
    name = type(module).__name__
    if tree is None:
        raise ModelError(f"{name} does not hand unknown arguments to attention")
    if not getattr(module, "is_causal", True) or features.get("is_causal") is False:
        raise ModelError(f"{name} looks at later positions; a served model must be causal")
    for feature in _UNSUPPORTED:
        if features.get(feature) is not None:
            raise ModelError(f"{name} uses {feature}, which is not supported")
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None and sliding_window is None and s_aux is None:
        return tree.attend(layer, query, key, value, scale), None
    sinks = None if s_aux is None else s_aux.detach().float()
    rule = ScoreRule(softcap=softcap, window=sliding_window, sinks=sinks)
    return tree.attend(layer, query, key, value, scale, rule), None


def register() -> None:
    """Make our attention known to transformers; safe to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)

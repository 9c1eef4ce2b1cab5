"""Between transformers' modelling code and our attention: one function, reached by every layer."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from treecast.engine.kv_tensors import KVTensors
from treecast.errors import ModelError
from treecast.kernels.plan import LayerAttention

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
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        rows, heads = query.shape[2], query.shape[1]
        out = value.new_empty((1, rows, heads, value.shape[-1]))
        out[0, self._num_rows :] = 0
        keys, values = self._tensors.layer(layer)
        self._kernel(query[0], key[0], value[0], keys, values, scaling, out[0])
        return out


_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "alibi", "head_mask")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    tree: TreePass | None = None,
    **features: Any,  # whatever else a model's modelling code passes on
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Raises:
        ModelError: the model wants something that this attention does not do.
    """
    if tree is None:
        raise ModelError(f"{type(module).__name__} does not hand unknown arguments to attention")
    for feature in _UNSUPPORTED:
        if features.get(feature) is not None:
            raise ModelError(f"{type(module).__name__} uses {feature}, which is not supported")
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree.attend(layer, query, key, value, scale), None


def register() -> None:
    """Make our attention known to transformers; safe to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)

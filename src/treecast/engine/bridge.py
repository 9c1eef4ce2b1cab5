"""Between transformers' modelling code and our attention: one function, reached by every layer."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from treecast.engine.kv_tensors import KVTensors, LayerShape
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
        out = query.new_empty((1, rows, heads, value.shape[-1]))
        out[0, self._num_rows :] = 0
        keys, values = self._tensors.layer(layer)
        self._kernel(query[0], key[0], value[0], keys, values, scaling, out[0])
        return out


class ShapePass:
    """A pass that only learns what each layer keeps of a position."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1])
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[-1]))


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


def layer_shapes(model: nn.Module, num_layers: int) -> list[LayerShape]:
    """Run two tokens through a model to learn what its layers keep.

    Raises:
        ModelError: some layer has no attention of ours, so its state would be lost.
    """
    recorder = ShapePass()
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    with torch.inference_mode():
        model(
            input_ids=ids,
            position_ids=ids + torch.arange(2).to(ids),
            use_cache=False,
            tree=recorder,
        )
    missing = [layer for layer in range(num_layers) if layer not in recorder.shapes]
    if missing:
        raise ModelError(
            f"{type(model).__name__}: {len(missing)} of {num_layers} layers (first {missing[0]}) "
            "do not reach the attention interface; every layer of a served model must"
        )
    return [recorder.shapes[layer] for layer in range(num_layers)]

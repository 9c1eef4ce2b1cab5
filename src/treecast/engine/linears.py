"""What a model's row-wise layers are computed with: packed for CPU, plain or fixed for a GPU.

Packed for oneDNN, they are quicker than `nn.Linear` in bfloat16 and in float32, and a row's bits do
not depend on how many rows are beside it, as long as there are at least two (a lone row takes
another code path where the inner dimension is large). `nn.Linear` in float32 has no such rule.

A processor without bfloat16 products (x86 with AVX2 alone, say) would multiply such matrices by a
scalar loop: 16 rows of a 1536 x 576 layer took 7.0 ms against 0.5 in float32. There the weights are
packed in float32: the products are exact, the sum is rounded to bfloat16 at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """y = x W^T + b over oneDNN's packed weights; stands in for `nn.Linear` at inference."""

    def __init__(self, linear: nn.Linear, min_rows: int) -> None:
        """Pack a layer's weights.

        Args:
            linear: is left as it is.
            min_rows: fewer rows than this are filled up with copies (2 where bits must not depend
                on the number of rows, else 1).
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._min_rows = min_rows
        self._dtype = product_dtype(linear.weight.dtype)
        weight = linear.weight.detach().to(self._dtype)
        self._packed = _OPS._reorder_linear_weight(weight, None)
        self._bias = None if linear.bias is None else linear.bias.detach().to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        rows = x.numel() // self.in_features
        if rows >= self._min_rows:
            return self._apply_packed(x)
        if rows == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        filled = x.reshape(rows, -1).expand(self._min_rows, -1).contiguous()
        return self._apply_packed(filled)[:rows].view(*x.shape[:-1], self.out_features)

    def _apply_packed(self, x: Tensor) -> Tensor:
        y: Tensor = _OPS._linear_pointwise(
            x.to(self._dtype), self._packed, self._bias, "none", [], ""
        )
        return y.to(x.dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch can pack weights of a type."""
    packs = torch._C._has_mkldnn and hasattr(_OPS, "_linear_pointwise")
    return bool(packs) and dtype in (torch.float32, torch.bfloat16)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which this processor multiplies matrices of a type: its own, or float32."""
    own = dtype != torch.bfloat16 or multiplies_bfloat16()
    return dtype if own else torch.float32


def multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this processor."""
    return bool(torch._C._has_mkldnn) and bool(_OPS._is_mkldnn_bf16_supported())


class FixedLinear(nn.Module):
    """y = x W^T + b by a kernel whose tiles never depend on the number of rows."""

    def __init__(self, linear: nn.Linear) -> None:
        """Share a layer's weights."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        from treecast.kernels.triton_rows import fixed_linear

        y = fixed_linear(x.reshape(-1, self.in_features), self._weight, self._bias)
        return y.view(*x.shape[:-1], self.out_features)


@dataclass(frozen=True, slots=True)
class RowLayers:
    """How row-wise layers are computed.

    Attributes:
        linear: makes the stand-in of a layer; the layer is left as it is.
        rms_norm: of rows, a weight and epsilon.
        fits: whether layers of a type of weights can be replaced.
    """

    linear: Callable[[nn.Linear], nn.Module]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    fits: Callable[[torch.dtype], bool]


def packed_layers(min_rows: int) -> RowLayers:
    """For CPU; `min_rows` as in `PackedLinear`."""
    return RowLayers(lambda linear: PackedLinear(linear, min_rows), _rms_norm, can_pack)


def plain_layers() -> RowLayers:
    """The device's own library, free to reorder sums."""
    return RowLayers(lambda linear: linear, _rms_norm, lambda dtype: True)


def fixed_layers() -> RowLayers:
    """Triton kernels under which a row's bits do not depend on how many rows there are."""
    from treecast.kernels.triton_rows import fixed_rms_norm

    return RowLayers(FixedLinear, fixed_rms_norm, lambda dtype: True)


def replace_linears(model: nn.Module, layers: RowLayers) -> int:
    """Replace every `nn.Linear` of a model, in place; returns how many were replaced."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and layers.fits(child.weight.dtype)
    ]
    for parent, name, child in found:
        setattr(parent, name, layers.linear(child))
    return len(found)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


# Operators of torch that have no typed Python front.
_OPS: Any = torch.ops.mkldnn

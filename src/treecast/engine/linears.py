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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from treecast.engine.quantized import (
    STABLE_ROWS,
    HalfLinear,
    Int4Linear,
    Int8Linear,
    has_fbgemm,
    is_bfloat16,
    quantized_embedding,
)
from treecast.errors import ModelError
from treecast.settings import Weights


class PackedLinear(nn.Module):
    """y = x W^T + b over oneDNN's packed weights; stands in for `nn.Linear` at inference."""

    def __init__(self, linear: nn.Linear, min_rows: int, dtype: torch.dtype | None = None) -> None:
        """Pack a layer's weights.

        Args:
            linear: is left as it is.
            min_rows: fewer rows than this are filled up with copies (2 where bits must not depend
                on the number of rows, else 1).
            dtype: in which to keep and multiply them; None for `product_dtype` of their own.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._min_rows = min_rows
        self._dtype = dtype or product_dtype(linear.weight.dtype)
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
        embedding: makes the stand-in of a fused stack's embedding, or gives it back.
        head: as `linear`, for the layer that gives logits; None for the same.
    """

    linear: Callable[[nn.Linear], nn.Module]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    fits: Callable[[torch.dtype], bool]
    embedding: Callable[[nn.Module], nn.Module] = field(default=lambda module: module)
    head: Callable[[nn.Linear], nn.Module] | None = None

    def of_head(self) -> RowLayers:
        """These layers as a head is to be computed with them."""
        return replace(self, linear=self.head or self.linear)


def packed_layers(min_rows: int) -> RowLayers:
    """For CPU; `min_rows` as in `PackedLinear`."""
    return RowLayers(lambda linear: PackedLinear(linear, min_rows), _rms_norm, can_pack)


def filled_rows(num_rows: int) -> int:
    """The least number of rows from `num_rows` that layers of this module do not fill up."""
    if multiplies_bfloat16() or not has_fbgemm():
        return max(num_rows, 2)
    return -(-num_rows // STABLE_ROWS) * STABLE_ROWS


def auto_quantizes() -> bool:
    """Whether weights `auto` keep 16 bits where those hold all of a layer on this processor."""
    return has_fbgemm() and not multiplies_bfloat16()


def cpu_layers(weights: Weights, dtype: torch.dtype, exact: bool) -> RowLayers:
    """For CPU, with weights of some number of bits (see `engine.quantized`).

    `auto` packs weights of type `dtype` where the processor multiplies bfloat16; where it does not,
    it keeps 16 bits of layers whose weights bfloat16 holds exactly, and float32 of the others. With
    `int4` the head keeps 16 bits: in 4 it alone changed an eighth of SmolLM2's likeliest tokens.

    Args:
        weights: kind asked for.
        dtype: of activations.
        exact: whether a row's bits must not depend on the rows beside it.

    Raises:
        ModelError: kernels that this build of torch lacks.
    """
    if weights in ("bfloat16", "int8") and not has_fbgemm():
        raise ModelError(f"weights {weights} need FBGEMM's kernels, which this torch does not have")
    packed = packed_layers(2 if exact else 1)
    if weights == "auto" and not auto_quantizes():
        return packed
    if weights == "bfloat16" and multiplies_bfloat16() and dtype == torch.bfloat16:
        return packed
    if weights == "float32":
        return replace(packed, linear=partial(_float32_linear, min_rows=2 if exact else 1))
    return replace(
        packed,
        linear=_quantized_linear(weights, exact),
        embedding=quantized_embedding,
        head=_quantized_linear("bfloat16", exact) if weights == "int4" else None,
    )


def _quantized_linear(weights: Weights, exact: bool) -> Callable[[nn.Linear], nn.Module]:
    half = partial(HalfLinear, row_step=STABLE_ROWS if exact else 1)
    wide = partial(_float32_linear, min_rows=2 if exact else 1)
    match weights:
        case "int8":
            return Int8Linear
        case "int4":
            return Int4Linear
        case "bfloat16":
            return half
        case _:
            return lambda linear: (half if is_bfloat16(linear.weight) else wide)(linear)


def _float32_linear(linear: nn.Linear, min_rows: int) -> nn.Module:
    return PackedLinear(linear, min_rows, torch.float32)


def plain_layers() -> RowLayers:
    """The device's own library, free to reorder sums."""
    return RowLayers(lambda linear: linear, _rms_norm, lambda dtype: True)


def fixed_layers() -> RowLayers:
    """Triton kernels under which a row's bits do not depend on how many rows there are."""
    from treecast.kernels.triton_rows import fixed_rms_norm

    return RowLayers(FixedLinear, fixed_rms_norm, lambda dtype: True)


def replace_linears(model: nn.Module, layers: RowLayers) -> int:
    """Replace every linear layer of a model, in place; returns how many were replaced."""
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if is_linear(child) and layers.fits(next(child.parameters()).dtype)
    ]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    of_head = set() if head is None else set(head.modules())
    for parent, name in found:  # one at a time: what is replaced is no longer held
        child = getattr(parent, name)
        made = layers.of_head() if child in of_head else layers
        setattr(parent, name, made.linear(_as_linear(child)))
    return len(found)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer: torch's, or GPT-2's, whose weight lies transposed."""
    return type(module) is nn.Linear or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def _as_linear(module: Any) -> nn.Linear:
    if type(module) is nn.Linear:
        return module
    inputs, outputs = module.weight.shape
    made = nn.Linear(inputs, outputs, device="meta")
    made.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
    made.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return made


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In a few operators: torch's own takes a dozen on CPU, a tenth of a small model's step."""
    wide = x.float()
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(norms.new_full((1, 1), eps), norms, norms, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype)


# Operators of torch that have no typed Python front.
_OPS: Any = torch.ops.mkldnn

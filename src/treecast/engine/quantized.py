"""Linear layers whose weights are kept in fewer bits than float32, for CPU.

A step of few rows waits for its weights to arrive from memory, so half of the bytes is nearly half
of the time. The kernels are torch's own (FBGEMM's, and its int4 product); what is ours is the
rounding, and calling them so that a row's bits do not depend on how many rows are beside it.

- `bfloat16`: kept as float16 beside a power of two. Products and sums are float32's. Whatever
  bfloat16 holds within 2^-32 of a layer's largest weight is held exactly.
- `int8`: each output's weights by one scale. Activations are cut into two digits of 7 bits, so that
  products are integers and their sums exact: 7 bits are what AVX2's `vpmaddubsw` adds without
  saturating, and a second digit leaves an error far below the weights'.
- `int4`: groups of 32 inputs with a scale and an offset, as GGUF's Q4_0 and Q4_1 have them.
  Activations are bfloat16.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treecast.settings import Weights

INT4_GROUP = 32
"""Inputs that share a scale: that of GGUF's blocks."""

_TOP_EXPONENT = 15
"""A layer's largest weight lies below 2^15, float16's largest number just below 2^16."""
STABLE_ROWS = 3
"""FBGEMM's float16 kernels for one and two rows add in another order than those for more; a count
that 3 divides is never cut so that they are used."""
_DIGIT = 63
_ZERO_POINT = 64
_SECOND_DIGIT = 2 * _DIGIT
_LEAST = 1e-30
_OUTPUT_STEP = 16
_ROWS_AT_ONCE = 1024
_NUMBERS_AT_ONCE = 1 << 20


class HalfLinear(nn.Module):
    """y = x W^T + b with weights of 16 bits; stands in for `nn.Linear` at inference."""

    def __init__(self, linear: nn.Linear, row_step: int = 1) -> None:
        """Pack a layer's weights.

        Args:
            linear: is left as it is.
            row_step: rows are filled up to a multiple of it, so that a row's bits are its own.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._row_step = row_step
        weight = linear.weight.detach().float()
        self._scale = _power_of_two(weight)
        with _fbgemm():
            self._packed = _OPS.linear_prepack_fp16(weight / self._scale, _bias(linear))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        rows = x.reshape(-1, self.in_features).float() * self._scale
        count = len(rows)
        if missing := -count % self._row_step:
            rows = F.pad(rows, (0, 0, 0, missing))
        y: Tensor = _OPS.linear_dynamic_fp16(rows, self._packed)
        if missing:
            y = y[:count]
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int8Linear(nn.Module):
    """y = x W^T + b with weights of 8 bits; stands in for `nn.Linear` at inference.

    Sums of integers have no order, so a row's bits are its own.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Round and pack a layer's weights; `linear` is left as it is."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        values = (weight / scales[:, None]).round_().to(torch.int8)
        with _fbgemm(), warnings.catch_warnings():
            # Tensors of this kind are to leave torch one day, which is pinned; FBGEMM asks for one.
            warnings.simplefilter("ignore")
            no_offsets = torch.zeros(len(scales), dtype=torch.long)
            rounded = torch._make_per_channel_quantized_tensor(values, scales, no_offsets, 0)
            self._packed = _OPS.linear_prepack(rounded, None)
        self._bias = _bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        rows = x.reshape(-1, self.in_features).float()
        count = len(rows)
        steps = rows.abs().amax(-1, keepdim=True).clamp_min_(_LEAST).div_(_DIGIT)
        scaled = rows / steps
        digits = torch.empty((2 * count, self.in_features))
        first, second = digits[:count], digits[count:]
        torch.round(scaled, out=first)
        torch.sub(scaled, first, out=second).mul_(_SECOND_DIGIT)
        y: Tensor = _OPS.linear_with_input_q_dq_qweight_dq_output_fp32(
            digits, 1.0, _ZERO_POINT, self._packed
        )
        y = y[:count].add_(y[count:], alpha=1 / _SECOND_DIGIT).mul_(steps)
        if self._bias is not None:
            y += self._bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Int4Linear(nn.Module):
    """y = x W^T + b with weights of 4 bits; stands in for `nn.Linear` at inference.

    The kernel adds up each row by itself, in order, in float32; so its bits are its own.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Round and pack a layer's weights; `linear` is left as it is."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._missing = -linear.in_features % INT4_GROUP
        filled = (0, self._missing, 0, -linear.out_features % _OUTPUT_STEP)
        made = Int4Weights.of(F.pad(linear.weight.detach(), filled))
        self._packed = _ATEN._convert_weight_to_int4pack_for_cpu(made.values + 8, 1)
        self._scales = torch.stack((made.scales.T, made.offsets.T), -1).contiguous()
        self._bias = _bias(linear)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        rows = x.reshape(-1, self.in_features).bfloat16()
        if self._missing:
            rows = F.pad(rows, (0, self._missing))
        y: Tensor = _ATEN._weight_int4pack_mm_for_cpu(rows, self._packed, INT4_GROUP, self._scales)
        y = y[:, : self.out_features].to(x.dtype)
        if self._bias is not None:
            y = y + self._bias.to(x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True, slots=True)
class Int4Weights:
    """A layer's weights in 4 bits: value * scale + offset.

    Attributes:
        values: [out_features, in_features] int32, -8 to 7.
        scales, offsets: [out_features, in_features / INT4_GROUP] bfloat16.
    """

    values: Tensor
    scales: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Self:
        """Round weights [out_features, in_features]; no data is needed.

        Each group takes the grid with the lesser squared error: that between its extremes, or that
        without an offset whose -8 is its largest weight. So the weights of a Q4_1 or Q4_0 block
        come back as they were, if bfloat16 holds scale and offset.
        """
        groups = weight.reshape(len(weight), -1, INT4_GROUP)
        parts = [_best_grid(part.float()) for part in _in_parts(groups)]
        values, scales, offsets = (torch.cat(each) for each in zip(*parts, strict=True))
        return cls(values.flatten(1), scales, offsets)

    def floats(self) -> Tensor:
        """[out_features, in_features] float32: the weights that these stand for."""
        groups = self.values.view(len(self.values), -1, INT4_GROUP)
        return _on_grid(groups, self.scales, self.offsets).flatten(1)


_Grid = tuple[Tensor, Tensor, Tensor]
"""Values [outputs, groups, INT4_GROUP], scales and offsets [outputs, groups]."""


def _best_grid(groups: Tensor) -> _Grid:
    first, second = (_rounded(groups, scales, offsets) for scales, offsets in _grids(groups))
    better = _error(first, groups) < _error(second, groups)
    return (
        first[0].where(better[..., None], second[0]),
        first[1].where(better, second[1]),
        first[2].where(better, second[2]),
    )


def _error(grid: _Grid, groups: Tensor) -> Tensor:
    return (_on_grid(*grid) - groups).square().sum(-1)


def _grids(groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and offsets [outputs, groups] of two grids: from extreme to extreme, and symmetric."""
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / 15
    yield scales.bfloat16(), ((low + high + scales) / 2).bfloat16()
    largest = torch.where(-low > high, low, high)
    yield (largest / -8).bfloat16(), torch.zeros_like(largest).bfloat16()


def _rounded(groups: Tensor, scales: Tensor, offsets: Tensor) -> _Grid:
    apart = groups - offsets.float()[..., None]
    steps = scales.float().where(scales != 0, 1.0)[..., None]
    return (apart / steps).round_().clamp_(-8, 7).int(), scales, offsets


def _on_grid(values: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    return values * scales.float()[..., None] + offsets.float()[..., None]


def kept_bytes(kind: Weights, out_features: int, in_features: int) -> int:
    """Bytes of a layer's weights of a kind of this module: values, scales and offsets."""
    match kind:
        case "int8":
            return out_features * (in_features + 4)
        case "int4":
            groups = -(-in_features // INT4_GROUP)
            outputs = -(-out_features // _OUTPUT_STEP) * _OUTPUT_STEP
            return outputs * groups * (INT4_GROUP // 2 + 4)
        case _:
            return out_features * in_features * 2


def quantized_embedding(embedding: nn.Module) -> nn.Module:
    """The table in bfloat16, if that holds all of it exactly; else the module as it is."""
    if type(embedding) is not nn.Embedding or not is_bfloat16(embedding.weight):
        return embedding
    return _QuantizedEmbedding(embedding)


class _QuantizedEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._dtype = embedding.weight.dtype
        self._table = embedding.weight.detach().bfloat16()

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self._table).to(self._dtype)


def is_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 holds every weight exactly: it does those of most published models."""
    parts = _in_parts(weight.detach().reshape(-1), _NUMBERS_AT_ONCE)
    return all(torch.equal(part.bfloat16().to(part.dtype), part) for part in parts)


def _in_parts(weight: Tensor, at_once: int = _ROWS_AT_ONCE) -> Iterator[Tensor]:
    """A few rows at a time, so that what is made of them stays small."""
    for begin in range(0, len(weight), at_once):
        yield weight[begin : begin + at_once]


def has_fbgemm() -> bool:
    """Whether this build of torch has the kernels of `bfloat16` and `int8` (x86 has)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Pack for FBGEMM, whichever library the process prefers."""
    quantized: Any = torch.backends.quantized
    before = quantized.engine
    quantized.engine = "fbgemm"
    try:
        yield
    finally:
        quantized.engine = before


def _power_of_two(weight: Tensor) -> float:
    """What to divide weights by so that the largest lies just below 2^15."""
    largest = weight.abs().amax() if weight.numel() else torch.zeros(())
    exponent = int(torch.frexp(largest).exponent)
    return 2.0 ** (exponent - _TOP_EXPONENT) if largest > 0 else 1.0


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach().float()


# Operators of torch that have no typed Python front.
_OPS: Any = torch.ops.quantized
_ATEN: Any = torch.ops.aten

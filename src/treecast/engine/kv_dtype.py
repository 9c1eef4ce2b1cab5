"""Types that a KV pool can be kept in, and how numbers get in and out of them.

`int8` has a scale for each position and head, `fp8` (e4m3) has none; both lose bits for good, and
so do 16-bit types under a model that computes in float32. A row is rounded before anything reads
it, the pass that computes it included, and each by itself; so what is read does not depend on which
pass computed a row, and trees stay lossless over a pool that is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_INT8 = 127.0
_LARGEST_FP8 = 448.0


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How a position's key or value of one head is kept."""

    dtype: torch.dtype

    @property
    def kept(self) -> torch.dtype:
        """Of the pool's tensors: 8-bit floats as bytes, which torch can index."""
        return torch.uint8 if self.dtype == torch.float8_e4m3fn else self.dtype

    @property
    def scaled(self) -> bool:
        """Whether a float32 scale stands beside each."""
        return self.dtype == torch.int8

    def bytes_of(self, dim: int) -> int:
        """Of a vector of `dim` numbers."""
        return dim * self.dtype.itemsize + 4 * self.scaled

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., dim] float to codes of the same shape and scales [..., 1], elementwise."""
        if self.dtype == torch.int8:
            scale = x.abs().amax(-1, keepdim=True).float() / _LARGEST_INT8
            codes = (x.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_()
            return codes.to(torch.int8), scale
        if self.dtype == torch.float8_e4m3fn:  # a cast alone makes NaN of what is beyond
            return x.float().clamp(-_LARGEST_FP8, _LARGEST_FP8).to(self.dtype).view(self.kept), None
        return x.to(self.dtype), None

    def widen(self, codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What is read of codes, in the type that is computed with."""
        wide = codes.view(self.dtype).to(dtype)
        return wide if scale is None else wide.mul_(scale)


KV_FORMATS: dict[str, KVFormat] = {
    "bfloat16": KVFormat(torch.bfloat16),
    "float16": KVFormat(torch.float16),
    "float32": KVFormat(torch.float32),
    "int8": KVFormat(torch.int8),
    "fp8": KVFormat(torch.float8_e4m3fn),
}

"""A rank's part of a layer as plain modules, in place of transformers' hooks on its own.

Plain linears can be packed and fused (`engine.linears`, `engine.llama`), and their sums added in an
order of ours. Whatever has another style keeps its hook.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treecast.engine.sharding.world import World


class RowLinear(nn.Module):
    """A linear layer of which this rank has some input features; the ranks' results are summed."""

    def __init__(self, linear: nn.Linear, world: World) -> None:
        super().__init__()
        self.part = _linear(linear.weight)
        self._bias = None if linear.bias is None else _local(linear.bias)
        self._world = world

    def forward(self, x: Tensor) -> Tensor:
        y = self._world.sum(self.part(x))
        return y if self._bias is None else y + self._bias


class GatheredLinear(nn.Module):
    """A linear layer of which this rank has some output features; all ranks get all of them."""

    def __init__(self, linear: nn.Linear, world: World) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.part = _linear(linear.weight, linear.bias)
        self._world = world

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(x)
        chunk = _chunk(self.out_features, self._world)
        parts = self._world.gather(F.pad(y, (0, chunk - y.shape[-1])))
        return torch.cat(parts, -1)[..., : self.out_features]


class RowEmbedding(nn.Module):
    """An embedding of which this rank has some tokens: zeros for the others, and the sum of all."""

    def __init__(self, embedding: nn.Embedding, world: World) -> None:
        super().__init__()
        self.weight = nn.Parameter(_local(embedding.weight), requires_grad=False)
        self._first = world.place.shard * _chunk(embedding.num_embeddings, world)
        self._world = world

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - self._first
        ours = (local >= 0) & (local < len(self.weight))
        rows = F.embedding(local.where(ours, 0), self.weight)
        return self._world.sum(rows.masked_fill(~ours[..., None], 0))


_PLAIN: dict[tuple[str, type], Callable[[Any, World], nn.Module]] = {
    ("colwise", nn.Linear): lambda module, _: _linear(module.weight, module.bias),
    ("rowwise", nn.Linear): RowLinear,
    ("colwise_gather_output", nn.Linear): GatheredLinear,
    ("embedding_rowwise", nn.Embedding): RowEmbedding,
}


def make_plain(model: Any, world: World) -> None:
    """Replace the hooked modules of a model that transformers has divided, in place."""
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            path = f"{parent_name}.{name}" if parent_name else name
            style = model.tp_plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
            make = _PLAIN.get((style, type(child)))
            if make is not None:
                setattr(parent, name, make(child, world))


def _chunk(size: int, world: World) -> int:
    """How many of `size` features the first ranks have; the last may have fewer."""
    return -(-size // world.place.shape.tp)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    ours = _local(weight)
    made = nn.Linear(ours.shape[1], ours.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(ours, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(_local(bias), requires_grad=False)
    return made


def _local(parameter: Any) -> Tensor:
    """Our part of a divided parameter, or all of one that every rank has."""
    whole = parameter.detach()
    part: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
    return part

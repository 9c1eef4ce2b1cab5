"""Low-rank adapters, several of them in one packed pass.

A linear layer computes all rows of a pass by the model's own weights; then the rows of each adapter
get what its two thin matrices add: y + scale * B (A x). Both products are computed by the same kind
of layer as the model's, so where a row's bits do not depend on the rows beside it, they do not with
adapters either.

Sources: Hu et al. 2021 (arXiv 2106.09685, section 4.1); rows of many adapters in one batch: Sheng
et al. 2023 (S-LoRA, arXiv 2311.03285, section 5) and Chen et al. 2023 (Punica, arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from treecast.adapter import Adapter
from treecast.engine.linears import RowLayers
from treecast.errors import ModelError

_ATTRIBUTE = "treecast_low_ranks"

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one linear layer.

    Attributes:
        down: [rank, in features] A.
        up: [out features, rank] B, times the adapter's scale.
    """

    down: Tensor
    up: Tensor

    @property
    def num_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def like(self, weight: Tensor) -> LowRank:
        """The same where, and in the type in which, a layer's own weight is."""
        return LowRank(*(one.to(weight.device, weight.dtype) for one in (self.down, self.up)))


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A loaded adapter.

    Attributes:
        layers: by the path of the linear layer in the model.
    """

    adapter: Adapter
    layers: Mapping[str, LowRank]


class AdapterRows:
    """Which rows of the running pass are whose. One thread's, as the engine is."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.groups: tuple[tuple[str, Tensor], ...] = ()

    @contextmanager
    def marked(self, names: Sequence[str], num_rows: int, device: torch.device) -> Iterator[None]:
        """While a pass runs.

        Args:
            names: [rows] adapter of each row, empty for none.
            num_rows: of the pass, with padding behind those named.
        """
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            if name:
                rows.setdefault(name, []).append(row)
        self.num_rows = num_rows
        self.groups = tuple(
            (name, torch.tensor(mine, device=device)) for name, mine in rows.items()
        )
        try:
            yield
        finally:
            self.groups = ()


class AdaptedLinear(nn.Module):
    """A linear layer, and what adapters add for their rows."""

    def __init__(
        self, linear: nn.Module, low_ranks: Mapping[str, nn.Sequential], rows: AdapterRows
    ) -> None:
        """`linear` computes all rows; `low_ranks` are A, then B, by adapter."""
        super().__init__()
        self._linear = linear
        self._low_ranks = dict(low_ranks)
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """[..., rows, in features] to [..., rows, out features].

        Raises:
            ModelError: it is given some of the pass's rows only, so nobody knows whose they are.
        """
        y: Tensor = self._linear.forward(x)
        for name, rows in self._rows.groups:
            if (low_rank := self._low_ranks.get(name)) is None:
                continue
            if x.shape[-2] != self._rows.num_rows:
                raise ModelError(
                    f"adapter {name!r} changes a layer that is given {x.shape[-2]} of a pass's "
                    f"{self._rows.num_rows} rows; only layers of all rows can be adapted"
                )
            y.index_add_(-2, rows, low_rank(x.index_select(-2, rows)))
        return y


def attach(model: nn.Module, adapters: Sequence[AdapterWeights]) -> None:
    """Hang adapters on a model's linear layers, for whoever replaces those.

    Raises:
        ModelError: an adapter's layer is not there, no linear layer, or of another shape.
    """
    for weights in adapters:
        name, num_bytes = weights.adapter.name, 0
        for path, low_rank in weights.layers.items():
            linear = _linear_at(model, path, name)
            _check_fits(low_rank, linear, f"adapter {name!r}, layer {path}")
            mine = low_rank.like(linear.weight)
            _hang(linear, low_ranks_of(linear) | {name: mine})
            num_bytes += mine.num_bytes
        _log.info("adapter.loaded", name=name, layers=len(weights.layers), num_bytes=num_bytes)


def low_ranks_of(linear: nn.Module) -> dict[str, LowRank]:
    """What adapters add to a layer, by their names."""
    found: dict[str, LowRank] = getattr(linear, _ATTRIBUTE, {})
    return found


def with_adapters(layers: RowLayers, thin: RowLayers, rows: AdapterRows) -> RowLayers:
    """The same layers, for a model that adapters were attached to; theirs are `thin` ones."""

    def linear(given: nn.Linear) -> nn.Module:
        low_ranks = low_ranks_of(given)
        if not low_ranks:
            return layers.linear(given)
        made = {
            name: nn.Sequential(thin.linear(_bare(one.down)), thin.linear(_bare(one.up)))
            for name, one in low_ranks.items()
        }
        return AdaptedLinear(layers.linear(given), made, rows)

    return replace(layers, linear=linear)


def reordered(made: nn.Linear, source: nn.Linear, order: Tensor) -> nn.Linear:
    """`made`, whose outputs are those of `source` in another order, with its adapters."""
    _hang(
        made,
        {name: LowRank(one.down, one.up[order]) for name, one in low_ranks_of(source).items()},
    )
    return made


def fused(made: nn.Linear, parts: Sequence[nn.Linear]) -> nn.Linear:
    """`made`, whose outputs are those of all parts, with their adapters.

    Ranks add up: A's stand one below the other, B's on a diagonal.
    """
    names = dict.fromkeys(name for part in parts for name in low_ranks_of(part))
    _hang(made, {name: _join([_part(part, name) for part in parts]) for name in names})
    return made


def _join(parts: Sequence[LowRank]) -> LowRank:
    return LowRank(
        torch.cat([part.down for part in parts]),
        torch.block_diag(*(part.up for part in parts)),  # type: ignore[no-untyped-call]
    )


def _part(linear: nn.Linear, name: str) -> LowRank:
    """An adapter's share of one layer; of rank 0 where it leaves it as it is."""
    nothing = LowRank(
        linear.weight.new_zeros(0, linear.in_features),
        linear.weight.new_zeros(linear.out_features, 0),
    )
    return low_ranks_of(linear).get(name, nothing)


def _hang(linear: nn.Module, low_ranks: Mapping[str, LowRank]) -> None:
    setattr(linear, _ATTRIBUTE, dict(low_ranks))


def _bare(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return made


def _linear_at(model: nn.Module, path: str, name: str) -> nn.Linear:
    try:
        found: Any = model.get_submodule(path)
    except AttributeError:
        raise ModelError(f"adapter {name!r} changes {path}, which the model lacks") from None
    if found is getattr(model, "get_output_embeddings", lambda: None)():
        raise ModelError(f"adapter {name!r} changes the model's head, {path}; that is not served")
    if type(found) is not nn.Linear:
        raise ModelError(
            f"adapter {name!r} changes {path}, a {type(found).__name__}; "
            "only linear layers are adapted"
        )
    return found


def _check_fits(low_rank: LowRank, linear: nn.Linear, what: str) -> None:
    down, up = tuple(low_rank.down.shape), tuple(low_rank.up.shape)
    if down[1:] != (linear.in_features,) or up != (linear.out_features, down[0]):
        raise ModelError(
            f"{what} has shapes {down} and {up}; the model's layer takes "
            f"(rank, {linear.in_features}) and ({linear.out_features}, rank)"
        )

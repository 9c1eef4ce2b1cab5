"""Families whose attention does not go through transformers' interface: theirs is routed to ours.

Each detour is what is left of a family's attention module when scores, softmax and cache are
ours: projections, rotation, and what it does to scores. Position biases follow a key's position in
the text, so a tree's siblings share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from treecast.engine import bridge
from treecast.engine.bridge import TreePass
from treecast.kernels.scores import PLAIN, ScoreRule


class _Route:
    """Where a model's layers find the pass that goes on: they hand no unknown arguments down."""

    def __init__(self) -> None:
        self._tree: TreePass | None = None

    def tree(self) -> TreePass:
        """The pass that goes on."""
        assert self._tree is not None, "a rerouted model was called without its pass"
        return self._tree

    def take(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """As a forward pre-hook of the model: keep its pass, and take it from the arguments."""
        self._tree = kwargs.pop("tree", None)
        return args, kwargs

    def attend(
        self,
        layer: int,
        query: Tensor,  # [1, query heads, rows, head dim]
        key: Tensor,
        value: Tensor,
        scaling: float,
        rule: ScoreRule = PLAIN,
    ) -> Tensor:  # [1, rows, query heads * value dim]
        return self.tree().attend(layer, query, key, value, scaling, rule).flatten(2)


@dataclass(frozen=True, slots=True)
class _Detour:
    """What is changed in a family: modules of one class, each given the route."""

    module: str
    change: Callable[[Any, _Route], None]
    implementation: str = "eager"


def implementation(model_type: str) -> str:
    """Name of the attention that a family is to be loaded with."""
    detour = _DETOURS.get(model_type)
    return bridge.IMPLEMENTATION if detour is None else detour.implementation


def reroute(model: Any) -> None:
    """Route the attention of a model that needs it, in place; others are left as they are."""
    detour = _DETOURS.get(model.config.model_type)
    if detour is None:
        return
    route = _Route()
    model.register_forward_pre_hook(route.take, with_kwargs=True)
    for module in model.modules():
        if type(module).__name__ == detour.module:
            detour.change(module, route)


def _falcon(module: Any, route: _Route) -> None:
    group = module.num_heads // module.num_kv_heads if module.new_decoder_architecture else 1
    alibi = module.config.alibi
    scaling = module.head_dim**-0.5
    # Its biases are rounded to bfloat16 before they are scaled, in training too.
    slopes = _slopes(module.num_heads).bfloat16()
    rule = ScoreRule(bias=lambda at: _linear(slopes, at) * scaling) if alibi else PLAIN

    def forward(
        self: Any, hidden: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        split = self._split_heads(self.query_key_value(hidden))
        query, key, value = (part.transpose(1, 2) for part in split)
        if not alibi:
            cos, sin = (part.unsqueeze(1) for part in position_embeddings)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        # Heads of a group are copies of one.
        attended = route.attend(
            self.layer_idx, query, key[:, ::group], value[:, ::group], scaling, rule
        )
        return self.dense(attended), None

    module.forward = MethodType(forward, module)


def _mpt(module: Any, route: _Route) -> None:
    slopes = _mpt_slopes(module.n_heads)
    rule = ScoreRule(bias=lambda positions: _linear(slopes, positions))

    def forward(self: Any, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        qkv = self.Wqkv(hidden)
        if self.clip_qkv:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = (
            part.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2)
        )
        attended = route.attend(self.layer_idx, query, key, value, self.softmax_scale, rule)
        return self.out_proj(attended), None

    module.forward = MethodType(forward, module)


def _bloom(module: Any, route: _Route) -> None:
    slopes = _slopes(module.num_heads)
    rule = ScoreRule(bias=lambda positions: _linear(slopes, positions))

    def forward(self: Any, hidden: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
        query, key, value = self._reshape(self.query_key_value(hidden))
        attended = route.attend(self.layer_idx, query, key, value, self.inv_norm_factor, rule)
        return self.dense(attended) + residual, None

    module.forward = MethodType(forward, module)


def _scores_only(
    scaling: Callable[[Any], float], rule: Callable[[Any], ScoreRule] = lambda module: PLAIN
) -> Callable[[Any, _Route], None]:
    """For modules that have their scores and softmax in a method of its own, `_attn`."""

    def change(module: Any, route: _Route) -> None:
        scale, ruled = scaling(module), rule(module)
        layer = getattr(module, "layer_id", None)

        def attn(self: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
            index = self.layer_idx if layer is None else layer
            attended = route.attend(index, query, key, value, scale, ruled)
            return attended.view(*attended.shape[:2], query.shape[1], -1).transpose(1, 2), None

        module._attn = MethodType(attn, module)

    return change


def _neo_rule(module: Any) -> ScoreRule:
    local = module.attention_type == "local"
    return ScoreRule(window=module.config.window_size) if local else PLAIN


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _linear(slopes: Tensor, positions: Tensor) -> Tensor:
    """[heads, keys] float32: the products, as the slopes' type rounds them."""
    return (slopes.to(positions.device)[:, None] * positions).float()


def _slopes(heads: int) -> Tensor:
    """[heads] of ALiBi (Press et al., arXiv 2108.12409): a geometric series, then one between."""
    whole = 2 ** math.floor(math.log2(heads))
    series = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    between = [2 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)]
    return torch.tensor(series + between)


def _mpt_slopes(heads: int) -> Tensor:
    """[heads]: as `_slopes`, but the extra ones come first, and from the longer series."""
    whole = 2 ** math.ceil(math.log2(heads))
    slopes = torch.tensor([2 ** (-8 * i / whole) for i in range(1, whole + 1)])
    return slopes if whole == heads else torch.cat((slopes[1::2], slopes[::2]))[:heads]


def _hand_down(module: Any, route: _Route) -> None:
    """For modules that go through the interface, in layers that keep unknown arguments back."""
    inner = module.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, tree=route.tree(), **kwargs)

    module.forward = MethodType(forward, module)


_scaled = _scores_only(lambda module: float(module.head_dim**-0.5))

_DETOURS = {
    "falcon": _Detour("FalconAttention", _falcon),
    "mpt": _Detour("MptAttention", _mpt),
    "bloom": _Detour("BloomAttention", _bloom),
    "gptj": _Detour("GPTJAttention", _scaled),
    "codegen": _Detour("CodeGenAttention", _scaled),
    "gpt_neo": _Detour("GPTNeoSelfAttention", _scores_only(lambda module: 1.0, _neo_rule)),
    "stablelm": _Detour("StableLmAttention", _hand_down, bridge.IMPLEMENTATION),
    "nemotron": _Detour("NemotronAttention", _hand_down, bridge.IMPLEMENTATION),
}

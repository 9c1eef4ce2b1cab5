"""The Llama-like decoder stack in few operators: fused projections, no module calls.

Most of today's models have this block: RMS norm, rotary attention, RMS norm, gated MLP. It is known
by the modules that a model has, not by its name, and taken only if it then computes what they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from treecast.engine import lora
from treecast.engine.bridge import TreePass
from treecast.engine.linears import RowLayers, replace_linears
from treecast.engine.sharding.layers import RowLinear
from treecast.kernels.scores import PLAIN, ScoreRule

Compute = Callable[..., Any]
Keep = Callable[[int, Any, Callable[[Any], Compute]], Compute]
"""What computes a layer of this number, made of its module by a builder."""


def keep_all(index: int, layer: Any, build: Callable[[Any], Compute]) -> Compute:
    """Weights stay where they are."""
    return build(layer)


def keep_alone(index: int, layer: Any, build: Callable[[Any], Compute]) -> Compute:
    """Weights stay where they are, and the layer lets go of its own: it cannot run any more."""
    compute = build(layer)
    layer._modules.clear()  # what `compute` has of them stays
    return compute


def make_anew(index: int, layer: Any, build: Callable[[Any], Compute]) -> Compute:
    """For a trial: a layer is made whenever it is run, so that one alone is there twice."""
    return lambda *args: build(layer)(*args)


NO_RULES: Mapping[int, ScoreRule] = {}

_MODEL = {"model", "lm_head"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def is_llama_like(model: Any, layers: RowLayers) -> bool:
    """Whether a causal LM is made of the modules that `LlamaRunner` replaces, all of them fit."""
    if _children(model) != _MODEL or _children(model.model) != _DECODER:
        return False
    if not _is_rms_norm(model.model.norm):
        return False
    linears = [m for layer in model.model.layers for m in layer.modules() if _is_linear(m)]
    return (
        all(_is_llama_layer(layer) for layer in model.model.layers)
        and all(layers.fits(linear.weight.dtype) for linear in linears)
        and _turns_whole_heads(model.model)
    )


def _is_llama_layer(layer: Any) -> bool:
    return (
        _children(layer) == _LAYER
        and _children(layer.self_attn) == _ATTENTION
        and _children(layer.mlp) == _MLP
        and _is_silu(layer.mlp.act_fn)
        and _is_rms_norm(layer.input_layernorm)
        and _is_rms_norm(layer.post_attention_layernorm)
        and all(_is_linear(getattr(layer.self_attn, name)) for name in _ATTENTION - {"o_proj"})
        and all(_is_linear(getattr(layer.mlp, name)) for name in ("gate_proj", "up_proj"))
        and _writes(layer.self_attn.o_proj)
        and _writes(layer.mlp.down_proj)
        and _have_biases_alike(layer.self_attn, "q_proj", "k_proj", "v_proj")
        and _have_biases_alike(layer.mlp, "gate_proj", "up_proj")
    )


def _have_biases_alike(parent: Any, *names: str) -> bool:
    return len({getattr(parent, name).bias is None for name in names}) == 1


def _is_rms_norm(norm: Any) -> bool:
    return hasattr(norm, "variance_epsilon") and hasattr(norm, "weight")


def _turns_whole_heads(decoder: Any) -> bool:
    where = decoder.embed_tokens.weight.device
    place = torch.zeros((1, 1), dtype=torch.long, device=where)
    cos, _ = decoder.rotary_emb(torch.empty(0, device=where), place)
    return bool(cos.shape[-1] == decoder.layers[0].self_attn.head_dim)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_silu(activation: nn.Module) -> bool:
    x = torch.linspace(-8, 8, 33)
    return torch.allclose(activation(x), F.silu(x))


def _is_linear(module: Any) -> bool:
    return type(module) is nn.Linear


def _writes(module: Any) -> bool:
    """Whether it can be the last of a block: a linear layer, or one summed over a group."""
    return _is_linear(module) or type(module) is RowLinear


class LlamaRunner:
    """A Llama-like model; see `engine.runner.Runner`.

    Keys are kept with the two halves of each rotated pair side by side, in float32 until the pool
    rounds them. Queries are turned alike, so scores are those of the modules.
    """

    def __init__(
        self,
        model: Any,
        layers: RowLayers,
        rules: Mapping[int, ScoreRule] = NO_RULES,
        keep: Keep = keep_all,
    ) -> None:
        """Run a model for which `is_llama_like` holds.

        Args:
            model: may be dropped, or run as before where `keep` leaves its weights; of a head that
                is more than a linear layer, the linear layers are replaced.
            layers: what linear layers and norms are computed with.
            rules: what layers do to their scores, as its modules told; plain where none is named.
            keep: see `residency.Residency.keep`.
        """
        decoder = model.model
        self._embedding = layers.embedding(decoder.embed_tokens)
        self._rotary = decoder.rotary_emb
        self._layers = [
            keep(i, layer, partial(_Layer, i, layers, rules.get(i, PLAIN)))
            for i, layer in enumerate(decoder.layers)
        ]
        self._norm = _Norm(decoder.norm, layers)
        self._head = _stand_in(model.lm_head, layers.of_head())

    def __call__(self, tokens: Tensor, positions: Tensor, wanted: Tensor, tree: TreePass) -> Tensor:
        hidden = self._embedding(tokens)
        rotation = self._rotation(positions)
        for layer in self._layers:
            hidden = layer(hidden, rotation, tree)
        logits: Tensor = self._head(self._norm(hidden[wanted]))
        return logits

    def _rotation(self, positions: Tensor) -> Tensor:
        """[rows, 1, head dim / 2] complex64: what each pair of a position is multiplied by."""
        exact = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = self._rotary(exact, positions[None])
        half = cos.shape[-1] // 2
        return torch.complex(cos[0, :, None, :half], sin[0, :, None, :half])


class _Layer:
    def __init__(self, index: int, layers: RowLayers, rule: ScoreRule, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        dim = attention.head_dim
        self._index, self._head_dim, self._scaling = index, dim, attention.scaling
        self._rule = rule
        self._heads = attention.q_proj.out_features // dim
        self._kv_heads = attention.k_proj.out_features // dim
        where = attention.q_proj.weight.device
        pairs = torch.arange(dim, device=where).view(2, -1).T.flatten()
        self._qkv = _fuse(
            [
                _reorder_heads(attention.q_proj, pairs),
                _reorder_heads(attention.k_proj, pairs),
                attention.v_proj,
            ],
            layers,
        )
        self._out = _stand_in(attention.o_proj, layers)
        self._gate_up = _fuse([mlp.gate_proj, mlp.up_proj], layers)
        self._down = _stand_in(mlp.down_proj, layers)
        self._attention_norm = _Norm(layer.input_layernorm, layers)
        self._mlp_norm = _Norm(layer.post_attention_layernorm, layers)

    def __call__(self, hidden: Tensor, rotation: Tensor, tree: TreePass) -> Tensor:
        hidden = hidden + self._out(self._attend(hidden, rotation, tree))
        gate, up = self._gate_up.forward(self._mlp_norm(hidden)).chunk(2, -1)
        return hidden + self._down(F.silu(gate).mul_(up))

    def _attend(self, hidden: Tensor, rotation: Tensor, tree: TreePass) -> Tensor:
        """[rows, query heads * head dim]"""
        rows, dim = len(hidden), self._head_dim
        turning = self._heads + self._kv_heads
        qkv = self._qkv.forward(self._attention_norm(hidden)).view(rows, -1, dim)
        pairs = torch.view_as_complex(qkv[:, :turning].float().view(rows, turning, -1, 2))
        turned = torch.view_as_real(pairs * rotation).flatten(2).transpose(0, 1)[None]
        query, key = turned[:, : self._heads], turned[:, self._heads :]
        value = qkv[:, turning:].transpose(0, 1)[None]
        attended = tree.attend(self._index, query, key, value, self._scaling, self._rule)
        return attended.view(rows, -1)


class _Norm:
    def __init__(self, norm: Any, layers: RowLayers) -> None:
        self._rms_norm = layers.rms_norm
        self._weight: Tensor = norm.weight.detach()
        self._eps: float = norm.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self._weight, self._eps)


def _stand_in(module: Any, layers: RowLayers) -> Callable[[Tensor], Tensor]:
    """A linear layer's stand-in; of anything else, with those of the linears within."""
    if _is_linear(module):
        module = layers.linear(module)
    else:
        replace_linears(module, layers)
    forward: Callable[[Tensor], Tensor] = module.forward
    return forward


def _reorder_heads(linear: nn.Linear, order: Tensor) -> nn.Linear:
    """The layer with each head's outputs in another order."""
    heads = linear.out_features // len(order)
    first = torch.arange(heads, device=order.device)[:, None] * len(order)
    rows = (first + order).flatten()
    bias = None if linear.bias is None else linear.bias.detach()[rows]
    return lora.reordered(_linear(linear.weight.detach()[rows], bias), linear, rows)


def _fuse(linears: Sequence[nn.Linear], layers: RowLayers) -> nn.Module:
    """One layer whose outputs are those of all, in order."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears)), "of q, k and v either all have a bias or none"
    joined = _linear(weight, torch.cat(biases) if biases else None)
    return layers.linear(lora.fused(joined, linears))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made

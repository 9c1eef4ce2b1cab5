"""A large target that speaks as a small one does: real text and real acceptance at a large cost.

    python -m treecast.bench.inflate FOLDER --parameters 7e9 [--device cuda]

takes a Llama-like model (SmolLM2) and widens it: a hidden size of 4 or 16 times, as many times the
heads, more gated neurons, more layers. What is added cannot reach the output: new hidden numbers
are never written, new heads and neurons have zero columns in the projection that would write them,
and new layers write nothing. So the logits are the small model's up to rounding, while a pass reads
all the weights and keeps all the keys. Whatever was added is random, except where it must be zero.

Figures from such a model are always labelled *cost-true inflated*: it is no large model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LABEL = "cost-true inflated"
_NEURONS = 256
"""Gated neurons come in multiples of this."""


@dataclass(frozen=True, slots=True)
class Inflation:
    """How much larger.

    Attributes:
        width: hidden size and heads, times this: a power of 4, so that norms stay exact.
        layers: in all.
        neurons: gated neurons of a layer, in all.
    """

    width: int
    layers: int
    neurons: int

    def __post_init__(self) -> None:
        root = math.isqrt(self.width)
        if self.width < 1 or root * root != self.width or root & (root - 1):
            raise ValueError(f"width is {self.width}; it must be 1, 4, 16, ...")


def inflation_to(config: Any, num_parameters: float, width: int = 4, layers: int = 32) -> Inflation:
    """As many gated neurons as bring a model to about `num_parameters`.

    Raises:
        ValueError: the model has more already.
    """
    hidden, head_dim = config.hidden_size * width, _head_dim(config)
    heads = (config.num_attention_heads + config.num_key_value_heads) * width
    layers = max(layers, config.num_hidden_layers)
    attention = 2 * hidden * heads * head_dim
    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    left = (num_parameters - tables) / layers - attention
    neurons = round(left / (3 * hidden) / _NEURONS) * _NEURONS
    if neurons < config.intermediate_size:
        raise ValueError(
            f"{num_parameters:.3g} parameters leave {neurons} gated neurons to a layer; the model "
            f"has {config.intermediate_size}"
        )
    return Inflation(width, layers, neurons)


@torch.no_grad()
def inflate(model: Any, to: Inflation, device: torch.device | str = "cpu") -> Any:
    """A new model of the same data type with the logits of `model`, which is left as it is."""
    from transformers import AutoModelForCausalLM

    old = model.config
    config = type(old)(**{**old.to_dict(), **_grown(old, to)})
    dtype = next(model.parameters()).dtype
    with torch.device(device):
        grown: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    grown.eval()
    wide, narrow = grown.model, model.model
    _place(wide.embed_tokens.weight, narrow.embed_tokens.weight, zero_rest=True)
    if not config.tie_word_embeddings:
        _place(grown.lm_head.weight, model.lm_head.weight, zero_rest=True)
    shrink = to.width**-0.5
    _place_norm(wide.norm, narrow.norm, shrink)
    for index, layer in enumerate(wide.layers):
        if index < len(narrow.layers):
            _place_layer(layer, narrow.layers[index], shrink)
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return grown


def _grown(config: Any, to: Inflation) -> Mapping[str, object]:
    """A mean over `width` times as many numbers, the new ones zero, is so many times smaller."""
    return {
        "hidden_size": config.hidden_size * to.width,
        "num_attention_heads": config.num_attention_heads * to.width,
        "num_key_value_heads": config.num_key_value_heads * to.width,
        "head_dim": _head_dim(config),
        "intermediate_size": to.neurons,
        "num_hidden_layers": to.layers,
        "rms_norm_eps": config.rms_norm_eps / to.width,
        "layer_types": None,
    }


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _place_layer(wide: Any, narrow: Any, shrink: float) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        _place_linear(getattr(wide.self_attn, name), getattr(narrow.self_attn, name))
    for name in ("gate_proj", "up_proj"):
        _place_linear(getattr(wide.mlp, name), getattr(narrow.mlp, name))
    for parent, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        _place_linear(
            getattr(getattr(wide, parent), name), getattr(getattr(narrow, parent), name), True
        )
    _place_norm(wide.input_layernorm, narrow.input_layernorm, shrink)
    _place_norm(wide.post_attention_layernorm, narrow.post_attention_layernorm, shrink)


def _place_linear(wide: nn.Linear, narrow: nn.Linear, zero_rest: bool = False) -> None:
    _place(wide.weight, narrow.weight, zero_rest)
    if narrow.bias is not None:
        wide.bias.zero_()
        wide.bias[: len(narrow.bias)] = narrow.bias


def _place_norm(wide: Any, narrow: Any, shrink: float) -> None:
    wide.weight.zero_()
    wide.weight[: len(narrow.weight)] = narrow.weight.to(wide.weight.device) * shrink


def _place(wide: Tensor, narrow: Tensor, zero_rest: bool) -> None:
    """Put the small matrix in the large one's corner."""
    if zero_rest:
        wide.zero_()
    wide[: narrow.shape[0], : narrow.shape[1]] = narrow


@torch.inference_mode()
def logit_error(grown: Any, model: Any, num_tokens: int = 64) -> float:
    """How far two models' logits are apart over random tokens, by the norm of the small one's."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, num_tokens), generator=generator)
    expected = model(tokens.to(model.device)).logits.float().cpu()
    found = grown(tokens.to(grown.device)).logits.float().cpu()
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    """Write an inflated model beside its tokenizer, once its logits are checked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from treecast.checkpoints import ensure_default_target

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--parameters", type=float, default=7e9)
    parser.add_argument("--width", type=int, default=4, help="times the hidden size: 1, 4, 16")
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    source = flags.model or ensure_default_target()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model = model.eval().to(flags.device)
    to = inflation_to(model.config, flags.parameters, flags.width)
    grown = inflate(model, to, flags.device)
    error = logit_error(grown, model)
    if not error < 0.05:
        raise SystemExit(f"the inflated model's logits are off by {error:.3g}; nothing was written")
    grown.save_pretrained(flags.folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(flags.folder)
    count = sum(parameter.numel() for parameter in grown.parameters())
    print(f"{flags.folder}: {LABEL}, {count / 1e9:.2f}e9 parameters, logits off by {error:.2g}")


if __name__ == "__main__":
    main()

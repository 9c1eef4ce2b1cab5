"""What a model takes of a device's memory, known before any weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from treecast.engine.free_memory import free_bytes
from treecast.engine.linears import can_pack, is_linear, product_dtype
from treecast.engine.loading import DTYPES, LoadOptions, read_servable_config
from treecast.engine.offload import NUM_BUFFERS
from treecast.engine.quantized import kept_bytes
from treecast.engine.unread import decoder_layers, empty_model, matching
from treecast.errors import ModelError
from treecast.kernels.exact import NORM_COLUMNS
from treecast.settings import GIB, Weights

_log = structlog.get_logger()

FEWEST_POOL_TOKENS = 1024
MOST_POOL_TOKENS = 1 << 20
"""Of a pool that is sized by what is free: a page table of so many is still quick."""

WORKSPACE_ROWS = 256
"""Rows of a pass whose activations and logits are reckoned with."""


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes of the device that serving a model takes.

    Attributes:
        weights: in the form that they are computed with.
        kv_pool: all of it.
        workspace: activations and logits of a pass of `WORKSPACE_ROWS`.
        loading: beside the weights while they are read, and given back then.
        adapters: as they are computed with, less the zeros that fusing layers puts between them.
    """

    weights: int
    kv_pool: int
    workspace: int
    loading: int
    adapters: int = 0

    @property
    def most(self) -> int:
        """At the time when it is most."""
        return self.weights + self.adapters + max(self.loading, self.kv_pool + self.workspace)

    def __str__(self) -> str:
        adapters = f"{gib(self.adapters)} for adapters, " if self.adapters else ""
        return (
            f"{gib(self.most)}: {gib(self.weights)} for weights, {adapters}{gib(self.kv_pool)} for "
            f"the KV pool, {gib(self.workspace)} for a pass, {gib(self.loading)} more while loading"
        )

    def check(self, free: int, where: str) -> None:
        """Refuse what cannot fit.

        Raises:
            ModelError: with the numbers.
        """
        if self.most > free:
            raise ModelError(f"the model needs {self}; {where} has {gib(free)} free")


def fitted(
    path: Path, options: LoadOptions, pool_tokens: int | None, adapter_numbers: int = 0
) -> tuple[LoadOptions, int]:
    """See that a model will fit, before any weight is read, and tell the log what it will take.

    Args:
        pool_tokens: of the KV pool; None for half of what weights leave on a host, which others
            use too, and nine tenths on a GPU; `MOST_POOL_TOKENS` at most.
        adapter_numbers: in all adapters' matrices (see `lora_folder.count_numbers`).

    Returns:
        The options, with a share of the device for weights that are offloaded by what is free; and
        the pool's tokens.

    Raises:
        ModelError: it does not fit, with the numbers; or the folder cannot be served.
    """
    free = free_bytes(options.device)
    config = read_servable_config(path).get_text_config()
    token_bytes = kv_bytes_per_token(config, options)
    if options.offload.mode != "none" and options.offload.device_bytes is None:
        pool = free // 4 if pool_tokens is None else token_bytes * pool_tokens
        share = max(0, free - pool - _workspace_bytes(config))
        options = replace(options, offload=replace(options.offload, device_bytes=share))
    need = estimate(path, options, pool_tokens or 0, adapter_numbers)
    if pool_tokens is None:
        left = (free - need.most) * (0.5 if options.on_cpu else 0.9)
        pool_tokens = min(MOST_POOL_TOKENS, max(FEWEST_POOL_TOKENS, int(left // token_bytes)))
        need = replace(need, kv_pool=token_bytes * pool_tokens)
    _log.info(
        "model.memory",
        **{f"{part}_gib": round(count / GIB, 2) for part, count in asdict(need).items()},
        free_gib=round(free / GIB, 2),
        pool_tokens=pool_tokens,
    )
    need.check(free, options.device)
    return options, pool_tokens


def estimate(
    path: Path, options: LoadOptions, pool_tokens: int, adapter_numbers: int = 0
) -> MemoryNeed:
    """What a model folder will take, by its config and the headers of its weights alone.

    Of the KV pool exact for models whose config tells KV heads and their size as most do.

    Raises:
        ModelError: the folder is no causal LM, or one that cannot be served.
    """
    model, config = empty_of(path, options)
    if options.offload.mode == "none":
        weights = computed_bytes(model, options)
    else:
        weights = plan_layers(model, options).weight_bytes
    own = sum(weight.nbytes for weight in model.parameters())
    whole = options.offload.mode == "none" or matching(model, path) is None
    return MemoryNeed(
        weights=weights,
        kv_pool=kv_bytes_per_token(config, options) * pool_tokens,
        workspace=_workspace_bytes(config),
        loading=own if whole and options.on_cpu else 0,
        adapters=adapter_numbers * _number_bytes(options),
    )


def _number_bytes(options: LoadOptions) -> int:
    """Of a number of an adapter's: those are not quantized with the model's weights."""
    own = DTYPES[options.dtype]
    return (product_dtype(own) if options.on_cpu else own).itemsize


def empty_of(path: Path, options: LoadOptions) -> tuple[Any, Any]:
    """A folder's model without weights, and its text config."""
    config = read_servable_config(path)
    model = empty_model(config, DTYPES[options.dtype], "eager")
    return model, config.get_text_config()


def kv_bytes_per_token(config: Any, options: LoadOptions) -> int:
    """Of all layers' keys and values of a position, by a text config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        kv_heads = 1
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    norm = NORM_COLUMNS if options.numerics == "exact" and not options.uses_triton else 0
    kept = options.kv_format
    norm = 0 if options.widens_kv else norm
    per_layer = kv_heads * (kept.bytes_of(dim) + kept.bytes_of(dim + norm))
    return int(config.num_hidden_layers * per_layer)


def _workspace_bytes(config: Any) -> int:
    """Some ten vectors of a row live at once in a layer, and its logits as float32 at the end."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = (10 * config.hidden_size + 3 * inner) * 4
    return int(WORKSPACE_ROWS * (layer + config.vocab_size * 4))


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Which layers stay.

    Attributes:
        streamed: those that are moved for every pass.
        weight_bytes: what weights take of the device, buffers included.
    """

    num_layers: int
    streamed: frozenset[int]
    weight_bytes: int


def plan_layers(model: nn.Module, options: LoadOptions) -> LayerPlan:
    """Keep as many layers as the device's share holds, spread evenly among the others.

    Evenly, so that each layer that stays gives time to move one that does not.

    Raises:
        ModelError: embedding, head and the buffers alone exceed the share.
    """
    layers = [computed_bytes(layer, options) for layer in decoder_layers(model)]
    around = computed_bytes(model, options) - sum(layers)
    share = options.offload.device_bytes
    if share is None or around + sum(layers) <= share:
        return LayerPlan(len(layers), frozenset(), around + sum(layers))
    fixed = least_share(model, options)
    if fixed > share:
        raise ModelError(
            f"weights may take {share / GIB:.2f} GiB of the device; embedding, head and norms take "
            f"{around / GIB:.2f}, and buffers for layers {(fixed - around) / GIB:.2f} more"
        )
    count = len(layers)
    for resident in range(count - 1, -1, -1):
        stay = {i for i in range(count) if (i + 1) * resident // count > i * resident // count}
        taken = fixed + sum(layers[i] for i in stay)
        if taken <= share:
            return LayerPlan(count, frozenset(range(count)) - stay, taken)
    raise AssertionError("no resident layers fit what was seen to fit")


def least_share(model: nn.Module, options: LoadOptions) -> int:
    """What weights take of the device if every layer is streamed.

    Besides embedding, head and norms: the buffers, and on CPU what is read before it is put there.
    """
    layers = [computed_bytes(layer, options) for layer in decoder_layers(model)]
    around = computed_bytes(model, options) - sum(layers)
    return around + (NUM_BUFFERS + options.on_cpu) * max(layers)


def computed_bytes(model: Any, options: LoadOptions) -> int:
    """Bytes of a model's weights in the form that they are computed with.

    A head that is tied to the embedding counts twice on CPU, where it is packed. Weights of 16 bits
    that `auto` finds to be enough count in full: they must be read to be known.
    """
    sizes: dict[tuple[int, bool], int] = {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        packed = options.on_cpu and is_linear(module) and can_pack(module.weight.dtype)
        for weight in module.parameters(recurse=False):
            if packed and weight.dim() == 2:
                size = _packed_bytes(weight, options.weights, module is head)
            else:
                size = weight.nbytes
            sizes[id(weight), packed] = size
    return sum(sizes.values())


def _packed_bytes(weight: Tensor, kind: Weights, is_head: bool) -> int:
    if kind in ("auto", "float32"):
        dtype = torch.float32 if kind == "float32" else product_dtype(weight.dtype)
        return weight.numel() * dtype.itemsize
    return kept_bytes("bfloat16" if kind == "int4" and is_head else kind, *weight.shape)


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB"

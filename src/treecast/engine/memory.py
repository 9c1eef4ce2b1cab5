"""What a model takes of a device's memory, known before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from treecast.engine.linears import can_pack, product_dtype
from treecast.engine.loading import LoadOptions
from treecast.engine.offload import GIB, NUM_BUFFERS
from treecast.engine.unread import decoder_layers
from treecast.errors import ModelError


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


def computed_bytes(model: nn.Module, options: LoadOptions) -> int:
    """Bytes of a model's weights in the form that they are computed with.

    A head that is tied to the embedding counts twice on CPU, where it is packed.
    """
    sizes: dict[tuple[int, bool], int] = {}
    for module in model.modules():
        packed = options.on_cpu and type(module) is nn.Linear and can_pack(module.weight.dtype)
        for weight in module.parameters(recurse=False):
            dtype = product_dtype(weight.dtype) if packed else weight.dtype
            sizes[id(weight), packed] = weight.numel() * dtype.itemsize
    return sum(sizes.values())


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB"

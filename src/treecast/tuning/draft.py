"""Cut a draft out of a target: some of its decoder layers; its embedding and head stay frozen."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treecast.errors import ModelError


def default_layers(num_layers: int, num_target_layers: int) -> tuple[int, ...]:
    """Evenly spread layer indices with the first and the last: (0, 29) for 2 of 30.

    Raises:
        ModelError: fewer than 1 asked for, or more than the target has.
    """
    if not 1 <= num_layers <= num_target_layers:
        raise ModelError(
            f"a draft cannot have {num_layers} layers; its target allows 1 to {num_target_layers}"
        )
    if num_layers == 1:
        return (num_target_layers - 1,)
    step = (num_target_layers - 1) / (num_layers - 1)
    return tuple(round(place * step) for place in range(num_layers))


def cut_draft(target: Any, layers: Sequence[int]) -> Any:
    """Build a causal LM of the target's `layers`, in that order, with copied weights.

    Embedding and head require no gradient; every other parameter does. The target is unchanged.

    Raises:
        ModelError: a layer index is out of range or given twice, or no decoder stack is found.
    """
    num_target_layers = target.config.num_hidden_layers
    for layer in layers:
        if not 0 <= layer < num_target_layers:
            raise ModelError(
                f"layer {layer} is out of range; the target has 0..{num_target_layers - 1}"
            )
    if len(set(layers)) != len(layers):
        raise ModelError(f"layers {list(layers)} name a layer twice")
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [target.config.layer_types[layer] for layer in layers]
    draft: Any = type(target)(config).to(target.dtype)
    draft.load_state_dict(_cut_state(target, layers))
    for frozen in (draft.get_input_embeddings(), draft.get_output_embeddings()):
        frozen.requires_grad_(False)
    return draft


def save_trained(draft: Any, layers: Sequence[int], file: Path, notes: dict[str, str]) -> None:
    """Write the weights that training may change, bfloat16, all or nothing.

    The metadata holds what `checkpoints.assemble_draft` needs, and the notes.
    """
    from safetensors.torch import save_file

    metadata = {
        "format": "pt",
        "num_layers": str(len(layers)),
        "layers": json.dumps(list(layers)),
        "hidden_size": str(draft.config.hidden_size),
        **notes,
    }
    tensors = {
        name: param.detach().to(torch.bfloat16).contiguous()
        for name, param in draft.named_parameters()
        if param.requires_grad
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{file.name}")
    save_file(tensors, partial, metadata=metadata)
    partial.replace(file)


def _cut_state(target: Any, layers: Sequence[int]) -> dict[str, Tensor]:
    """The target's state with only `layers`, renumbered from 0."""
    prefix = _stack_name(target) + "."
    place = {str(layer): str(new) for new, layer in enumerate(layers)}
    state: dict[str, Tensor] = {}
    for name, tensor in target.state_dict().items():
        if not name.startswith(prefix):
            state[name] = tensor
            continue
        layer, _, rest = name.removeprefix(prefix).partition(".")
        if layer in place:
            state[f"{prefix}{place[layer]}.{rest}"] = tensor
    return state


def _stack_name(target: Any) -> str:
    for name, module in target.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == target.config.num_hidden_layers:
            return str(name)
    raise ModelError(f"{type(target).__name__} has no list of decoder layers to cut a draft from")

"""Cut a draft out of a target: some of its decoder layers; its embedding and head stay frozen."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treecast.checkpoints import (
    HEAD_TOKENS,
    SCALE_SUFFIX,
    assemble_draft,
    cut_config,
    read_trained,
)
from treecast.errors import ModelError
from treecast.tuning.whole_file import write_whole

# The projections that write into the residual stream, as the common families call them.
_WRITERS = ("o_proj", "down_proj", "c_proj", "dense", "fc2", "out_proj")


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
    Nothing is dropped out while it trains: it is small beside its corpus.

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
    draft: Any = type(target)(cut_config(target.config, layers)).to(target.dtype).eval()
    draft.load_state_dict(_cut_state(target, layers))
    for frozen in (draft.get_input_embeddings(), draft.get_output_embeddings()):
        frozen.requires_grad_(False)
    return draft


def save_trained(
    draft: Any,
    layers: Sequence[int],
    file: Path,
    notes: dict[str, str],
    storage: str = "bfloat16",
    head_token_ids: Tensor | None = None,
) -> None:
    """Write the weights that training may change, all or nothing.

    The metadata holds what `checkpoints.assemble_draft` needs, and the notes.

    Args:
        storage: "bfloat16", or "int8": matrices as 8-bit rows with a scale each.
        head_token_ids: the tokens that the draft can propose; None is all.
    """
    from safetensors.torch import save

    metadata = {
        "format": "pt",
        "num_layers": str(len(layers)),
        "layers": json.dumps(list(layers)),
        "hidden_size": str(draft.config.hidden_size),
        "vocab_size": str(draft.config.vocab_size),
        **notes,
    }
    tensors: dict[str, Tensor] = {}
    for name, param in draft.named_parameters():
        if param.requires_grad:
            tensors |= _stored(name, param.detach(), storage)
    if head_token_ids is not None:
        tensors[HEAD_TOKENS] = head_token_ids.to(torch.int32)
    write_whole(file, save(tensors, metadata=metadata))


def check_assembles(draft: Any, layers: Sequence[int], target: Path, folder: Path) -> None:
    """Put an untrained draft together and load it, so that no training is in vain. Blocks.

    Makes the folder, and leaves nothing in it.

    Raises:
        ModelError: the folder cannot be written, or what is made of the target cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
            out = Path(scratch)
            save_trained(draft, layers, out / "trained", {})
            assemble_draft(out / "trained", target, out)
            _, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    except ModelError:
        raise
    except Exception as error:  # whatever a family's code raises
        raise ModelError(f"no draft of {target} can be made in {folder}: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"a draft of {target} would lack {', '.join(missing)}")


def check_layers(file: Path, trained: Sequence[int], layers: Sequence[int]) -> None:
    """Raise ModelError where a draft lacks layers of the file that it is to start from."""
    if missing := [layer for layer in trained if layer not in layers]:
        raise ModelError(
            f"{file} has layers {list(trained)}; the draft has {list(layers)}, "
            f"which lacks {missing}"
        )


def load_start(draft: Any, layers: Sequence[int], file: Path) -> None:
    """Take trained weights from a file into a freshly cut draft, in place.

    Layers of the draft that the file lacks are silenced: their last projections become zero, so
    that the draft computes what the file's did, and training wakes them.

    Raises:
        ModelError: the file's vocabulary, hidden size or layers do not fit the draft.
    """
    trained = read_trained(file)
    config = draft.config
    trained.check_fits(config.vocab_size, config.hidden_size, "the target")
    check_layers(file, trained.layers, layers)
    stack = _stack_name(draft)
    state: dict[str, Tensor] = {}
    for name, tensor in trained.tensors.items():
        if name.startswith(f"{stack}."):
            number, _, rest = name.removeprefix(f"{stack}.").partition(".")
            name = f"{stack}.{layers.index(trained.layers[int(number)])}.{rest}"
        state[name] = tensor
    draft.load_state_dict(state, strict=False)
    with torch.no_grad():
        for place, layer in enumerate(layers):
            if layer not in trained.layers:
                _silence(draft.get_submodule(f"{stack}.{place}"))


def _silence(layer: nn.Module) -> None:
    """Zero the two projections that write into the residual stream."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in _WRITERS:
            module.weight.zero_()


def _stored(name: str, tensor: Tensor, storage: str) -> dict[str, Tensor]:
    if storage == "int8" and tensor.ndim == 2:
        scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127.0
        rounded = (tensor.float() / scale).round().to(torch.int8)
        return {name: rounded, name + SCALE_SUFFIX: scale}
    return {name: tensor.to(torch.bfloat16).contiguous()}


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

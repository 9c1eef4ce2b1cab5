"""A model whose layers have not been read: their weights come one layer at a time.

Only where a checkpoint names its tensors as the modules do, as most do. Others (experts that are
stored one by one, say) are put together by transformers while it reads all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treecast.engine.tensor_files import read_tensor
from treecast.errors import ModelError
from treecast.model_folder import StoredTensor, stored_tensors


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of a causal LM's layers.

    Raises:
        ModelError: no list has as many modules as the model has layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [one for one in model.modules() if type(one) is nn.ModuleList and len(one) == count]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of its {count} layers to offload")
    return max(lists, key=lambda one: sum(weight.numel() for weight in one.parameters()))


def unread_model(path: Path, config: Any, dtype: torch.dtype, attention: str) -> Any | None:
    """Build a model and read all but its layers, which are left on torch's device `meta`.

    Returns:
        None where the checkpoint must be read whole by transformers.
    """
    from transformers import GenerationConfig

    model = empty_model(config, dtype, attention)
    found = matching(model, path)
    if found is None:
        return None
    within = _prefix_of(model, decoder_layers(model))
    for name, target in model.state_dict(keep_vars=True).items():
        if not name.startswith(within) and name in found:
            put_tensor(model, name, read_tensor(found[name]).to(target.dtype))
    model.tie_weights()
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def empty_model(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """A causal LM with all its modules and buffers, and parameters on torch's device `meta`."""
    import transformers

    with _parameters_on_meta():
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )


class LayerSource:
    """Where the weights of a model's layers come from, as they were trained.

    As long as it is open the model can be run: each layer is filled while it computes.
    """

    def __init__(self, model: Any, path: Path) -> None:
        """Take the layers' weights from the folder, or those that the model has been read with."""
        self._layers = decoder_layers(model)
        self._device = next(p.device for p in model.parameters() if not p.is_meta)
        self._read = self._reader(model, path)
        for layer in self._layers:
            _empty(layer)
        self._hooks = [
            hook
            for index, layer in enumerate(self._layers)
            for hook in (
                layer.register_forward_pre_hook(lambda one, _, i=index: self.fill(i, one)),
                layer.register_forward_hook(lambda one, *_: _empty(one)),
            )
        ]

    def fill(self, index: int, layer: nn.Module) -> None:
        """Give a layer, or a copy of it, its weights."""
        for name, weight in layer.named_parameters():
            tensor = self._read(f"{index}.{name}")
            put_tensor(layer, name, tensor.to(self._device, weight.dtype))

    def close(self) -> None:
        """Leave the layers as they are."""
        for hook in self._hooks:
            hook.remove()
        self._read = _nothing_left

    def _reader(self, model: Any, path: Path) -> Callable[[str], Tensor]:
        weights = dict(self._layers.named_parameters())
        if not any(weight.is_meta for weight in weights.values()):
            return {name: weight.detach() for name, weight in weights.items()}.__getitem__
        stored = matching(model, path)
        assert stored is not None, "a model that is not read has names that match"
        prefix = _prefix_of(model, self._layers)
        return lambda name: read_tensor(stored[prefix + name])


def put_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by its dotted name."""
    owner_name, _, last = name.rpartition(".")
    owner: Any = module.get_submodule(owner_name)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[last] = tensor


def _empty(layer: nn.Module) -> None:
    for name, weight in layer.named_parameters():
        put_tensor(layer, name, torch.empty_like(weight, device="meta"))


def _nothing_left(name: str) -> Tensor:
    raise AssertionError(f"{name} is wanted from weights that were let go")


def matching(model: Any, path: Path) -> dict[str, StoredTensor] | None:
    """Each of a model's tensors in a folder; None where transformers must put some together.

    That is where one is missing, or of another shape, or stays in float32 whatever is asked for.
    """
    if model.dtype != torch.float32 and getattr(model, "_keep_in_fp32_modules_strict", None):
        return None
    stored = {tensor.name: tensor for tensor in stored_tensors(path)}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, StoredTensor] = {}
    for name, weight in model.named_parameters():
        tensor = stored.get(name) or stored.get(name.removeprefix(prefix))
        if tensor is None or tensor.shape != tuple(weight.shape):
            return None
        found[name] = tensor
    own = dict(model.named_parameters(remove_duplicate=False)).keys() - found.keys()
    if own & stored.keys():
        return None  # tied, and stored as well: transformers sees whether they agree
    for name, _ in model.named_buffers():
        if (tensor := stored.get(name) or stored.get(name.removeprefix(prefix))) is not None:
            found[name] = tensor
    return found


def _prefix_of(model: Any, layers: nn.ModuleList) -> str:
    return next(f"{name}." for name, module in model.named_modules() if module is layers)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Have modules that are built keep no memory for parameters; buffers are made as ever."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is tied stays the same object
            param = nn.Parameter(param.to("meta"), requires_grad=False)
            param._is_hf_initialized = True  # type: ignore[attr-defined]  # spares drawing numbers
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

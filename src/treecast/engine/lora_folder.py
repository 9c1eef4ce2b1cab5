"""Adapters as the library peft saves them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treecast.adapter import Adapter
from treecast.engine.lora import AdapterWeights, LowRank
from treecast.errors import ModelError

MAX_RANK = 256

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")
_REFUSED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "monteclora_config",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "megatron_config",
)
"""Entries of a config that make it more than A and B of linear layers."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""How A and B may begin; other ways (pissa, olora, loftq, ..) change the model's weights too."""


def read_adapter(name: str, folder: Path) -> AdapterWeights:
    """Read an adapter; whether it fits a model is for `lora.attach` to say.

    Raises:
        ModelError: a file is missing or cut, the rank is beyond 256, or the config asks for
            something that is not served, by its name.
    """
    where = f"adapter {name!r} in {folder}"
    config = _read_config(folder / _CONFIG, where)
    weights = folder / _WEIGHTS
    downs, ups = _pairs(_tensors(weights, where), where)
    layers = {
        path: LowRank(down, ups[path] * _scale(config, path, down.shape[0], where))
        for path, down in downs.items()
    }
    return AdapterWeights(Adapter(name, _revision(folder)), layers)


def count_numbers(name: str, folder: Path) -> int:
    """Numbers of all A and B, by the header alone.

    Raises:
        ModelError: the file is missing or cut.
    """
    from safetensors import safe_open

    where, weights = f"adapter {name!r} in {folder}", folder / _WEIGHTS
    with _readable(where), safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(each).get_shape()) for each in file.keys())  # noqa: SIM118


def _read_config(file: Path, where: str) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{where}: {_CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{where} is of type {kind}; only LORA is served")
    for entry in _REFUSED:
        if config.get(entry):
            raise ModelError(f"{where}: {entry} is {config[entry]!r}, which is not served")
    if config.get("bias", "none") != "none":
        raise ModelError(f"{where}: bias is {config['bias']!r}; only 'none' is served")
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        raise ModelError(
            f"{where}: init_lora_weights is {start!r}, which changes the model's own weights; save "
            "it with path_initial_model_for_weight_conversion"
        )
    return config


def _tensors(file: Path, where: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with _readable(where):
        return load_file(file)


@contextmanager
def _readable(where: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{where}: {_WEIGHTS} cannot be read: {error}") from None


def _pairs(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by layer, in float32."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in tensors.items():
        end = next((at for at, end in enumerate(_ENDS) if name.endswith(end)), None)
        if end is None or not name.startswith(_PREFIX) or tensor.ndim != 2:
            raise ModelError(f"{where}: tensor {name} is no A or B of a linear layer")
        found[end][name[len(_PREFIX) : -len(_ENDS[end])]] = tensor.to(torch.float32)
    if not found[0] or found[0].keys() != found[1].keys():
        alone = sorted(found[0].keys() ^ found[1].keys())
        raise ModelError(f"{where} has no pairs of A and B" + (f" for {alone[0]}" if alone else ""))
    return found


def _scale(config: Mapping[str, Any], path: str, rank: int, where: str) -> float:
    """What B is multiplied by; its own rank may be that of a pattern.

    Source: peft's `LoraLayer.update_layer`; Kalajdzievski 2023 (rsLoRA, arXiv 2312.03732).
    """
    if not 1 <= rank <= MAX_RANK:
        raise ModelError(f"{where}: rank of {path} is {rank}; allowed: 1..{MAX_RANK}")
    told = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
    if told != rank:
        raise ModelError(f"{where}: rank of {path} is {rank}; its config says {told}")
    alpha = float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8)))
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
    """As peft looks them up: a pattern means the path's end, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return otherwise


def _revision(folder: Path) -> str:
    """16 hexadecimal digits of config and weights."""
    digest = hashlib.sha256((folder / _CONFIG).read_bytes())
    with (folder / _WEIGHTS).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]

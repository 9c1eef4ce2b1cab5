"""What a model folder holds: checks that name what is wrong, and stable fingerprints.

A *model folder* is what `from_pretrained` reads: config.json, weights, tokenizer files. Only
headers are read here, and nothing imports torch or transformers until a function needs it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treecast.errors import ModelError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)
_SAMPLE_BYTES = 1 << 16
_MAX_SAMPLES = 2048
# What a config says about how it came to be, not about the model.
_UNRELATED_KEYS = ("_name_or_path", "_model_name_or_path", "transformers_version")


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `folder` at the end, unless another came first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
    ) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which another user of an image cannot read
        try:
            partial.rename(folder)
        except OSError:
            # Another process finished first; its folder has the same content.
            if not folder.is_dir():
                raise


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
    _check_causal(path, read_config(path))
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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file, and where its bytes lie; `dtype` in the file's own words."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a folder's safetensors, by their headers alone; none of other files.

    Raises:
        ModelError: there are no weights, or a header cannot be read.
    """
    for file in weight_files(path):
        if file.suffix != ".safetensors":
            continue
        header, begin = _safetensors_header(file)
        for name, entry in header.items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                shape = tuple(entry["shape"])
                yield StoredTensor(name, file, entry["dtype"], shape, begin + first, end - first)


def model_revision(path: Path) -> str:
    """A short hash of config and weights, the same wherever the folder is copied.

    Files up to 128 MiB count whole; of larger ones, the size and 2048 evenly spread blocks of
    64 KiB, so that it stays quick for a model of any size.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    config = read_config(path)
    for key in _UNRELATED_KEYS:
        config.pop(key, None)
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
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def file_hash(file: Path) -> str:
    """16 hexadecimal digits of a file, sampled as `model_revision` does it."""
    digest = hashlib.sha256(f"{file.stat().st_size}".encode())
    for block in _sampled_blocks(file):
        digest.update(block)
    return digest.hexdigest()[:16]


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer files byte for byte, so that their hashes agree."""
    for name in (*_TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        ModelError: it is missing or is no JSON object.
    """
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


def _safetensors_header(file: Path) -> tuple[dict[str, Any], int]:
    """Read the header (8 bytes of length, then JSON) and check that the data it names is there.

    Returns:
        The header, and where the data begins.
    """
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
    return header, 8 + length


def _sampled_blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    count = min(_MAX_SAMPLES, -(-size // _SAMPLE_BYTES))
    with file.open("rb") as stream:
        for i in range(count):
            # Whole blocks where the file fits, else spread over it; the header is in the first.
            stream.seek(max(i * _SAMPLE_BYTES, i * size // count))
            yield stream.read(_SAMPLE_BYTES)

"""Model folders made of other files: GGUF, other types of weights, what is quantised.

What was written is loaded again, and its logits are held against those of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from treecast.errors import ModelError
from treecast.model_folder import appearing_whole, check_model_dir, copy_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CONTEXT = 8192
MOST_ERROR = 1e-5
"""Of the written folder's logits, relative: they are computed from the same numbers."""

_NUM_CHECKED = 16

ProgressFn = Callable[[str], None]
WeightType = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        rounding_error: of the logits, for the type of the weights: norm of the difference by the
            norm of the source's, in float32.
        written_error: the same between the rounded source and what was read back.
    """

    folder: Path
    num_parameters: int
    rounding_error: float
    written_error: float


def convert(source: Path, out: Path, dtype: WeightType, report: ProgressFn) -> Converted:
    """Write a model folder of safetensors that is served as it is. Blocks.

    Needs room in memory for the model in float32 and once more in `dtype`. The folder appears whole
    or not at all.

    Args:
        source: a GGUF file, or a folder of any type that transformers unpacks on this machine.
        out: must not exist.

    Raises:
        ModelError: the source cannot be read or unpacked, `out` exists, or what was written gives
            other logits.
    """
    if out.exists():
        raise ModelError(f"{out} exists; a conversion writes a new folder")
    report(f"reading {source.name}")
    model = _read(source)
    text = _some_text(model.config)
    expected = _logits(model, text)
    report(f"rounding to {dtype}")
    _round(model, dtype)
    compared, num_parameters = _logits(model, text), model.num_parameters()
    rounded = _fresh(model, dtype)
    del model
    with appearing_whole(out) as partial:
        report(f"writing {dtype} safetensors")
        rounded.save_pretrained(partial)
        _write_tokenizer(source, partial, rounded.config)
        del rounded
        report("comparing")
        check_model_dir(partial)
        written = _relative(_logits(_load(partial, {}), text), compared)
        if not written <= MOST_ERROR:
            raise ModelError(
                f"{source} came out wrong: logits of what was written are off by {written:.1e}; "
                f"the limit is {MOST_ERROR:.0e}"
            )
    return Converted(out, num_parameters, _relative(compared, expected), written)


def _read(source: Path) -> Any:
    """The source in float32.

    Raises:
        ModelError: it cannot be read, or stays packed.
    """
    if source.is_file():
        model = _load(source.parent, _gguf_options(source))
    else:
        check_model_dir(source)
        model = _load(source, _unpacking(source))
    packed = [name for name, one in model.named_parameters() if not one.is_floating_point()]
    if packed:
        raise ModelError(f"{source} stays packed: {packed[0]} and {len(packed) - 1} more")
    return model.float()


def _load(folder: Path, options: Mapping[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    except Exception as error:  # a file that is cut, a kind that needs another library or a device
        what = folder / str(options.get("gguf_file", ""))
        raise ModelError(f"{what} cannot be read here: {error}") from error


def _gguf_options(file: Path) -> dict[str, Any]:
    import transformers

    # Releases that can compute on packed blocks have to be told to unpack them.
    gguf_config = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    return {"gguf_file": file.name, **unpacked}


def _unpacking(folder: Path) -> dict[str, Any]:
    """What transformers is told of a folder that is quantised; nothing of others.

    Raises:
        ModelError: it does not unpack that kind.
    """
    from transformers import AutoConfig
    from transformers.quantizers import AutoQuantizationConfig

    packed = getattr(AutoConfig.from_pretrained(folder), "quantization_config", None)
    if packed is None:
        return {}
    given = packed if isinstance(packed, dict) else packed.to_dict()
    try:
        config: Any = AutoQuantizationConfig.from_dict(given)
    except (ValueError, ImportError) as error:
        raise ModelError(f"{folder} is quantised in a way that is not known: {error}") from error
    if not hasattr(config, "dequantize"):
        raise ModelError(
            f"{folder} is quantised by {given.get('quant_method')}, which transformers does not "
            "unpack; take the model's own weights, or a GGUF file"
        )
    config.dequantize = True
    return {"quantization_config": config}


def _round(model: Any, dtype: WeightType) -> None:
    """Round the weights alone, which stay in float32, as do tables that are computed."""
    import torch

    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, dtype)).float()


def _fresh(source: Any, dtype: WeightType) -> Any:
    """A model of the same weights, rounded; one that was unpacked refuses to be saved itself."""
    import torch

    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        settings.pop(key, None)
    model: Any = type(source)(type(source.config)(**settings)).to(getattr(torch, dtype))
    model.load_state_dict(source.state_dict())
    return model.eval()


def _write_tokenizer(source: Path, out: Path, config: Any) -> None:
    """The source's own files where it has them, so that their hashes agree."""
    from transformers import AutoTokenizer

    if (source / "tokenizer.json").is_file():
        copy_tokenizer(source, out)
        return
    where = {"gguf_file": source.name} if source.is_file() else {}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source.parent if source.is_file() else source, **where
        )
    except (OSError, ValueError) as error:
        if source.is_file():
            raise ModelError(f"{source} has no tokenizer that can be read: {error}") from error
        return  # a folder may come without one
    context = getattr(config.get_text_config(), "max_position_embeddings", DEFAULT_CONTEXT)
    tokenizer.model_max_length = min(DEFAULT_CONTEXT, context)
    tokenizer.save_pretrained(out)


def _some_text(config: Any) -> Tensor:
    import torch

    vocab_size = config.get_text_config().vocab_size
    text: Tensor = (1000 + 37 * torch.arange(_NUM_CHECKED)) % vocab_size
    return text


def _logits(model: Any, text: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        logits: Tensor = model(text[None]).logits[0]
    return logits


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())

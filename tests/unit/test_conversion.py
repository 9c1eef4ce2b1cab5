"""Model folders made of GGUF files, other types and quantised ones: compared, whole, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from treecast import conversion
from treecast.checkpoints import ensure_converted
from treecast.conversion import MOST_ERROR, convert
from treecast.engine.hf import HFEngine
from treecast.errors import ModelError
from treecast.model_folder import model_revision

from .tiny_target import tiny_target

STEPS: list[str] = []


def silent(step: str) -> None:
    STEPS.append(step)


@pytest.fixture
def bfloat16(tmp_path: Path) -> Path:
    """A folder of bfloat16 weights with a generation config and no tokenizer."""
    tiny_target().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        values: torch.Tensor = model(torch.arange(3, 20)[None]).logits[0]
    return values


def test_wider_weights_give_the_same_logits(bfloat16: Path, tmp_path: Path) -> None:
    STEPS.clear()
    done = convert(bfloat16, tmp_path / "out", "float32", silent)
    assert torch.equal(logits(tmp_path / "out"), logits(bfloat16))
    assert (done.rounding_error, done.written_error) == (0.0, 0.0)
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype.is_signed
    assert STEPS == [
        "reading source", "rounding to float32", "writing float32 safetensors", "comparing"
    ]  # fmt: skip
    HFEngine.load(tmp_path / "out", pool_tokens=64, threads=1)


def test_narrower_weights_tell_what_rounding_costs(bfloat16: Path, tmp_path: Path) -> None:
    convert(bfloat16, tmp_path / "wide", "float32", silent)
    weights = load_file(tmp_path / "wide" / "model.safetensors")
    save_file(
        {name: one + 1e-3 * torch.randn_like(one) for name, one in weights.items()},
        tmp_path / "wide" / "model.safetensors",
        {"format": "pt"},
    )
    done = convert(tmp_path / "wide", tmp_path / "narrow", "bfloat16", silent)
    assert 1e-4 < done.rounding_error < 0.1
    assert done.written_error <= MOST_ERROR


def test_nothing_is_left_when_what_was_written_is_wrong(
    bfloat16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = conversion._load

    def load_wrong(folder: Path, options: Any) -> Any:
        model = load(folder, options)
        if folder != bfloat16:
            model.model.norm.weight.data[0] += 0.5
        return model

    monkeypatch.setattr(conversion, "_load", load_wrong)
    with pytest.raises(ModelError, match=r"came out wrong: logits of what was written are off by"):
        convert(bfloat16, tmp_path / "out", "bfloat16", silent)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_an_old_folder_is_left_alone(bfloat16: Path, tmp_path: Path) -> None:
    before = model_revision(bfloat16)
    with pytest.raises(ModelError, match=r"source exists; a conversion writes a new folder$"):
        convert(bfloat16, bfloat16, "float32", silent)
    assert model_revision(bfloat16) == before


def test_cut_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ModelError, match=r"cut.gguf cannot be read here"):
        ensure_converted(tmp_path / "cut.gguf", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def pack_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Quantise a folder's projections to float8 with a scale per block of 16 x 16.

    Returns:
        Those weights as they are when unpacked by hand.
    """
    weights = load_file(folder / "model.safetensors")
    packed, unpacked = {}, {}
    for name, weight in weights.items():
        if "_proj" not in name:
            packed[name] = weight
            continue
        blocks = weight.float().unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
        scale = blocks.abs().amax((1, 3)) / 448
        wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
        packed[name] = (weight.float() / wide).to(torch.float8_e4m3fn)
        unpacked[name] = (packed[name].float() * wide).bfloat16()
        packed[f"{name}_scale_inv"] = scale
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return unpacked


def test_quantised_folder_is_unpacked_where_transformers_can(
    bfloat16: Path, tmp_path: Path
) -> None:
    unpacked = pack_fp8(bfloat16)
    with pytest.raises(ModelError, match=r"quantised by fp8; `treecast models convert` makes"):
        HFEngine.load(bfloat16, pool_tokens=64, threads=1)
    convert(bfloat16, tmp_path / "out", "bfloat16", silent)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(unpacked) == 7 * 4
    assert all(torch.equal(written[name], weight) for name, weight in unpacked.items())
    HFEngine.load(tmp_path / "out", pool_tokens=64, threads=1)


def test_quantised_folder_that_is_not_unpacked_is_refused_by_name(bfloat16: Path) -> None:
    config = json.loads((bfloat16 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (bfloat16 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised by gptq, which transformers does not unpa"):
        convert(bfloat16, bfloat16.parent / "out", "bfloat16", silent)

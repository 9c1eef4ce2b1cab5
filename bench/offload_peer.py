"""transformers over accelerate's disk offload, in a process of its own: JSON lines in and out.

Run by `treecast.bench.offload`. Embedding, head and norms and as many layers as the device's share
holds stay in memory, the rest is on disk; as with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import AutoConfig, AutoModelForCausalLM, __version__

from treecast.bench.offload_memory import MemoryWatch
from treecast.settings import GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device-memory", type=float, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cold", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    with MemoryWatch().watching() as watch, tempfile.TemporaryDirectory() as scratch:
        dtype = getattr(torch, flags.dtype)
        model, on_disk = load(flags.model, dtype, flags.device_memory * GIB, scratch)
        if flags.cold:
            files = [*flags.model.glob("*.safetensors"), *Path(scratch).rglob("*")]
            model.register_forward_pre_hook(lambda *_: _drop_pages(files))
        versions = {"transformers": __version__, "accelerate": accelerate.__version__}
        _say({"layers_on_disk": on_disk, **versions})
        for line in sys.stdin:
            question = json.loads(line)
            _say(watch.peaks if "memory" in question else answer(model, question))


def load(folder: Path, dtype: torch.dtype, share: float, scratch: str) -> tuple[Any, int]:
    """The model with the layers that do not fit on disk, and how many those are."""
    config = AutoConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    with accelerate.init_empty_weights():
        empty: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    layer = sum(weight.nbytes for weight in empty.model.layers[0].parameters())
    around = sum(weight.nbytes for weight in empty.parameters()) - layers * layer
    resident = min(layers, max(0, int((share - around) // layer)))
    places = {f"model.layers.{i}": "cpu" if i < resident else "disk" for i in range(layers)}
    around_places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={**around_places, "lm_head": "cpu", **places},
        offload_folder=scratch,
    )
    return model.eval(), layers - resident


def answer(model: Any, question: dict[str, Any]) -> dict[str, object]:
    """Generate greedily."""
    prompt = torch.tensor([question["prompt_ids"]])
    begun = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=question["max_tokens"],
        do_sample=False,
    )
    seconds = time.perf_counter() - begun
    return {"token_ids": output[0, prompt.shape[1] :].tolist(), "seconds": seconds}


def _drop_pages(files: list[Path]) -> None:
    """Have the kernel forget what it has of files: the next pass reads the disk."""
    for path in files:
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

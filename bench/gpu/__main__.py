"""Everything to know of a GPU, by one command; see `docs/performance.md`, *On a GPU*.

    python -m treecast.bench.gpu --model FOLDER [--draft FOLDER] [--out FOLDER]

Correctness first: run `make gpu`, which does that and then this. Without --model only the kernels
are measured. With --draft the whole mesh is measured too, beside transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

_PROMPTS = 4


def main() -> None:
    """Measure, print the tables, save them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder, as treecast.bench.inflate writes one")
    parser.add_argument("--draft", type=Path, help="folder of a draft for the mesh")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench/results")))
    flags = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"no CUDA device: torch is {torch.__version__}; nothing was measured")
    flags.out.mkdir(parents=True, exist_ok=True)
    saved = _Saved(flags.out / "gpu.json")
    ceilings = _attention(saved)
    if flags.model is not None:
        _model(flags.model, flags.max_tokens, ceilings, saved)
        if flags.draft is not None:
            _mesh(flags.model, flags.draft, flags.max_tokens, flags.out)
    print(f"saved to {saved.path}")


class _Saved:
    """Figures on disk after every part, so that a cut run keeps what it has."""

    def __init__(self, path: Path) -> None:
        import torch
        import transformers
        import triton

        self.path = path
        self._content: dict[str, Any] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        }

    def add(self, name: str, figures: Any) -> None:
        self._content[name] = figures
        self.path.write_text(json.dumps(self._content, indent=1) + "\n")


def _attention(saved: _Saved) -> Any:
    from .attention import figures
    from .ceilings import measure_ceilings

    ceilings = measure_ceilings()
    saved.add("ceilings", asdict(ceilings))
    print(
        f"{ceilings.device}: copies {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        f"products {ceilings.operations_per_s / 1e12:.0f} TFLOP/s (bfloat16)\n"
    )
    print("tree attention of one layer, 8 KV heads of 128, bfloat16; microseconds")
    print("context group nodes    floor  bound           fast  share   exact    sdpa    flex")
    rows = []
    for one in figures(ceilings):
        rows.append(asdict(one))
        times = " ".join(
            f"{'-':>7}" if s is None else f"{1e6 * s:7.1f}"
            for s in (one.exact_s, one.sdpa_s, one.flex_s)
        )
        print(
            f"{one.context:7} {one.group:5} {one.nodes:5} {1e6 * one.floor_s:8.1f}  "
            f"{one.bound:10} {1e6 * one.fast_s:9.1f} {one.bandwidth_share:6.0%} {times}",
            flush=True,
        )
        for note in one.notes:
            print(f"    {note}")
        saved.add("attention", rows)
    return ceilings


def _model(folder: Path, max_tokens: int, ceilings: Any, saved: _Saved) -> None:
    import torch

    from treecast.engine.exactness import differing_rows

    from .steps import decoding_figures, load, step_figure, weight_bytes

    num_bytes = weight_bytes(folder)
    print(f"\nsteps of {folder.name}, {num_bytes / 1e9:.2f} GB of weights; milliseconds")
    print("numerics context    floor  one row  64 rows  ratio")
    rows = []
    for numerics in ("exact", "fast"):
        engine = load(folder, numerics, "cuda")
        if numerics == "exact":
            differing = differing_rows(engine)
            saved.add("exact_differing_rows", differing)
            print(f"exact: {differing} rows whose bits depend on the pass")
        for context in (200, 2000):
            if context + 128 > engine.info.context_tokens:
                continue
            one = step_figure(engine, numerics, context, num_bytes, ceilings)
            rows.append(asdict(one))
            print(
                f"{numerics:8} {context:7} {1e3 * one.floor_s:8.2f} {1e3 * one.one_row_s:8.2f} "
                f"{1e3 * one.tree_s:8.2f} {one.tree_s / one.one_row_s:6.2f}",
                flush=True,
            )
        saved.add("steps", rows)
        if numerics == "fast":
            found = decoding_figures(
                engine, folder, _prompts(folder), max_tokens, num_bytes, ceilings
            )
            saved.add("decoding", [asdict(one) for one in found])
            print("\ngreedy, one stream: tokens/s, of the memory floor, tokens per step")
            for figure in found:
                share = figure.tokens_per_s / figure.floor_tokens_per_s
                print(
                    f"{figure.contender:14} {figure.tokens_per_s:8.1f} {share:6.0%} "
                    f"{figure.tokens_per_step:6.2f}"
                )
        del engine
        torch.cuda.empty_cache()


def _prompts(folder: Path) -> list[Sequence[int]]:
    """Real prompts where the folder has a tokenizer, else numbers that repeat."""
    if not (folder / "tokenizer.json").is_file():
        return [
            [(step * 31 + turn) % 997 + 3 for step in range(64)] * 2 for turn in range(_PROMPTS)
        ]
    from transformers import AutoTokenizer

    from treecast.bench.prompts import DEFAULT_PROMPTS, encode_chat, read_prompts

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return [
        encode_chat(tokenizer, prompt.text) for prompt in read_prompts(DEFAULT_PROMPTS, _PROMPTS)
    ]


def _mesh(model: Path, draft: Path, max_tokens: int, out: Path) -> None:
    """The comparison that `treecast bench` makes, over the device."""
    print("\nthe whole mesh, beside transformers:", flush=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "treecast.cli", "bench", "--device", "cuda"),
            *("--numerics", "fast", "--model", str(model), "--draft", str(draft)),
            *("--max-tokens", str(max_tokens), "--rounds", "2", "--out", str(out / "mesh.json")),
        ],
        check=True,
    )


if __name__ == "__main__":
    main()

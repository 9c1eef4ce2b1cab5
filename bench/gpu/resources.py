"""What the compiler makes of every kernel for a Hopper GPU; no GPU is needed.

    python -m treecast.bench.gpu.resources

Prints registers and spilled bytes of a thread, shared memory of a program, and the matrix
instructions used: `wgmma` is Hopper's own, `mma` the older one, as fixed tiles of 16 rows need.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from treecast.kernels.tables import ITEM_COLUMNS, ROW_COLUMNS
from treecast.kernels.triton_exact import CHUNK_PAGES, EXACT_LANES, EXACT_STAGES, EXACT_WARPS
from treecast.kernels.triton_fast import block_dim, stages_for, warps_for
from treecast.prefix import PAGE_TOKENS

HOPPER = 90

_POINTERS = {
    "table": "*i32",
    **dict.fromkeys(("partial", "logsums", "chunk_sums", "chunk_peaks", "chunk_totals"), "*fp32"),
    **dict.fromkeys(
        ("query", "key", "value", "key_pool", "value_pool", "out", "x", "y", "weight", "bias"),
        "*bf16",
    ),
    **dict.fromkeys(("scaling", "softcap", "eps"), "fp32"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with its compile-time arguments."""

    name: str
    kernel: Any  # Triton's functions have no types
    fixed: Mapping[str, int | bool]
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Resources:
    """What one variant needs; `shared` in bytes of a program, the others of a thread."""

    registers: int
    spilled_bytes: int
    shared: int
    matrix_instructions: str


def variants() -> Iterator[Variant]:
    """Every kernel, in the configurations that it is launched in."""
    from treecast.kernels.jit import blocks, exact, rows, tree

    for dim in (64, 80, 96, 128, 256):
        block = block_dim(dim)
        dims = {"KEY_DIM": dim, "VALUE_DIM": dim, "BLOCK_KEY": block, "BLOCK_VALUE": block}
        heads = dims | {"GROUP": 4, "PAGE": PAGE_TOKENS, "ROW_COLUMNS": ROW_COLUMNS}
        plain = {"CAPPED": False, "WINDOWED": False}
        for lanes in (16, 64, 128):
            fixed = heads | plain | {"BLOCK_ROWS": lanes, "ITEM_COLUMNS": ITEM_COLUMNS}
            name = f"tree attention, {dim}, {lanes} lanes"
            yield Variant(name, tree.attend_items, fixed, warps_for(lanes), stages_for(block))
        fixed = heads | plain | {"BLOCK_ROWS": EXACT_LANES}
        chunks = fixed | {"ITEM_COLUMNS": ITEM_COLUMNS}
        yield Variant(f"exact chunks, {dim}", exact.fold_chunks, chunks, EXACT_WARPS, EXACT_STAGES)
        ends = fixed | {"CHUNK_PAGES": CHUNK_PAGES}
        yield Variant(f"exact ends, {dim}", exact.finish_rows, ends, EXACT_WARPS, EXACT_STAGES)
    bent = heads | {"CAPPED": True, "WINDOWED": True}
    fixed = bent | {"BLOCK_ROWS": 64, "ITEM_COLUMNS": ITEM_COLUMNS}
    yield Variant("tree attention, capped, windowed", tree.attend_items, fixed, 8, 2)
    fixed = dims | {"ROW_COLUMNS": ROW_COLUMNS}
    yield Variant("write rows", blocks.write_rows, fixed, 1, 3)
    fixed = {"GROUP": 4, "VALUE_DIM": 128, "BLOCK_ROWS": 64, "BLOCK_VALUE": 128}
    merge = fixed | {"BLOCK_ITEMS": 16, "ROW_COLUMNS": ROW_COLUMNS}
    yield Variant("merge", tree.merge_items, merge, 4, 3)
    for block_out in (32, 64):
        tiles = {"BLOCK_ROWS": 64, "BLOCK_IN": 64, "BLOCK_OUT": block_out}
        fixed = tiles | {"IN": 4096, "OUT": 14336, "BIASED": False}
        yield Variant(f"fixed linear, {block_out} wide", rows.fixed_linear, fixed, 4, 4)
    yield Variant("fixed norm", rows.fixed_rms_norm, {"DIM": 4096, "BLOCK": 4096}, 8, 3)


def resources(variant: Variant) -> Resources:
    """Compile one variant for compute capability 9.0. Blocks for seconds."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    signature = {
        name: "constexpr" if name in variant.fixed else _POINTERS.get(name, "i32") for name in names
    }
    aligned = [n for n in names if signature[n].startswith("*") or "stride" in n]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in variant.fixed.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    used = [name for name in ("wgmma", "mma.sync") if f"{name}." in ptx]
    return Resources(
        registers=int(found["REG"]),
        spilled_bytes=int(found["STACK"]) + int(found["LOCAL"]),
        shared=int(compiled.metadata.shared),
        matrix_instructions=", ".join(used) or "none",
    )


def main() -> None:
    """Print the table."""
    print(f"{'kernel':36} {'registers':>9} {'spilled':>8} {'shared':>8}  matrix instructions")
    for variant in variants():
        found = resources(variant)
        print(
            f"{variant.name:36} {found.registers:9} {found.spilled_bytes:8} {found.shared:8}  "
            f"{found.matrix_instructions}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""The GPU bench's parts that need no GPU: its inputs, its checks and its counting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from treecast.bench.gpu.attention import Case, Inputs
from treecast.bench.gpu.ceilings import Ceilings
from treecast.bench.gpu.steps import decoding_figures, step_figure, weight_bytes
from treecast.engine.hf import HFEngine
from treecast.kernels.triton_fast import TritonFastAttention

CEILINGS = Ceilings("none", 1e9, 1e12)


def test_the_bench_finds_fast_attention_right_and_a_wrong_one_wrong(device: torch.device) -> None:
    inputs = Inputs(Case(nodes=3, context=66, group=2), 0, device)
    kernel = TritonFastAttention.over([inputs.layout], device)
    assert inputs.error(kernel) < 1e-2
    inputs.keys[:, :, 5] += 1
    assert inputs.error(kernel) > 1e-2


def test_floors_are_bytes_and_operations_of_the_definition() -> None:
    case = Case(nodes=64, context=16384, group=4)
    assert case.kv_bytes == 2 * 2 * 8 * 128 * 16448
    assert case.operations == 2 * 2 * 32 * 64 * 128 * 16448


@pytest.mark.slow
def test_steps_and_answers_are_counted(tmp_path: Path) -> None:
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, vocab_size=96, eos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = HFEngine.load(tmp_path, dtype="bfloat16", numerics="fast", pool_tokens=2048)
    num_bytes = weight_bytes(tmp_path)
    assert num_bytes > 4 * 2 * 32 * 96
    step = step_figure(engine, "fast", 200, num_bytes, CEILINGS)
    assert step.floor_s == num_bytes / 1e9
    assert min(step.one_row_s, step.tree_s) > 0
    prompts = [[5, 6, 7, 8] * 6]
    found = decoding_figures(engine, tmp_path, prompts, 12, num_bytes, CEILINGS, "cpu")
    assert [one.contender for one in found] == ["plain", "lookup trees", "transformers"]
    assert found[0].tokens_per_step == 1
    assert found[1].tokens_per_step >= 1

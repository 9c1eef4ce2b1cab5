"""The fused decoder stack: the logits of the modules it replaces, and only where it fits."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from treecast.engine import bridge
from treecast.engine.cut_head import cut_head
from treecast.engine.linears import packed_layers, plain_layers
from treecast.engine.llama import LlamaRunner, is_llama_like
from treecast.engine.runner import ModuleRunner, choose_runner, relative_error

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LATE_SCALING = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "llama_4_scaling_beta": 0.9,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""Queries grow with the position, from the 64th on."""
TEXT = torch.arange(24) * 5 % 128
PLACES = torch.arange(24)
PACKED = packed_layers(2)


def tiny(family: str, **options: Any) -> Any:
    """A random model of a family, with norms and biases that are not all ones and zeros."""
    bridge.register()
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SHAPE, **options)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=bridge.IMPLEMENTATION
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"head_dim": 32, "tie_word_embeddings": True}),
        ("Llama", {"rope_theta": 500.0, "rms_norm_eps": 1e-2}),
        ("Mistral", {}),
        ("Qwen2", {}),
    ],
)
def test_logits_are_those_of_the_modules(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, **options)
    assert is_llama_like(model, PACKED)
    assert relative_error(LlamaRunner(model, PACKED), ModuleRunner(model), TEXT, PLACES) < 1e-5


def test_the_comparison_sees_one_wrong_norm() -> None:
    model, other = tiny("Llama"), tiny("Llama")
    other.model.layers[1].input_layernorm.variance_epsilon = 0.1
    assert relative_error(LlamaRunner(model, PACKED), ModuleRunner(other), TEXT, PLACES) > 1e-3


def test_another_activation_is_left_to_its_modules() -> None:
    assert not is_llama_like(tiny("Llama", hidden_act="gelu"), PACKED)


@pytest.mark.parametrize("family", ["Qwen3", "Phi3", "Gemma", "Olmo2"])
def test_other_blocks_are_left_to_their_modules(family: str) -> None:
    options = {"pad_token_id": 0} if family == "Phi3" else {}
    assert isinstance(choose_runner(tiny(family, **options), PACKED), ModuleRunner)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Granite", {"residual_multiplier": 0.3, "embedding_multiplier": 4.0}),
        ("Ministral3", {"head_dim": 16, "rope_parameters": LATE_SCALING}),
    ],
)
def test_a_model_that_only_looks_like_llama_keeps_its_modules(
    family: str, options: dict[str, Any]
) -> None:
    model = tiny(family, **options)
    assert is_llama_like(model, PACKED)
    assert isinstance(choose_runner(model, PACKED), ModuleRunner)


def test_a_model_without_weights_in_its_norms_keeps_its_modules() -> None:
    assert isinstance(choose_runner(tiny("Olmo"), PACKED), ModuleRunner)


def test_a_llama_is_run_fused() -> None:
    assert isinstance(choose_runner(tiny("Llama"), PACKED), LlamaRunner)


def test_a_llama_is_run_fused_when_its_head_is_cut() -> None:
    model = tiny("Llama")
    model.config.head_token_ids = list(range(0, 128, 3))
    cut_head(model)
    assert isinstance(choose_runner(model, PACKED), LlamaRunner)


def test_layers_that_stand_in_for_themselves_keep_their_weights() -> None:
    runner = choose_runner(tiny("Llama"), plain_layers())
    assert isinstance(runner, LlamaRunner)
    assert relative_error(runner, ModuleRunner(tiny("Llama")), TEXT, PLACES) < 1e-5


def test_only_one_layers_weights_are_there_twice_when_a_stack_is_taken_over() -> None:
    model = tiny("Llama")
    sources = [weakref.ref(layer.mlp.down_proj.weight) for layer in model.model.layers]
    alive: list[int] = []

    def packed(linear: torch.nn.Linear) -> torch.nn.Module:
        alive.append(sum(source() is not None for source in sources))
        return PACKED.linear(linear)

    runner = choose_runner(model, replace(PACKED, linear=packed))
    assert isinstance(runner, LlamaRunner)
    assert alive == [*[3] * 4, *[2] * 4, *[1] * 4, 0]  # four products a layer, then the head
    assert not any(source() is not None for source in sources)


def test_a_head_cut_elsewhere_is_seen() -> None:
    model, other = tiny("Llama"), tiny("Llama")
    model.config.head_token_ids, other.config.head_token_ids = [1, 2, 3], [1, 2, 4]
    cut_head(model)
    cut_head(other)
    error = relative_error(LlamaRunner(model, PACKED), ModuleRunner(other), TEXT, PLACES)
    assert not error < 1e-3

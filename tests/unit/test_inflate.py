"""A large target that speaks as a small one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from treecast.bench.inflate import Inflation, inflate, inflation_to, logit_error


def tiny(**options: Any) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        **options,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model


@pytest.mark.parametrize(
    "options", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
@pytest.mark.parametrize("to", [Inflation(4, 3, 100), Inflation(1, 2, 40), Inflation(16, 4, 64)])
def test_logits_are_those_of_the_small_model(options: dict[str, Any], to: Inflation) -> None:
    model = tiny(**options)
    grown = inflate(model, to)
    assert grown.config.hidden_size == 24 * to.width
    assert len(grown.model.layers) == to.layers
    assert logit_error(grown, model, 20) < 1e-5


def test_the_check_sees_a_neuron_that_writes() -> None:
    """The negative control."""
    model = tiny(tie_word_embeddings=True)
    grown = inflate(model, Inflation(4, 3, 100))
    with torch.no_grad():
        grown.model.layers[2].mlp.down_proj.weight[0, 0] = 1
    assert logit_error(grown, model, 20) > 1e-4


def test_added_weights_are_random_where_they_may_be() -> None:
    grown = inflate(tiny(), Inflation(4, 3, 100))
    for layer in grown.model.layers:
        assert layer.mlp.gate_proj.weight[60:].abs().min() > 0
        assert layer.self_attn.q_proj.weight[30:].abs().min() > 0


def test_a_model_is_brought_to_a_number_of_parameters() -> None:
    config = tiny(tie_word_embeddings=True).config
    grown = inflate(tiny(tie_word_embeddings=True), inflation_to(config, 2e6, layers=3))
    count = sum(parameter.numel() for parameter in grown.parameters())
    assert 1.8e6 < count < 2.2e6
    with pytest.raises(ValueError, match="gated neurons"):
        inflation_to(config, 1e3)


def test_widths_that_would_round_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="width is 8"):
        Inflation(8, 2, 40)

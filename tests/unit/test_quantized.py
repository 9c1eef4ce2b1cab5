"""Linear layers of fewer bits: each against its definition in float64, each row's bits its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from treecast.engine import linears
from treecast.engine.linears import PackedLinear, cpu_layers, packed_layers, replace_linears
from treecast.engine.loading import LoadOptions, fingerprint
from treecast.engine.quantized import (
    STABLE_ROWS,
    HalfLinear,
    Int4Linear,
    Int4Weights,
    Int8Linear,
    is_bfloat16,
    quantized_embedding,
)
from treecast.errors import ModelError
from treecast.settings import Weights

Make = Callable[[nn.Linear], nn.Module]
EXACT: dict[str, Make] = {
    "bfloat16": lambda linear: HalfLinear(linear, STABLE_ROWS),
    "int8": Int8Linear,
    "int4": Int4Linear,
}
COUNTS = [*range(1, 41), 64, 127, 128, 134, 151, 200]


def layer(inputs: int = 576, outputs: int = 192, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    made.weight.copy_(made.weight.bfloat16())
    return made


def int8_floats(weight: Tensor) -> Tensor:
    """The weights that 8 bits stand for, by the definition."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round() * scales


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(576, 192), (40, 24)])
@pytest.mark.parametrize(
    ("kind", "weights", "tolerance"),
    [
        ("bfloat16", lambda weight: weight, 1e-6),
        ("int8", int8_floats, 2e-4),
        ("int4", None, 5e-3),
    ],
)
def test_products_are_those_of_the_rounded_weights(
    kind: str,
    weights: Callable[[Tensor], Tensor] | None,
    tolerance: float,
    size: tuple[int, int],
    bias: bool,
) -> None:
    linear = layer(*size, bias)
    x = torch.randn(2, 5, size[0])
    if weights is None:
        filled = nn.functional.pad(linear.weight, (0, -size[0] % 32))
        rounded = Int4Weights.of(filled).floats()[:, : size[0]]
    else:
        rounded = weights(linear.weight)
    found = EXACT[kind](linear)(x)
    assert found.shape == (2, 5, size[1])
    assert found.dtype == torch.float32
    assert relative_error(found, product(x, rounded, linear.bias)) < tolerance


@pytest.mark.parametrize("kind", EXACT)
def test_rows_of_bfloat16_give_bfloat16(kind: str) -> None:
    x = torch.randn(3, 576).bfloat16()
    assert EXACT[kind](layer())(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", EXACT)
def test_no_rows_give_no_rows(kind: str) -> None:
    assert EXACT[kind](layer())(torch.empty(0, 576)).shape == (0, 192)


@pytest.mark.parametrize("inputs", [64, 576, 1536])
@pytest.mark.parametrize("kind", EXACT)
def test_a_rows_bits_are_its_own_when_others_are_beside_it(kind: str, inputs: int) -> None:
    made = EXACT[kind](layer(inputs))
    x = torch.randn(200, inputs)
    together = made(x)
    for count in COUNTS:
        assert torch.equal(made(x[:count]), together[:count]), count
        assert torch.equal(made(x[-count:]), together[-count:]), count


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX2", reason="kernels of AVX2")
def test_the_comparison_of_bits_sees_kernels_that_depend_on_the_number_of_rows() -> None:
    made = HalfLinear(layer(), 1)
    x = torch.randn(9, 576)
    assert not torch.equal(made(x[:1]), made(x)[:1])


def test_sixteen_bits_hold_what_bfloat16_holds_when_it_is_large_or_small() -> None:
    linear = layer(64, 16, bias=False)
    for size in (2.0**-40, 1.0, 2.0**60):
        linear.weight.copy_((torch.randn(16, 64) * torch.logspace(-6, 0, 64)).bfloat16() * size)
        found = HalfLinear(linear)(torch.eye(64))
        assert torch.equal(found.T, linear.weight)


def test_an_activation_far_above_the_others_does_not_drown_them_when_weights_are_int8() -> None:
    linear = layer(bias=False)
    x = torch.randn(4, 576)
    x[:, 7] = 50.0
    expected = product(x, int8_floats(linear.weight), None)
    without = product(x[:, :7], int8_floats(linear.weight)[:, :7], None)
    assert float((Int8Linear(linear)(x) - expected).norm() / without.norm()) < 0.02


def test_rows_of_zeros_give_the_bias() -> None:
    linear = layer()
    for make in EXACT.values():
        found = make(linear)(torch.zeros(2, 576))
        torch.testing.assert_close(found, linear.bias.expand(2, -1), atol=1e-6, rtol=1e-2)


# --- groups of four bits ------------------------------------------------------------------------


def blocks(signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and offsets as GGUF's Q4_0 (signed) or Q4_1 have them, in bfloat16."""
    torch.manual_seed(1)
    values = torch.randint(-8, 8, (48, 3, 32), dtype=torch.int32)
    values[..., 3] = -8  # both formats put a block's extreme on the grid's end
    scales = (torch.rand(48, 3) + 0.1).bfloat16()
    if signed:
        values[..., 5:] = values[..., 5:].clamp(-7, 6)
        return values, scales * torch.tensor([1, -1, 1]).bfloat16(), torch.zeros_like(scales)
    values[..., 4] = 7
    return values, scales, (torch.randint(-8, 8, (48, 3)) * scales.float()).bfloat16()


@pytest.mark.parametrize("signed", [True, False])
def test_four_bit_blocks_come_back_as_they_were(signed: bool) -> None:
    values, scales, offsets = blocks(signed)
    floats = Int4Weights(values.flatten(1), scales, offsets).floats()
    torch.testing.assert_close(Int4Weights.of(floats).floats(), floats, rtol=0, atol=1e-6)


def test_blocks_of_another_kind_do_not_come_back_as_they_were() -> None:
    floats = layer().weight
    assert float((Int4Weights.of(floats).floats() - floats).abs().max()) > 1e-3


def test_no_weight_is_rounded_by_more_than_a_step_and_most_by_less_than_half() -> None:
    weight = layer().weight
    made = Int4Weights.of(weight)
    steps = made.scales.float().abs().repeat_interleave(32, 1)
    errors = (made.floats() - weight).abs() / steps
    assert float(errors.max()) < 1.04  # a symmetric grid lacks its highest end
    assert float((errors < 0.52).float().mean()) > 0.99


# --- which kind -----------------------------------------------------------------------------------


def test_auto_keeps_sixteen_bits_where_they_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "multiplies_bfloat16", lambda: False)
    layers = cpu_layers("auto", torch.float32, exact=True)
    linear = layer()
    assert is_bfloat16(linear.weight)
    assert isinstance(layers.linear(linear), HalfLinear)
    linear.weight[0, 0] = 0.1
    assert not is_bfloat16(linear.weight)
    assert isinstance(layers.linear(linear), PackedLinear)


def test_auto_packs_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = packed_layers(2)
    monkeypatch.setattr(linears, "packed_layers", lambda min_rows: packed)
    monkeypatch.setattr(linears, "multiplies_bfloat16", lambda: True)
    assert cpu_layers("auto", torch.bfloat16, exact=True) is packed
    assert cpu_layers("bfloat16", torch.bfloat16, exact=True) is packed
    assert cpu_layers("bfloat16", torch.float32, exact=True) is not packed


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_head_keeps_sixteen_bits_when_the_layers_have_four(family: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    made = cpu_layers("int4", torch.float32, exact=True)
    assert replace_linears(model, made) == 8
    kinds = [type(module) for module in model.modules() if hasattr(module, "out_features")]
    assert kinds == [*[Int4Linear] * 7, HalfLinear]


def test_kernels_that_torch_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "has_fbgemm", lambda: False)
    with pytest.raises(ModelError, match="weights int8 need FBGEMM's kernels"):
        cpu_layers("int8", torch.float32, exact=False)


def test_an_embedding_is_halved_only_where_that_loses_nothing() -> None:
    table = nn.Embedding(32, 8).requires_grad_(False)
    assert quantized_embedding(table) is table
    table.weight.copy_(table.weight.bfloat16())
    tokens = torch.arange(32)
    narrow = quantized_embedding(table)
    assert narrow is not table
    assert torch.equal(narrow(tokens), table(tokens))


def test_weights_that_are_no_kind_are_refused() -> None:
    with pytest.raises(ModelError, match="weights 'int3' are unknown; known are auto, float32"):
        LoadOptions("float32", "exact", "cpu", None, weights="int3")  # type: ignore[arg-type]


def test_weights_are_refused_where_triton_computes() -> None:
    with pytest.raises(ModelError, match="weights int8 are for CPU"):
        LoadOptions("float32", "exact", "cpu", None, kernels="triton", weights="int8")


def test_a_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    kinds: list[Weights] = ["auto", "float32", "bfloat16", "int8", "int4"]
    options = [LoadOptions("float32", "exact", "cpu", None, weights=kind) for kind in kinds]
    assert len({fingerprint("revision", each) for each in options}) == len(kinds)

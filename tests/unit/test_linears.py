"""Packed linear layers: the same products as `nn.Linear`, each row's bits its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from treecast.engine import linears
from treecast.engine.linears import PackedLinear, product_dtype
from treecast.engine.loading import LoadOptions, resolve_dtype

DTYPES = [torch.bfloat16, torch.float32]


def layer(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(576, 192, bias=bias).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_equal_float64s_when_rounded(dtype: torch.dtype, bias: bool) -> None:
    linear = layer(dtype, bias)
    x = torch.randn(5, 576).to(dtype)
    exact = nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    found = PackedLinear(linear, 1).forward(x)
    assert found.dtype == dtype
    # One rounding of the result; float32 sums besides.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_are_its_own_when_others_are_beside_it(dtype: torch.dtype) -> None:
    packed = PackedLinear(layer(dtype), 2)
    x = torch.randn(48, 576).to(dtype)
    together = packed.forward(x)
    for rows in (1, 2, 7, 16):
        assert torch.equal(packed.forward(x[:rows]), together[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_torchs_and_a_rows_bits_are_its_own(dtype: torch.dtype) -> None:
    norm = linears.packed_layers(1).rms_norm
    torch.manual_seed(0)
    x, weight = 30 * torch.randn(130, 576), torch.randn(576)
    x[7] = 0
    x, weight = x.to(dtype), weight.to(dtype)
    together = norm(x, weight, 1e-5)
    expected = nn.functional.rms_norm(x, (576,), weight, 1e-5)
    torch.testing.assert_close(together, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for begin, end in ((0, 1), (3, 8), (100, 130)):
        assert torch.equal(norm(x[begin:end], weight, 1e-5), together[begin:end])


def test_a_pass_is_filled_up_where_bits_would_depend_on_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact, fast = (LoadOptions("float32", numerics, "cpu", 1) for numerics in ("exact", "fast"))
    monkeypatch.setattr(linears, "has_fbgemm", lambda: True)
    assert [fast.filled(rows) for rows in (1, 2, 24)] == [1, 2, 24]
    monkeypatch.setattr(linears, "multiplies_bfloat16", lambda: False)
    assert [exact.filled(rows) for rows in (1, 3, 4, 24, 25)] == [3, 3, 6, 24, 27]
    monkeypatch.setattr(linears, "multiplies_bfloat16", lambda: True)
    assert [exact.filled(rows) for rows in (1, 2, 25)] == [2, 2, 25]


def test_bfloat16_is_multiplied_in_float32_when_the_processor_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linears, "multiplies_bfloat16", lambda: False)
    assert product_dtype(torch.bfloat16) == torch.float32
    linear, x = layer(torch.bfloat16), torch.randn(3, 576).to(torch.bfloat16)
    found = PackedLinear(linear, 1).forward(x)
    wide = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wide.to(torch.bfloat16), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_processor_multiplies(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(linears, "multiplies_bfloat16", lambda: native)
    assert resolve_dtype("auto") == expected
    assert resolve_dtype("auto", "cuda") == "bfloat16"
    assert resolve_dtype("bfloat16") == "bfloat16"
    kept = LoadOptions("bfloat16", "fast", "cpu", None).kv_dtype
    assert kept == (torch.bfloat16 if native else torch.float32)

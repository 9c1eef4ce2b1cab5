"""Linear layers and norms in a fixed configuration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from treecast.kernels.triton_rows import fixed_linear, fixed_rms_norm

from .bed import TOLERANCE, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 33), (130, 80)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_is_the_product(
    dtype: torch.dtype, shape: tuple[int, int], biased: bool, device: torch.device
) -> None:
    num_in, num_out = shape
    x, weight = torch.randn(70, num_in).to(dtype), torch.randn(num_out, num_in).to(dtype)
    bias = torch.randn(num_out).to(dtype) if biased else None
    on_device = [None if t is None else t.to(device) for t in (x, weight, bias)]
    found = fixed_linear(*on_device).cpu()  # type: ignore[arg-type]
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative_error(found, expected.float()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_linear_row_do_not_depend_on_its_neighbours(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = torch.randn(200, 576, device=device), torch.randn(64, 576, device=device)
    x, weight = x.to(dtype), weight.to(dtype)
    whole = fixed_linear(x, weight, None)
    for rows in (slice(0, 1), slice(3, 5), slice(60, 130), slice(199, 200)):
        assert torch.equal(fixed_linear(x[rows], weight, None), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_the_norm_and_its_rows_are_alone(
    dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(9, 80, device=device).to(dtype)
    weight = torch.rand(80, device=device).to(dtype)
    whole = fixed_rms_norm(x, weight, 1e-5)
    expected = F.rms_norm(x.double(), (80,), weight.double(), 1e-5).float().cpu()
    assert relative_error(whole.cpu(), expected) < TOLERANCE[dtype]
    assert torch.equal(fixed_rms_norm(x[4:5], weight, 1e-5), whole[4:5])

"""Memory of an accelerator, as a service exports it."""

from __future__ import annotations

import pytest

from treecast.telemetry.process import device_memory

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_device_memory_counts_what_torch_allocated_when_a_gpu_is_in_use() -> None:
    held = torch.zeros(2**24, device="cuda:0", dtype=torch.uint8)
    by_state = {
        sample.labels["state"]: sample.value
        for sample in device_memory().samples
        if sample.labels["device"] == "cuda:0"
    }
    assert held.numel() <= by_state["allocated"] <= by_state["reserved"]
    assert by_state["reserved"] + by_state["free"] <= by_state["total"]

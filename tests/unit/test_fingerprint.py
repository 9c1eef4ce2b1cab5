"""What two processes must have in common to compute equal bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from treecast.engine import loading
from treecast.engine.loading import LoadOptions, fingerprint


def test_fingerprints_are_equal_when_devices_differ_by_index_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(loading, "_triton_version", lambda: "triton 3")
    options = LoadOptions("bfloat16", "exact", "cuda", None)
    prints = {fingerprint("r1", replace(options, device=f"cuda{at}")) for at in ("", ":0", ":1")}
    assert len(prints) == 1
    assert fingerprint("r1", replace(options, device="cpu")) not in prints

"""The noise's bits on an accelerator."""

from __future__ import annotations

import numpy as np
import pytest

from treecast.sampling.noise import gumbel, gumbel_at, noise_key

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_noise_has_the_same_bits_when_computed_on_cuda() -> None:
    vocab_size = 49152
    tokens = torch.arange(vocab_size, device="cuda")
    for sample in range(2):
        key = noise_key(2024, sample)
        for position in [*range(50), 2047, 131071]:
            on_device = gumbel_at(key, position, tokens, torch).cpu().numpy()
            assert (
                on_device.view(np.int32) == gumbel(key, position, vocab_size).view(np.int32)
            ).all()

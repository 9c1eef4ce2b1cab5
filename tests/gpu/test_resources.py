"""Every kernel compiles for a Hopper GPU, on any machine, and fits it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHARED_BYTES = 232_448
"""That one program may have on compute capability 9.0."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_hopper_and_fits() -> None:
    """In a process of its own: here kernels may be interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "treecast.bench.gpu.resources"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[1:]:
        registers, spilled, shared = (int(n) for n in line[36:].split()[:3])
        assert registers <= 255
        assert spilled <= 512, line
        assert shared <= SHARED_BYTES, line

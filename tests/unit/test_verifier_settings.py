"""Settings of a verifier that have more than one form, and what it says of its weights."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from treecast.errors import SettingsError
from treecast.services.verifier.metrics import VerifierMetrics
from treecast.services.verifier.settings import VerifierSettings


@pytest.mark.parametrize(("given", "found"), [("auto", "auto"), ("4096", 4096)])
def test_pool_tokens_are_a_number_or_auto(given: str, found: object) -> None:
    settings = VerifierSettings.load([f"--pool-tokens={given}"], "verifier")
    assert settings.pool_tokens == found


@pytest.mark.parametrize("given", ["1", "some"])
def test_other_pool_tokens_are_refused_by_name(given: str) -> None:
    with pytest.raises(SettingsError, match="--pool-tokens"):
        VerifierSettings.load([f"--pool-tokens={given}"], "verifier")


def test_what_is_moved_is_told_as_it_is_when_asked() -> None:
    metrics, moved = VerifierMetrics(), [5]
    metrics.memory.watch_weights(lambda: moved[0])
    moved[0] = 7
    told = generate_latest(metrics.registry).decode()
    assert "treecast_verifier_weights_moved_bytes_total 7.0" in told


def test_more_requests_are_sent_than_run_when_their_order_is_by_length() -> None:
    """To go by length there must be some to choose from; first come first served needs none."""
    assert VerifierSettings(max_running=32).capacity == 32
    assert VerifierSettings(max_running=32, schedule="length").capacity == 64
    assert VerifierSettings(max_running=32, max_waiting=5, schedule="length").capacity == 37


@pytest.mark.parametrize("flags", [["--max-rows=32"], ["--max-running=128"]])
def test_rows_are_refused_when_running_requests_would_leave_none(flags: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"^--max-rows .* must exceed --max-running, (32|128)"):
        VerifierSettings.load(flags, "verifier")
    assert VerifierSettings(max_rows=33).max_rows == 33

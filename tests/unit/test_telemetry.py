"""What every service says of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from treecast.telemetry.process import ProcessCollector


def metrics(draining: list[bool]) -> CollectorRegistry:
    """Of a router of two models; `draining` ends with how it is now."""
    registry = CollectorRegistry()
    registry.register(ProcessCollector("router", lambda: ["b", "a", "b"], lambda: draining[-1]))
    return registry


def test_a_process_names_its_role_and_each_model_once() -> None:
    families = {family.name: family.samples for family in metrics([False]).collect()}
    [build] = families["treecast_build_info"]
    assert build.labels["role"] == "router"
    assert build.labels["version"]
    assert [model.labels["model"] for model in families["treecast_model_info"]] == ["a", "b"]


def test_a_process_says_that_it_drains_when_it_does() -> None:
    draining = [False]
    registry = metrics(draining)
    assert registry.get_sample_value("treecast_draining") == 0
    draining.append(True)
    assert registry.get_sample_value("treecast_draining") == 1


def test_resident_memory_is_within_the_machines() -> None:
    registry = metrics([False])
    resident, total = (
        registry.get_sample_value("treecast_device_memory_bytes", {"device": "cpu", "state": state})
        for state in ("resident", "total")
    )
    assert resident is not None
    assert total is not None
    assert 2**20 < resident < total

"""Rendered manifests are what the APIs take: Kubernetes' own schemas, and those of operators."""

from __future__ import annotations

import functools
from typing import Any

import jsonschema
import pytest
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from .conftest import COMBINATIONS, Edit, rendered
from .helm import EXAMPLES, Manifest, Values, render
from .manifests import name_of, pods

OLDEST, NEWEST = "1.30.0", "1.37.0"
"""The oldest that Chart.yaml allows; the newest that the package of schemas has."""

OPERATORS = {
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "cert-manager.io/v1": "cloudcoil.models.cert_manager.v1",
}
GROUPS = "leaderworkerset.x-k8s.io/v1"


@functools.cache
def validator(version: str, kind: str, api: str) -> jsonschema.Draft202012Validator:
    """Strict: a field that the API does not have is an error."""
    folder = f"kubernetes-json-schema/v{version}-local-strict"
    group, _, last = api.rpartition("/")
    stem = "-".join(part for part in (kind.lower(), group.partition(".")[0], last) if part)
    schema = schema_contents(f"{folder}/{stem}.json", version)
    registry: Registry[Any] = Resource.from_contents(definitions(version)) @ Registry()
    return jsonschema.Draft202012Validator(schema, registry=registry)


@functools.cache
def definitions(version: str) -> dict[str, Any]:
    contents: dict[str, Any] = schema_contents(
        f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version
    )
    return contents


def check(manifest: Manifest, version: str) -> list[str]:
    """Errors of one object of Kubernetes' own APIs."""
    errors = validator(version, manifest["kind"], manifest["apiVersion"]).iter_errors(manifest)
    return [f"{name_of(manifest)} {error.json_path}: {error.message}" for error in errors]


def is_core(manifest: Manifest) -> bool:
    return manifest["apiVersion"] not in {*OPERATORS, GROUPS}


def check_all(manifests: list[Manifest], version: str) -> list[str]:
    """Every core object, and the pods inside LeaderWorkerSets."""
    core = [manifest for manifest in manifests if is_core(manifest)]
    grouped = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "group", **pod.metadata},
            "spec": pod.spec,
        }
        for pod in pods(m for m in manifests if m["apiVersion"] == GROUPS)
    ]
    return [error for manifest in [*core, *grouped] for error in check(manifest, version)]


def test_manifests_fit_the_api_when_rendered_for_a_laptop() -> None:
    assert check_all(list(rendered("laptop")), NEWEST) == []


@pytest.mark.slow
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_fit_the_api_when_rendered(manifests: list[Manifest], version: str) -> None:
    assert check_all(manifests, version) == []


@pytest.mark.slow
def test_a_misspelt_field_is_found_when_a_template_is_broken(edited: Edit) -> None:
    chart = edited("templates/_pod.tpl", "terminationGracePeriodSeconds:", "gracePeriodSeconds:")
    errors = check_all(render(Values((EXAMPLES[0],)), chart), NEWEST)
    assert any("'gracePeriodSeconds' was unexpected" in error for error in errors), errors


def normal(manifest: Manifest) -> Manifest:
    """As the operators' models write it back, with every field that they do not know left out."""
    module = pytest.importorskip(OPERATORS[manifest["apiVersion"]])
    model = getattr(module, manifest["kind"]).model_validate(manifest)
    written: Manifest = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return written


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the package of models, while it is imported
@pytest.mark.timeout(480)
def test_custom_resources_fit_their_operators_when_rendered() -> None:
    every = {
        name_of(manifest): manifest
        for name in COMBINATIONS
        for manifest in rendered(name)
        if manifest["apiVersion"] in OPERATORS
    }
    assert {name.partition("/")[0] for name in every} >= {
        "Certificate",
        "PodMonitor",
        "ScaledObject",
        "ServiceMonitor",
    }
    for manifest in every.values():
        assert normal(manifest) == manifest
    broken = next(m for m in every.values() if m["kind"] == "PodMonitor")
    misspelt = broken | {"spec": broken["spec"] | {"podMetricEndpoints": []}}
    assert normal(misspelt) != misspelt

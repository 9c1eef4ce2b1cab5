"""Security, images, limits, probes, grace periods, selectors and edges of everything rendered."""

from __future__ import annotations

import pytest

from .conftest import TLS_SECRETS, Edit, rendered
from .helm import EXAMPLES, Manifest, Values, render
from .manifests import name_of, pods, services
from .policy import PROBES, faults

LAPTOP, LARGE, *_ = EXAMPLES
POD = "templates/_pod.tpl"


def test_nothing_is_at_fault_when_rendered_for_a_laptop() -> None:
    assert faults(list(rendered("laptop"))) == []


@pytest.mark.slow
def test_nothing_is_at_fault_when_rendered(manifests: list[Manifest]) -> None:
    if not any(manifest["kind"] == "NetworkPolicy" for manifest in manifests):
        assert all("no policy denies it" in fault for fault in faults(manifests))
        return
    assert faults(manifests) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "fault"),
    [
        (POD, "allowPrivilegeEscalation: false", "privileged: true", "may gain privileges"),
        (POD, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "can write"),
        (POD, "runAsUser: 10001", "runAsUser: 0", "may run as root"),
        (POD, "seccompProfile", "# seccompProfile", "no seccomp profile"),
        (POD, "livenessProbe:", "otherProbe:", "no livenessProbe"),
        (POD, "automountServiceAccountToken: false", "hostname: a", "holds a token"),
        (POD, "enableServiceLinks: false", "enableServiceLinks: true", "read as settings"),
        (POD, "emptyDir: {sizeLimit: 2Gi}", "emptyDir: {}", "volume tmp has no limit"),
        ("templates/_workloads.tpl", "(int .drainSeconds) 15", "15", "preStop and drain take"),
        ("templates/_names.tpl", "{{ $tag }}", "latest", "is not pinned"),
        ("values.yaml", "valkey:8.1.1-alpine", "valkey", "is not pinned"),
        (
            "templates/router/service.yaml",
            'include "treecast.selectorLabels" $labels',
            'include "treecast.selectorLabels" (dict "root" . "component" "rooter")',
            "its selector finds no pod",
        ),
        (
            "templates/speculator/deployments.yaml",
            '{{- include "treecast.selectorLabels" $labels',
            '{{- include "treecast.selectorLabels" (dict "root" $ "component" "speculator")',
            "its selector finds Deployment/",
        ),
        ("templates/_names.tpl", "trunc 30", "trunc 60", "is longer"),
        ("templates/network/deny.yaml", "[Ingress, Egress]", "[Egress]\n  egress: [{}]", "denies"),
    ],
)
def test_the_fault_is_found_when_a_template_is_broken(
    edited: Edit, file: str, old: str, new: str, fault: str
) -> None:
    chart = edited(file, old, new)
    if file == "values.yaml":
        (chart / "values.schema.json").unlink()  # it refuses that by itself
    long = {"fullnameOverride": f'"{"a" * 60}"'}
    found = faults(render(Values((LAPTOP,), long), chart))
    assert any(fault in one for one in found), found


@pytest.mark.slow
def test_pods_draft_first_of_all_give_way_when_classes_are_made() -> None:
    classes = {
        pod.component: pod.spec.get("priorityClassName") for pod in pods(rendered(LARGE.stem))
    }
    assert classes["router"] == classes["verifier"] == "tc-treecast-serving"
    assert classes["speculator"] == "tc-treecast-drafting"


@pytest.mark.slow
def test_edges_are_few_when_policies_are_on() -> None:
    edges = set()
    for manifest in rendered("laptop"):
        if manifest["kind"] != "NetworkPolicy":
            continue
        to = manifest["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
        for rule in manifest["spec"].get("ingress", ()):
            for peer in rule["from"]:
                who = peer.get("podSelector", {}).get("matchLabels", {})
                origin = who.get("app.kubernetes.io/component", str(peer))
                edges |= {(origin, to, port["port"]) for port in rule["ports"]}
    anybody, scraper = str({"podSelector": {}}), str({"namespaceSelector": {}})
    assert edges == {
        *(("client", "router", port) for port in (7070, 8080)),
        *((anybody, "router", port) for port in (7070, 8080)),
        ("router", "verifier", 7071),
        ("verifier", "speculator", 7072),
        *((who, "redis", 6379) for who in ("router", "verifier", "speculator")),
        *((scraper, who, 9090) for who in ("router", "verifier", "speculator")),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("http://collector:4318", 4318),
        ("http://collector", 4317),
        ("http://[fd00::4]:4318", 4318),
        ("http://[fd00::4]", 4317),
    ],
)
def test_spans_may_leave_by_the_port_of_their_endpoint(endpoint: str, port: int) -> None:
    manifests = render(Values(sets={"tracing.otlpEndpoint": f'"{endpoint}"'}))
    anywhere = [
        [each["port"] for each in rule["ports"] if each.get("protocol") != "UDP"]
        for manifest in manifests
        if name_of(manifest) == "NetworkPolicy/tc-treecast-router"
        for rule in manifest["spec"]["egress"]
        if "to" not in rule
    ]
    assert anywhere == [[53], [port]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tls", "said"), [("false", {"grpc": "kubernetes.io/h2c", "http": "http"}), ("true", {})]
)
def test_service_names_protocols_when_they_are_not_encrypted(
    tls: str, said: dict[str, str]
) -> None:
    sets = {"router.http.enabled": "true", "tls.enabled": tls, "tls.secretNames": TLS_SECRETS}
    manifests = render(Values(sets=sets))
    (service,) = (m for m in manifests if name_of(m) == "Service/tc-treecast-router")
    ports = service["spec"]["ports"]
    assert [port["name"] for port in ports] == ["grpc", "http"]
    assert said == {p["name"]: p["appProtocol"] for p in ports if "appProtocol" in p}


@pytest.mark.slow
def test_certificates_say_the_role_when_made_and_each_role_mounts_its_own() -> None:
    manifests = rendered("large-mixed")
    made = {m["spec"]["secretName"]: m["spec"] for m in manifests if m["kind"] == "Certificate"}
    for pod in pods(manifests):
        (secret,) = (v["secret"]["secretName"] for v in pod.spec["volumes"] if v["name"] == "tls")
        assert made[secret]["uris"] == [f"spiffe://treecast/{pod.component}"]
        assert f"{pod.component}.treecast" in made[secret]["dnsNames"]
    assert len(made) == 4


@pytest.mark.slow
def test_kubelets_ask_by_http_when_grpc_is_encrypted() -> None:
    probes = {"laptop": "grpc", "TLS from secrets": "httpGet"}
    for name, how in probes.items():
        for pod in services(rendered(name)):
            assert all(how in pod.main[probe] for probe in PROBES)

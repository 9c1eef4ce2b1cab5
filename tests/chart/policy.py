"""What every rendered pod must keep to. Each check yields faults as text; none is well."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .helm import Manifest
from .manifests import FOLLOWER, Pod, name_of, pods

SPARE_S = 10
NAME_LENGTH = 63
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def faults(manifests: list[Manifest]) -> list[str]:
    """Every fault of every check, each with its place."""
    found = [
        f"{pod.owner}: {fault}"
        for pod in pods(manifests)
        for check in (security, images, resources, probes, stopping, token)
        for fault in check(pod)
    ]
    return [*found, *labels(manifests), *network(manifests)]


def security(pod: Pod) -> Iterator[str]:
    """The "restricted" Pod Security Standard, and a root that nobody can write to."""
    whole = pod.spec.get("securityContext", {})
    if not whole.get("runAsNonRoot") or not whole.get("runAsUser"):
        yield "it may run as root"
    if whole.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "it has no seccomp profile"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(name):
            yield f"{name} is set"
    for volume in pod.spec.get("volumes", ()):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is the host's"
    for container in pod.containers:
        own = container.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']} may gain privileges"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} keeps capabilities"
        if not own.get("readOnlyRootFilesystem"):
            yield f"{container['name']} can write to its root file system"


def images(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        _, _, tag = container["image"].rpartition("/")[2].partition(":")
        if tag in ("", "latest"):
            yield f"image {container['image']} is not pinned"


def resources(pod: Pod) -> Iterator[str]:
    for container in pod.containers:
        for kind in ("requests", "limits"):
            missing = {"cpu", "memory"} - set(container.get("resources", {}).get(kind, {}))
            if missing:
                yield f"{container['name']} has no {kind} of {', '.join(sorted(missing))}"
    for volume in pod.spec.get("volumes", ()):
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no limit"


def probes(pod: Pod) -> Iterator[str]:
    """Followers of a sharded group serve no port; their group restarts as one when one ends."""
    if pod.long_lived and pod.component != FOLLOWER:
        for probe in PROBES:
            if probe not in pod.main:
                yield f"{pod.main['name']} has no {probe}"


def stopping(pod: Pod) -> Iterator[str]:
    """SIGKILL comes after preStop and drain, with time to spare."""
    flags = dict(arg[2:].split("=", 1) for arg in pod.main.get("args", ()) if "=" in arg)
    if "drain-s" not in flags:
        return
    pause_s = pod.main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    if not pause_s:
        yield f"{pod.main['name']} has no preStop"
    needed_s = pause_s + int(flags["drain-s"]) + SPARE_S
    given_s = pod.spec.get("terminationGracePeriodSeconds", 30)
    if given_s < needed_s:
        yield f"it is killed after {given_s} s; preStop and drain take {needed_s}"


def token(pod: Pod) -> Iterator[str]:
    if pod.spec.get("automountServiceAccountToken") is not False:
        yield "it holds a token of the cluster"
    if pod.spec.get("enableServiceLinks") is not False:
        yield "service links would be read as settings"


def labels(manifests: Iterable[Manifest]) -> Iterator[str]:
    """Selectors find pods of this release, of their own kind and of no other; names are short."""
    every = list(pods(manifests))
    for manifest in manifests:
        if len(manifest["metadata"]["name"]) > NAME_LENGTH:
            yield f"{name_of(manifest)}: its name is longer than {NAME_LENGTH}"
        selector = manifest.get("spec", {}).get("selector")
        if not selector or manifest["kind"] == "ServiceMonitor":
            continue
        wanted = selector.get("matchLabels", selector)
        found = {p.owner for p in every if wanted.items() <= p.metadata["labels"].items()}
        if not found:
            yield f"{name_of(manifest)}: its selector finds no pod"
        own = name_of(manifest)
        if manifest["kind"] in ("Deployment", "StatefulSet") and found != {own}:
            yield f"{own}: its selector finds {', '.join(sorted(found))}"


def network(manifests: list[Manifest]) -> Iterator[str]:
    """All pods of the release are denied everything, before single edges are opened."""
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    closed = [p for p in policies if not p.get("ingress") and not p.get("egress")]
    for pod in pods(manifests):
        have = pod.metadata["labels"].items()
        if not any(p["podSelector"].get("matchLabels", {}).items() <= have for p in closed):
            yield f"{pod.owner}: no policy denies it what is not allowed"

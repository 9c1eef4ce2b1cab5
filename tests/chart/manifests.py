"""Ways through rendered manifests: pods, containers, and what they run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treecast.services.router.settings import RouterSettings
from treecast.services.speculator.settings import SpeculatorSettings
from treecast.services.verifier.settings import VerifierSettings
from treecast.settings import ServiceSettings

from .helm import Manifest

SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "router": RouterSettings,
    "verifier": VerifierSettings,
    "speculator": SpeculatorSettings,
}
FOLLOWER = "verifier-follower"


@dataclass(frozen=True)
class Pod:
    """A pod that some manifest makes."""

    owner: str
    metadata: Mapping[str, Any]
    spec: Mapping[str, Any]

    @property
    def component(self) -> str:
        return str(self.metadata["labels"]["app.kubernetes.io/component"])

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def main(self) -> Mapping[str, Any]:
        container: Mapping[str, Any] = self.spec["containers"][0]
        return container

    @property
    def long_lived(self) -> bool:
        return self.component != "client"


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def pods(manifests: Iterable[Manifest]) -> Iterator[Pod]:
    for manifest in manifests:
        name = name_of(manifest)
        match manifest["kind"]:
            case "Pod":
                yield Pod(name, manifest["metadata"], manifest["spec"])
            case "Deployment" | "StatefulSet":
                template = manifest["spec"]["template"]
                yield Pod(name, template["metadata"], template["spec"])
            case "LeaderWorkerSet":
                group = manifest["spec"]["leaderWorkerTemplate"]
                for key in ("leaderTemplate", "workerTemplate"):
                    yield Pod(f"{name} {key}", group[key]["metadata"], group[key]["spec"])


def services(manifests: Iterable[Manifest]) -> Iterator[Pod]:
    """Pods that run one of treecast's services."""
    return (pod for pod in pods(manifests) if pod.main["name"] in SETTINGS)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """`$(NAME)` as a kubelet expands it: what it does not know stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1], found[0]), text)


def environment(container: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """Variables of a container; what comes from fields and secrets is taken from `known`."""
    variables: dict[str, str] = {}
    for entry in container.get("env", ()):
        name = entry["name"]
        variables[name] = (
            expand(entry["value"], variables) if "value" in entry else known.get(name, "secret")
        )
    return variables


def service_flags(container: Mapping[str, Any], variables: Mapping[str, str]) -> list[str]:
    """The service's own flags, without those of torchrun before them."""
    args: Sequence[str] = container["args"]
    if "--module" in args:
        args = args[args.index("--module") + 2 :]
    return [expand(arg, variables) for arg in args]

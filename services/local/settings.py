"""What a local mesh consists of, and the flags that each of its processes is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from treecast.settings import DType, Numerics, Weights

Flags = Mapping[str, object]
"""Settings of a service by their field names; None leaves one at its default."""


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """What to start.

    Attributes:
        model: model folder of the LLM; "default" is SmolLM2-135M-Instruct.
        draft: model folder of the `ssm` speculator's draft; "default" is the one that ships.
        weights: of the LLM's linear layers; a draft's are the speculators' own setting.
        speculators: drafters, a process each, a kind more than once if so wished, a draft model
            by its folder as ssm=FOLDER; none decodes plainly.
        router_listen: address of the router; port 0 picks one.
        http_listen: where the router serves the OpenAI-compatible API; None for nowhere.
        redis_url: a server to use; None starts one of its own.
        tls: mutual TLS on every hop, with throwaway certificates beside the logs.
        log_dir: where each process's log goes; None makes a new folder in the cache directory.
        ready_timeout_s: for each process to load and say that it is ready.
        stop_grace_s: for each process to end by itself once asked to.
        otlp_endpoint: where all services send spans; None makes none.
        verifier_flags, speculator_flags, router_flags: further settings by their field names.
    """

    model: str = "default"
    draft: str = "default"
    engine: Literal["hf", "toy"] = "hf"
    dtype: DType = "auto"
    weights: Weights = "auto"
    numerics: Numerics = "exact"
    device: str = "cpu"
    num_verifiers: int = 1
    speculators: tuple[str, ...] = ("ssm", "ngram")
    planner: Literal["goodput", "full"] = "goodput"
    torch_threads: int = 2
    router_listen: str = "127.0.0.1:0"
    http_listen: str | None = None
    redis_url: str | None = None
    tls: bool = False
    log_dir: Path | None = None
    ready_timeout_s: float = 300.0
    stop_grace_s: float = 10.0
    otlp_endpoint: str | None = None
    verifier_flags: Flags = field(default_factory=dict)
    speculator_flags: Flags = field(default_factory=dict)
    router_flags: Flags = field(default_factory=dict)


def speculator_names(drafters: Sequence[str]) -> dict[str, str]:
    """A name for each process, and its drafter: "ssm" where it is alone, else "ssm-0" and so on."""
    kinds = [drafter.partition("=")[0] for drafter in drafters]
    seen: Counter[str] = Counter()
    names = {}
    for kind, drafter in zip(kinds, drafters, strict=True):
        names[f"{kind}-{seen[kind]}" if kinds.count(kind) > 1 else kind] = drafter
        seen[kind] += 1
    return names


def verifier_flags(settings: MeshSettings, speculators: Sequence[str]) -> Flags:
    return {
        "engine": settings.engine,
        "model": settings.model,
        "dtype": settings.dtype,
        "weights": settings.weights,
        "numerics": settings.numerics,
        "device": settings.device,
        "planner": settings.planner,
        "torch_threads": settings.torch_threads,
        "speculators": ",".join(speculators) or None,
        "trusted_speculators": ",".join(speculators) or None,
        "speculators_per_session": min(len(speculators), 4),
        "otlp_endpoint": settings.otlp_endpoint,
        "drain_s": 0,
        **settings.verifier_flags,
    }


def router_flags(settings: MeshSettings, verifiers: Sequence[str]) -> Flags:
    return {
        "listen": settings.router_listen,
        "http_listen": settings.http_listen,
        "verifiers": ",".join(verifiers),
        "otlp_endpoint": settings.otlp_endpoint,
        "drain_s": 0,
        **settings.router_flags,
    }


def speculator_flags(settings: MeshSettings, drafter: str) -> Flags:
    flags: dict[str, object] = {
        "drafters": drafter,
        "device": settings.device,
        "otlp_endpoint": settings.otlp_endpoint,
        "drain_s": 0,
    }
    if drafter.partition("=")[0] == "ssm":  # one of its own, ssm=FOLDER, says so itself
        flags |= {
            "engine": settings.engine,
            "model": settings.draft,
            "dtype": settings.dtype,
            # The others leave room for what relays the last step's tokens while it drafts: a draft
            # that has all cores waits for that at every barrier (5.1 ms for 3.9 on two cores).
            "torch_threads": max(1, settings.torch_threads // 2),
        }
    return {**flags, **settings.speculator_flags}

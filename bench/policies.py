"""The policies tree, spin and vote on equal terms: same speculators, prompts and settings.

python -m treecast.bench.policies --drafter default --drafter ngram --drafter ./my-draft

One set of speculator processes serves three meshes, one for each policy. They answer in turn,
never at the same time, each with several sessions at once; and plain decoding beside them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from treecast.checkpoints import default_cache_dir
from treecast.client import Client, Prompt, Result, SamplingParams
from treecast.services.local import LocalMesh, MeshSettings
from treecast.services.local.logs import new_log_dir
from treecast.services.local.process import (
    ServiceProcess,
    Spawner,
    child_environment,
    service_command,
)
from treecast.services.local.settings import speculator_flags

from .compare import Spread
from .machine import describe_machine
from .prompts import DEFAULT_PROMPTS, read_prompts
from .scrape import scrape

POLICIES = ("tree", "spin", "vote")
PLAIN = "plain"

_SHOWN = (
    "treecast_verifier_speculator_choices_total",
    "treecast_verifier_speculator_switches_total",
    "treecast_verifier_vote_weight",
    "treecast_verifier_speculation_length_tokens",
    "treecast_verifier_accepted_by_proposer_total",
)
_READY_S = 300.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for all.

    Attributes:
        drafters: a speculator process each; "ngram", or a draft model's folder or "default".
        concurrency: sessions at once.
    """

    drafters: tuple[str, ...]
    sampling: SamplingParams
    concurrency: int = 4
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Lap:
    """One contender's answers to all prompts, several at a time.

    Attributes:
        steps: summed over requests; those in one pass of the LLM count each.
    """

    contender: str
    seconds: float
    steps: int
    token_ids: Mapping[str, tuple[int, ...]]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.token_ids.values()))


@dataclass(frozen=True, slots=True)
class Standing:
    """One contender over all laps.

    Attributes:
        same_as_plain: prompts answered with plain decoding's very tokens, in its last lap; all of
            them in `exact` numerics, while `fast` may differ at near-ties.
        metrics: what the verifier counted of its choices, by name and labels.
    """

    contender: str
    tokens_per_s: Spread
    tokens_per_step: float
    same_as_plain: int
    num_prompts: int
    metrics: Mapping[str, float]

    def __str__(self) -> str:
        rate = self.tokens_per_s
        return (
            f"{self.contender:6} {rate.median:7.1f} tokens/s ({rate.lower:.1f}-{rate.upper:.1f}), "
            f"{self.tokens_per_step:.2f} tokens/step, "
            f"same as plain: {self.same_as_plain} of {self.num_prompts}"
        )


@contextmanager
def speculators(settings: MeshSettings, drafters: Sequence[str]) -> Iterator[list[str]]:
    """Start a speculator for each drafter; yields their addresses."""
    log_dir, spawner = settings.log_dir, Spawner()
    assert log_dir is not None
    pods: list[ServiceProcess] = []
    try:
        for number, drafter in enumerate(drafters):
            kind = drafter if drafter in ("ngram", "suffix") else "ssm"
            flags = speculator_flags(replace(settings, draft=drafter), kind)
            command = service_command("speculator", flags)
            log = log_dir / f"speculator-{number}.log"
            pods.append(
                ServiceProcess(f"speculator-{number}", command, child_environment({}), log, spawner)
            )
        for pod in pods:
            pod.wait_ready(_READY_S)
        yield [pod.address for pod in pods]
    finally:
        for pod in pods:
            pod.stop(settings.stop_grace_s)
        spawner.close()


def policy_settings(settings: MeshSettings, policy: str, addresses: Sequence[str]) -> MeshSettings:
    """A mesh of this policy that dials speculators which are there already."""
    assert settings.log_dir is not None
    log_dir = settings.log_dir / policy
    log_dir.mkdir()
    flags = {
        **settings.verifier_flags,
        "policy": policy,
        "speculators": ",".join(addresses),
        "speculators_per_session": min(4, len(addresses)),
    }
    return replace(settings, speculators=(), log_dir=log_dir, verifier_flags=flags)


def compare_policies(
    settings: MeshSettings, terms: Terms, prompts: Mapping[str, Prompt]
) -> list[Standing]:
    """Let plain decoding and each policy answer all prompts in turn, whoever begins rotating.

    Args:
        settings: `log_dir` must exist; `speculators` and `draft` are not looked at.
    """
    with ExitStack() as stack:
        addresses = stack.enter_context(speculators(settings, terms.drafters))
        meshes = {
            policy: stack.enter_context(LocalMesh(policy_settings(settings, policy, addresses)))
            for policy in POLICIES
        }
        clients = {
            name: stack.enter_context(Client(mesh.router_address)) for name, mesh in meshes.items()
        }
        for client in clients.values():
            _wait_for_speculators(client, len(addresses))
        clients[PLAIN] = clients["tree"]
        laps = _laps(clients, terms, prompts)
        return [
            _standing(name, laps, _scrape(meshes[name]) if name in meshes else {})
            for name in (PLAIN, *POLICIES)
        ]


def _laps(clients: Mapping[str, Client], terms: Terms, prompts: Mapping[str, Prompt]) -> list[Lap]:
    names = [PLAIN, *POLICIES]
    first = dict([next(iter(prompts.items()))])
    for name in names:
        _lap(name, clients[name], terms, first)
    laps: list[Lap] = []
    for number in range(terms.rounds):
        shift = number % len(names)
        order = (*names[shift:], *names[:shift])
        laps += [_lap(name, clients[name], terms, prompts) for name in order]
    return laps


def _lap(name: str, client: Client, terms: Terms, prompts: Mapping[str, Prompt]) -> Lap:
    max_nodes = 0 if name == PLAIN else None

    def answer(prompt: Prompt) -> Result:
        return client.generate(prompt, terms.sampling, max_nodes=max_nodes).result()

    began = time.perf_counter()
    with ThreadPoolExecutor(terms.concurrency) as pool:
        results = list(pool.map(answer, prompts.values()))
    seconds = time.perf_counter() - began
    token_ids = {key: r.token_ids for key, r in zip(prompts, results, strict=True)}
    return Lap(name, seconds, sum(r.usage.steps for r in results), token_ids)


def _standing(name: str, laps: Sequence[Lap], metrics: Mapping[str, float]) -> Standing:
    mine = [lap for lap in laps if lap.contender == name]
    plain = next(lap for lap in reversed(laps) if lap.contender == PLAIN)
    texts = mine[-1].token_ids
    return Standing(
        name,
        Spread.of([lap.tokens / lap.seconds for lap in mine]),
        sum(lap.tokens for lap in mine) / sum(lap.steps for lap in mine),
        sum(plain.token_ids[key] == texts[key] for key in texts),
        len(texts),
        metrics,
    )


def _wait_for_speculators(client: Client, count: int) -> None:
    """Block until the mesh's verifier has a stream to each."""
    while any(len(verifier.speculators) < count for verifier in client.status().verifiers):
        time.sleep(0.05)


def _scrape(mesh: LocalMesh) -> dict[str, float]:
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for sample in scrape(mesh.processes["verifier-0"])
        if sample.name in _SHOWN
    }


def main() -> None:
    """Print one line per contender; save all of it if asked to."""
    parser = argparse.ArgumentParser(description="Policies tree, spin and vote on equal terms.")
    parser.add_argument(
        "--drafter", action="append", help="'ngram', a draft's folder, or 'default'; several"
    )
    parser.add_argument("--model", default="default", help="the LLM's folder")
    parser.add_argument("--prompts", type=Path, default=DEFAULT_PROMPTS, help="Spec-Bench file")
    parser.add_argument("--limit", type=int, help="use only this many, evenly spread")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--concurrency", type=int, default=4, help="sessions at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--planner", choices=["goodput", "full"], default="goodput")
    parser.add_argument("--numerics", choices=["exact", "fast"], default="exact")
    parser.add_argument("--capacity", type=int, default=32, help="sessions of each speculator")
    parser.add_argument("--out", type=Path, help="save as JSON")
    arguments = parser.parse_args()
    settings = MeshSettings(
        model=arguments.model,
        numerics=arguments.numerics,
        log_dir=new_log_dir(default_cache_dir() / "logs"),
        planner=arguments.planner,
        speculator_flags={"capacity": arguments.capacity},
    )
    sampling = SamplingParams(
        temperature=arguments.temperature, max_tokens=arguments.max_tokens, seed=1
    )
    drafters = tuple(arguments.drafter or ("default", "ngram"))
    terms = Terms(drafters, sampling, arguments.concurrency, arguments.rounds)
    prompts: dict[str, Prompt] = {
        prompt.id: prompt.chat for prompt in read_prompts(arguments.prompts, arguments.limit)
    }
    standings = compare_policies(settings, terms, prompts)
    for standing in standings:
        print(standing)
        for name, value in sorted(standing.metrics.items()):
            print(f"    {name} {value:g}")
    if arguments.out is not None:
        found = {
            "machine": describe_machine(),
            "arguments": {name: str(value) for name, value in vars(arguments).items()},
            "standings": [asdict(standing) for standing in standings],
        }
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

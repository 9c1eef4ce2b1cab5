"""Every flag and variable that the chart passes is one that its service reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from typer.core import TyperGroup
from typer.main import get_command

from treecast.cli.app import app
from treecast.errors import SettingsError
from treecast.services.router.metrics import RouterMetrics
from treecast.services.speculator.metrics import SpeculatorMetrics
from treecast.services.verifier.metrics import VerifierMetrics
from treecast.settings import ServiceSettings, unknown_variables

from .conftest import Edit, rendered
from .helm import EXAMPLES, ROOT, Manifest, Values, render
from .manifests import SETTINGS, environment, expand, name_of, pods, service_flags, services

KNOWN = {"POD_IP": "10.0.0.7", "REDIS_PASSWORD": "abc", "TREECAST_REDIS_URL": "rediss://r:6380/0"}


def field_of(flag: str, settings: type[ServiceSettings]) -> str | None:
    """The field that a flag sets, or None."""
    name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
    fields = settings.model_fields
    return next((f for f in (name, name.removeprefix("no_")) if f in fields), None)


def read(role: str, flags: Sequence[str], variables: Mapping[str, str]) -> ServiceSettings:
    """As the service reads them. Raises AssertionError naming each that it does not know."""
    settings = SETTINGS[role]
    unknown = [flag for flag in flags if not field_of(flag, settings)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        unknown += unknown_variables(settings)
        known = settings.load([flag for flag in flags if field_of(flag, settings)], role)
    if unknown:
        raise AssertionError(f"the {role} does not know {', '.join(unknown)}")
    return known


def read_all(manifests: Iterable[Manifest]) -> list[tuple[str, ServiceSettings]]:
    """Every service's settings; complains of all of them at once."""
    settings, problems = [], set()
    for pod in services(manifests):
        role = pod.main["name"]
        variables = environment(pod.main, KNOWN)
        try:
            settings.append((role, read(role, service_flags(pod.main, variables), variables)))
        except (AssertionError, SettingsError) as problem:
            problems.add(str(problem))
    if problems:
        raise AssertionError("\n".join(sorted(problems)))
    return settings


def test_flags_are_read_when_rendered_for_a_laptop() -> None:
    read_by = dict(read_all(rendered("laptop")))
    assert set(read_by) == set(SETTINGS)
    for settings in read_by.values():
        assert settings.redis_url == "redis://:abc@tc-treecast-redis:6379/0"
        assert settings.advertise is not None
        assert settings.advertise.startswith("10.0.0.7:")


@pytest.mark.slow
def test_flags_are_read_when_rendered(manifests: list[Manifest]) -> None:
    assert read_all(manifests)


@pytest.mark.slow
def test_numbers_and_switches_are_read_as_written_when_they_are_settings() -> None:
    sets = {"speculatorDefaults.settings": '{"suffix-memory":1000000,"shares-cores":false}'}
    (speculator,) = [s for role, s in read_all(render(Values(sets=sets))) if role == "speculator"]
    assert (speculator.suffix_memory, speculator.shares_cores) == (1000000, False)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_an_entry_wins_over_defaults_when_it_says_false_or_zero() -> None:
    own = '[{"name":"a","replicas":0,"gpus":0,"settings":{"shares-cores":false}}]'
    defaults = {
        "speculatorDefaults.gpus": "1",
        "speculatorDefaults.settings": '{"shares-cores":true,"capacity":7}',
    }
    manifests = render(Values(sets={"speculators": own, **defaults}))
    (pod,) = [pod for pod in services(manifests) if pod.component == "speculator"]
    deployment = next(m for m in manifests if name_of(m) == "Deployment/tc-treecast-speculator-a")
    assert deployment["spec"]["replicas"] == 0
    assert pod.main["image"].endswith("-cpu")
    assert {"--no-shares-cores", "--capacity=7"} <= set(pod.main["args"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "threads"),
    [('"8"', 8), ("8", 8), ('"2500m"', 2), ('"2.5"', 2), ("2.5", 2), ('"250m"', 1), ("0.5", 1)],
)
def test_threads_are_the_whole_cores_of_the_limit_when_rendered(limit: str, threads: int) -> None:
    sets = {"verifier.resources.limits.cpu": limit}
    (verifier,) = [s for role, s in read_all(render(Values(sets=sets))) if role == "verifier"]
    assert verifier.torch_threads == threads  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("name", [example.stem for example in EXAMPLES])
def test_speculators_have_room_for_all_that_a_verifier_runs(name: str) -> None:
    room = runs = 0
    for manifest in rendered(name):
        for role, settings in read_all([manifest]):
            if role == "speculator":
                room += settings.capacity * manifest["spec"].get("replicas", 1)  # type: ignore[attr-defined]
            elif role == "verifier":
                runs = settings.max_running  # type: ignore[attr-defined]
    assert room >= runs > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("templates/_flags.tpl", "--drain-s=", "--drain-z=", "does not know --drain-z"),
        (
            "templates/_flags.tpl",
            "name: TREECAST_REDIS_URL",
            "name: TREECAST_REDIS",
            "TREECAST_REDIS",
        ),
        ("templates/_flags.tpl", "--torch-threads={{", "--torch-threads=a{{", "--torch-threads"),
    ],
)
def test_complaint_names_the_flag_when_the_chart_passes_a_wrong_one(
    edited: Edit, file: str, old: str, new: str, complaint: str
) -> None:
    chart = edited(file, old, new)
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        read_all(render(chart=chart))


@pytest.mark.slow
def test_launcher_knows_its_own_flags_when_a_group_spans_hosts() -> None:
    """Read by torchrun's own parser, with the variables that the group's controller sets."""
    from torch.distributed.run import parse_args

    group = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader.svc"}
    leader, follower = (pod for pod in services(rendered("sharded-group")) if "command" in pod.main)
    assert leader.main["command"] == ["python", "-m", "torch.distributed.run"]
    assert follower.main["args"] == leader.main["args"]
    read_by = parse_args([expand(arg, group) for arg in leader.main["args"]])
    assert (read_by.nnodes, read_by.node_rank, read_by.nproc_per_node) == ("2", 1, "8")
    assert (read_by.master_addr, read_by.module) == ("leader.svc", True)
    assert read_by.training_script == "treecast.services.verifier"
    assert read_by.training_script_args == service_flags(leader.main, {})
    assert read_by.shutdown_timeout > 300  # the drain


def test_flags_are_read_when_composed_on_one_host() -> None:
    composed = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    for role in SETTINGS:
        variables = composed[role]["environment"]
        assert read(role, composed[role]["command"], variables)
        assert composed[role]["read_only"]
        assert composed[role]["cap_drop"] == ["ALL"]


def test_commands_parse_when_containers_run_the_command_line() -> None:
    """The pod of `helm test`, and the init container that unpacks the default model."""
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    seen = set()
    for pod in pods(rendered("laptop")):
        for container in pod.containers:
            program, *words = container.get("command", [""])
            if program == "treecast":
                command = root.commands[words[0]]
                command.make_context(words[0], words[1:])  # exits if it knows a word of them not
                seen.add(words[0])
    assert seen == {"generate", "models"}


def metric_names() -> set[str]:
    """Of the series that services export."""
    registries = [each().registry for each in (RouterMetrics, VerifierMetrics, SpeculatorMetrics)]
    kinds = ("", "_total", "_bucket", "_count", "_sum")
    return {
        f"{family.name}{kind}"
        for registry in registries
        for family in registry.collect()
        for kind in kinds
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HPA", "large-mixed"])
def test_metrics_exist_when_pods_are_scaled_by_them(name: str) -> None:
    scalers = [
        m for m in rendered(name) if m["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    ]
    assert scalers
    used = set(re.findall(r"treecast_\w+", yaml.safe_dump(scalers, width=1000)))
    assert used - metric_names() == set()


@pytest.mark.slow
def test_other_releases_do_not_count_when_pods_are_scaled() -> None:
    for scaled in [m for m in rendered("large-mixed") if m["kind"] == "ScaledObject"]:
        name = scaled["metadata"]["name"]
        for trigger in scaled["spec"]["triggers"]:
            [pods_of] = set(re.findall(r'pod=~"([^"]+)"', trigger["metadata"]["query"]))
            assert re.fullmatch(pods_of, f"{name}-0")
            other = name.replace("tc-treecast-", "tc-treecast-staging-")
            assert not re.fullmatch(pods_of, f"{other}-0")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_queries_parse_when_pods_are_scaled_by_them(tmp_path: Path) -> None:
    triggers = [
        trigger
        for manifest in rendered("large-mixed")
        if manifest["kind"] == "ScaledObject"
        for trigger in manifest["spec"]["triggers"]
    ]
    rules = [
        {"record": f"scaling:{number}", "expr": trigger["metadata"]["query"]}
        for number, trigger in enumerate(triggers)
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "scaling", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", file], capture_output=True, text=True, check=False
    )
    assert f"SUCCESS: {len(rules)} rules found" in done.stdout, done.stdout + done.stderr

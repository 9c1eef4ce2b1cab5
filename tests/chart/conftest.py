"""What the chart is rendered with."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .helm import CHART, EXAMPLES, Manifest, Values, render

TLS_SECRETS = '{"router":"r","verifier":"v","speculator":"s","client":"c"}'
COMBINATIONS: dict[str, Values] = {
    "defaults": Values(),
    **{example.stem: Values((example,)) for example in EXAMPLES},
    "no speculators": Values(sets={"speculators": "[]"}),
    "no Redis": Values(sets={"redis.mode": '"none"'}),
    "Redis secret of one's own": Values(sets={"redis.bundled.secretName": '"mine"'}),
    "TLS from secrets": Values(sets={"tls.enabled": "true", "tls.secretNames": TLS_SECRETS}),
    "IPv6": Values(sets={"listenHost": '"[::]"'}),
    "HPA": Values(
        sets={f"{who}.autoscaling.enabled": "true" for who in ("router", "verifier")}
        | {"speculatorDefaults.autoscaling.enabled": "true"}
    ),
    "no policies, no account": Values(
        sets={"networkPolicy.enabled": "false", "serviceAccount.create": "false"}
    ),
    "two CPU shards": Values(sets={"verifier.tensorParallel": "2"}),
    "long names": Values(
        sets={"fullnameOverride": f'"{"a" * 60}"', "speculators": f'[{{"name":"{"b" * 20}"}}]'}
    ),
    "other pod settings": Values(
        sets={
            "pod.nodeSelector": '{"disk":"fast"}',
            "pod.annotations": '{"a":"b"}',
            "pod.labels": '{"team":"a"}',
            "pod.tolerations": '[{"key":"a","operator":"Exists"}]',
            "pod.affinity": '{"nodeAffinity":{}}',
            "pod.runtimeClassName": '"gvisor"',
            "pod.env": '[{"name":"OMP_WAIT_POLICY","value":"passive"}]',
            "serviceAccount.annotations": '{"a":"b"}',
            "test.env": '[{"name":"A","value":"b"}]',
            "networkPolicy.extraEgress": '[{"ports":[{"port":9000}]}]',
            "image.pullSecrets": '["one","two"]',
            "router.pod.nodeSelector": '{"pool":"edge"}',
            "verifier.pod.priorityClassName": '"high"',
        }
    ),
}


@functools.cache
def rendered(name: str) -> tuple[Manifest, ...]:
    return tuple(render(COMBINATIONS[name]))


@pytest.fixture(params=COMBINATIONS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    """Each combination of values in turn."""
    return list(rendered(request.param))


Edit = Callable[[str, str, str], Path]


@pytest.fixture
def edited(tmp_path: Path) -> Edit:
    """The chart with one text of one of its files replaced: for controls."""
    copy = tmp_path / "treecast"
    shutil.copytree(CHART, copy)

    def edit(file: str, old: str, new: str) -> Path:
        path = copy / file
        text = path.read_text()
        assert old in text, f"{file} has no {old!r}"
        path.write_text(text.replace(old, new))
        return copy

    return edit

"""Values that make no sense are refused, with a message that says why."""

from __future__ import annotations

import re

import pytest

from .helm import HelmError, Values, render

REFUSALS: list[tuple[dict[str, str], str]] = [
    ({"router.replica": "3"}, "at '/router': additional properties 'replica' not allowed"),
    ({"router.replicas": '"two"'}, "at '/router/replicas': got string, want integer"),
    ({"router.preStopSeconds": "0"}, "at '/router/preStopSeconds': minimum: got 0, want 1"),
    ({"verifier.gpus": "99"}, "at '/verifier/gpus': maximum: got 99, want 16"),
    ({"router.resources.limits.memory": '"lots"'}, "/router/resources/limits/memory': 'lots' does"),
    ({"router.resources.limits": "null"}, "/router/resources': missing property 'limits'"),
    ({"speculators": '[{"replicas":1}]'}, "at '/speculators/0': missing property 'name'"),
    ({"speculators": '[{"name":"A B"}]'}, "at '/speculators/0/name': 'A B' does not match"),
    (
        {"speculators": '[{"name":"a","drafters":["magic"]}]'},
        "/drafters/0': 'magic' does not match",
    ),
    ({"speculators": '[{"name":"a","drafters":[]}]'}, "/drafters': minItems: got 0, want 1"),
    ({"speculators": '[{"name":"a"},{"name":"a"}]'}, "two speculators of this name"),
    (
        {"redis.mode": '"cluster"'},
        "/redis/mode': value must be one of 'bundled', 'external', 'none'",
    ),
    ({"redis.mode": '"external"'}, "redis.external.secretName must name the secret"),
    ({"redis.bundled.image": '"valkey:latest"'}, "redis.bundled.image is valkey:latest"),
    ({"image.tag": '"latest"'}, "image.tag is latest; it must name a version"),
    ({"listenHost": '"127.0.0.1"'}, "/listenHost': value must be one of '0.0.0.0', '[::]'"),
    ({"verifier.settings": '{"device":"cuda"}'}, "verifier.settings.device: the chart sets this"),
    (
        {"verifier.settings": '{"Max_Rows":1}'},
        "/verifier/settings': additional properties 'Max_Rows'",
    ),
    ({"speculatorDefaults.settings": '{"model":"x"}'}, "speculators[0] (draft).settings.model"),
    ({"verifier.model.source": '"ftp"'}, "/verifier/model/source': value must be one of"),
    ({"verifier.model.source": '"pvc"'}, "verifier.model: source is pvc, so pvc.claimName"),
    ({"verifier.model.source": '"image"'}, "source is image, so image.reference must name"),
    ({"verifier.model.source": '"objectStore"'}, "objectStore.path must be BUCKET/PREFIX"),
    ({"verifier.model.folder": '"/etc"'}, "verifier.model.folder is /etc; it must be a folder"),
    (
        {"verifier.hosts": "2", "verifier.tensorParallel": "3"},
        "is 3 ranks; it must be a multiple of",
    ),
    (
        {"verifier.gpus": "2", "verifier.tensorParallel": "4"},
        "is 4 ranks; 1 hosts of 2 GPUs hold at",
    ),
    (
        {"router.autoscaling": '{"enabled":true,"minReplicas":9,"maxReplicas":2}'},
        "router.autoscaling: minReplicas is 9; the limit is maxReplicas, 2",
    ),
    ({"autoscaling.by": '"keda"'}, "autoscaling.prometheus must be the URL of a Prometheus"),
    ({"tls.enabled": "true"}, "tls.secretNames.client must name a secret with tls.crt"),
    (
        {"tls.enabled": "true", "tls.certManager.enabled": "true"},
        "tls.certManager.issuer.name must name an issuer",
    ),
    ({"tracing.otlpEndpoint": '"collector:4317"'}, "/tracing/otlpEndpoint': 'collector:4317' does"),
]


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        pytest.param(*refusal, id=refusal[1], marks=pytest.mark.slow if number else ())
        for number, refusal in enumerate(REFUSALS)
    ],
)
def test_values_are_refused_when_they_make_no_sense(sets: dict[str, str], message: str) -> None:
    with pytest.raises(HelmError, match=re.escape(message)):
        render(Values(sets=sets))


@pytest.mark.slow
def test_an_old_cluster_is_refused_when_its_kubelets_know_no_sleep() -> None:
    with pytest.raises(HelmError, match=r"chart requires kubeVersion: >=1\.30"):
        render(extra=["--kube-version=1.29.0"])

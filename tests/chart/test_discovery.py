"""Processes with the flags that the chart renders find one another, each at its pod's address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treecast import Client, SamplingParams

from .helm import EXAMPLES, Values, render
from .manifests import Pod, environment, service_flags, services

TOY = {
    "redis.mode": '"external"',
    "redis.external.secretName": '"redis"',
    "verifier.settings": '{"engine":"toy","toy-step-s":0.02}',
    "speculatorDefaults.settings.engine": '"toy"',
}
ADDRESSES = {"router": "127.41.0.1", "verifier": "127.41.0.2", "draft": "127.41.0.3"}
"""Every address of 127/8 is this machine's, so each pod can have one of its own."""


def who(pod: Pod) -> str:
    return str(pod.metadata["labels"].get("treecast/speculator", pod.component))


def start(pod: Pod, redis_url: str, log: Path) -> subprocess.Popen[bytes]:
    """As a kubelet does, but for the network that the pod would have to itself."""
    ip = ADDRESSES[who(pod)]
    variables = environment(pod.main, {"POD_IP": ip, "TREECAST_REDIS_URL": redis_url})
    flags = [f.replace("0.0.0.0:", f"{ip}:") for f in service_flags(pod.main, variables)]
    command = [sys.executable, "-m", f"treecast.services.{pod.main['name']}", *flags]
    with log.open("wb") as sink:
        return subprocess.Popen(command, env=os.environ | variables, stdout=sink, stderr=sink)


@pytest.fixture
def mesh(empty_redis: str, tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    manifests = render(Values((EXAMPLES[0],), TOY))
    with ExitStack() as stack:
        running = {}
        for pod in services(manifests):
            if who(pod) not in ADDRESSES:
                continue
            running[who(pod)] = process = start(pod, empty_redis, tmp_path / f"{who(pod)}.log")
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        yield running


def wait_ready(address: str) -> None:
    """As a kubelet asks: `grpc.health.v1`."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest()
        for answer in stub.Watch(asked, wait_for_ready=True, timeout=120):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return


@pytest.mark.slow
def test_trees_come_from_the_pods_address_when_started_with_rendered_flags(
    mesh: dict[str, subprocess.Popen[bytes]], empty_redis: str
) -> None:
    router = f"{ADDRESSES['router']}:7070"
    wait_ready(router)
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with Client(router) as client:
        accepted = 0
        while not accepted:  # the test's time limit is its bound
            accepted = client.generate([5, 6, 7], greedy).result().usage.accepted
        (verifier,) = client.status().verifiers
    assert verifier.address == f"{ADDRESSES['verifier']}:7071"
    with redis.Redis.from_url(empty_redis, decode_responses=True) as store:
        entries = "".join(store.get(key) or "" for key in store.keys("*entry*"))
        assert f"{ADDRESSES['draft']}:7072" in entries
        for process in mesh.values():
            process.terminate()
        assert [process.wait(60) for process in mesh.values()] == [0, 0, 0]
        assert not store.keys("*entry*")

"""Leases, registry and quotas over a Redis Cluster, with TLS and a password: one real node."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import structlog

from treecast.errors import QuotaExceeded, SettingsError
from treecast.services.local.certificates import make_certificates
from treecast.services.local.process import ServiceProcess, Spawner, child_environment
from treecast.services.local.valkey import _binary, free_port
from treecast.services.router.keys import Key
from treecast.services.router.leases import Leases
from treecast.services.router.quotas import Quotas
from treecast.services.router.server import Router
from treecast.services.router.settings import RouterSettings
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis, RedisLost, redacted
from treecast.wire.registry import Entry, Registration, Registry
from treecast.wire.tls import TlsFiles

PASSWORD = "hunter2-is-secret"


@dataclass(frozen=True)
class Node:
    port: int
    ca: Path

    def url(self, scheme: str, password: str = PASSWORD) -> str:
        return f"{scheme}://default:{password}@localhost:{self.port}?ssl_ca_certs={self.ca}"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A cluster of one, which has all slots. Its binary has no TLS, so that is put before it."""
    folder = tmp_path_factory.mktemp("cluster")
    files, plain = make_certificates(folder)["router"], free_port()
    assert files.ca is not None
    spawner = Spawner()
    with tls_before(plain, files) as port:
        command = [
            *(str(_binary()), "--bind", "127.0.0.1", "--port", str(plain)),
            *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
            *("--cluster-port", str(free_port()), "--cluster-announce-port", str(port)),
            *("--cluster-announce-hostname", "localhost"),
            *("--cluster-preferred-endpoint-type", "hostname"),
            *("--requirepass", PASSWORD, "--save", "", "--dir", str(folder)),
        ]
        log = folder / "log"
        process = ServiceProcess("node", command, child_environment({}), log, spawner)
        try:
            node = Node(port, files.ca)
            with redis.Redis.from_url(node.url("rediss")) as client:
                until(lambda: bool(client.ping()))
                client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
                until(lambda: client.cluster("INFO")["cluster_state"] == "ok")
                with pytest.raises(redis.exceptions.ClusterCrossSlotError):
                    client.mget(["a", "b"])  # it is a cluster, and holds us to it
            yield node
        finally:
            process.stop(5)
            spawner.close()


@contextmanager
def tls_before(port: int, files: TlsFiles) -> Iterator[int]:
    """A TLS end on a port of its own, on a thread, that passes everything on to `port`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(str(files.cert), files.key)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def serve() -> asyncio.Server:
        return await asyncio.start_server(
            lambda *ends: join(port, *ends), "127.0.0.1", 0, ssl=context
        )

    async def stop() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(serve(), loop).result()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def join(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        there, back = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        writer.transport.abort()
        return
    await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while chunk := await reader.read(65536):
            writer.write(chunk)
    finally:
        writer.transport.abort()


def until(holds: object) -> None:
    """The server announces nothing, so it is asked again."""
    assert callable(holds)
    for _ in range(500):
        try:
            if holds():
                return
        except redis.ConnectionError:
            pass
        time.sleep(0.02)
    raise AssertionError("the node did not come up")


@pytest.mark.parametrize("scheme", ["rediss+cluster", "rediss"])
async def test_all_that_is_kept_in_redis_works_over_tls_and_in_a_cluster(
    node: Node, scheme: str
) -> None:
    guarded = GuardedRedis(node.url(scheme), timeout_s=5)
    try:
        leases = Leases(guarded, ttl_s=60)
        first = await leases.claim(f"acme/{scheme}", "v1", None)
        assert await leases.renew(f"acme/{scheme}") == first
        second = await leases.claim(f"acme/{scheme}", "v2", first)
        assert second.epoch > first.epoch
        assert await leases.release(f"acme/{scheme}") == second

        told: list[tuple[Entry, ...]] = []
        registry = Registry(guarded, Role.VERIFIER, poll_s=60)
        names = [Registration(guarded, Role.VERIFIER, f"h:{n}", f"i{n}") for n in (1, 2)]
        for name in names:
            await name.start()
        await registry.start(told.append)
        assert [entry.address for entry in told[-1]] == ["h:1", "h:2"]
        for name in names:
            await name.close()
        await registry.poll()
        assert told[-1] == ()
        await registry.close()

        quotas = Quotas(guarded)
        key = Key(tenant="acme", sha256=f"{len(scheme):064x}"[::-1], requests_per_minute=1)
        await quotas.take_request(key)
        with pytest.raises(QuotaExceeded):
            await quotas.take_request(key)
    finally:
        await guarded.close()


async def test_router_serves_over_a_cluster(node: Node) -> None:
    settings = RouterSettings(redis_url=node.url("rediss+cluster"), metrics_listen=None)
    async with Router(settings, "router-cluster") as router:
        async with asyncio.timeout(60):
            while not router.redis_ok:
                await asyncio.sleep(0.05)  # the registry asks each second; nothing tells of it


@pytest.mark.parametrize("scheme", ["rediss+cluster", "rediss"])
async def test_password_is_in_no_log_when_it_is_wrong_or_nobody_answers(
    node: Node, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = node.url(scheme, "wrong-secret")
    gone = f"{scheme}://default:{PASSWORD}@localhost:1"
    with structlog.testing.capture_logs() as logs:
        for url in (wrong, gone):
            guarded = GuardedRedis(url, timeout_s=5)
            with pytest.raises(RedisLost):
                await guarded.ask(lambda it: it.ping())
            await guarded.close()
    assert [event["event"] for event in logs] == ["redis lost"] * 2
    assert "secret" not in str(logs) + str(capsys.readouterr())


def test_password_is_not_in_the_error_when_the_url_is_bad() -> None:
    with pytest.raises(SettingsError) as refused:
        GuardedRedis(f"http://me:{PASSWORD}@host:1")
    assert PASSWORD not in refused.value.message
    assert "http://***@host:1" in refused.value.message


def test_url_is_shown_without_user_and_password() -> None:
    assert redacted("redis://u:p@h:1/0") == "redis://***@h:1/0"
    assert redacted("redis://u:p@x@h:1") == "redis://***@h:1"
    assert redacted("unix:///socket") == "unix:///socket"

"""What the chaos run is made of: proxy, mutations, judgement."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError

from treecast.bench.chaos import corpus
from treecast.bench.chaos.load import Outcome, Record
from treecast.bench.chaos.logs import error_events
from treecast.bench.chaos.mutate import Mutator
from treecast.bench.chaos.proxy import LinkProxy
from treecast.bench.chaos.table import percentile, row_of
from treecast.services.local.valkey import free_port


@asynccontextmanager
async def echo(proxy_port: int) -> AsyncIterator[LinkProxy]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, LinkProxy(proxy_port, server.sockets[0].getsockname()[1]) as proxy:
        yield proxy


@pytest.mark.parametrize("way", ["there", "back"])
async def test_a_cut_link_holds_bytes_back_until_it_is_healed(way: str) -> None:
    port = free_port()
    async with echo(port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        getattr(proxy, way).cut()
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(3), 0.05)
        getattr(proxy, way).heal()
        assert await asyncio.wait_for(reader.readexactly(3), 10) == b"two"
        writer.close()


async def test_a_slow_link_delivers_late_and_in_order() -> None:
    port = free_port()
    async with echo(port) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        proxy.there.delay_s = 0.1
        began_s = asyncio.get_running_loop().time()
        writer.write(b"one")
        await writer.drain()
        writer.write(b"two")
        assert await asyncio.wait_for(reader.readexactly(6), 10) == b"onetwo"
        assert asyncio.get_running_loop().time() - began_s >= 0.1
        writer.close()


async def test_a_connection_ends_when_the_server_behind_the_proxy_is_gone() -> None:
    port = free_port()
    async with LinkProxy(port, free_port()):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


def test_mutations_are_the_same_when_the_seed_is() -> None:
    def mutate(seed: int) -> list[bytes]:
        mutator = Mutator(seed)
        frames = [mutator.mutate_fields(frame) for frame in corpus.SERVE.frames * 20]
        return [mutator.mutate_bytes(frame.SerializeToString()) for frame in frames]

    assert mutate(1) == mutate(1)
    assert mutate(1) != mutate(2)


def test_mutated_fields_still_parse_and_the_original_is_left_alone() -> None:
    mutator, changed = Mutator(3), 0
    for rpc in (*corpus.ROUTER, *corpus.VERIFIER):
        for request in rpc.requests:
            before = request.SerializeToString(deterministic=True)
            for _ in range(50):
                body = mutator.mutate_fields(request).SerializeToString(deterministic=True)
                type(request).FromString(body)
                changed += body != before
            assert request.SerializeToString(deterministic=True) == before
    assert changed > 300


def test_some_mutated_bytes_do_not_parse() -> None:
    mutator, failed = Mutator(3), 0
    for _ in range(200):
        frame = mutator.random.choice(corpus.SPECULATE.frames)
        try:
            type(frame).FromString(mutator.mutate_bytes(frame.SerializeToString()))
        except DecodeError:
            failed += 1
    assert 20 < failed < 200


def test_a_row_counts_outcomes_and_takes_the_nearest_rank() -> None:
    outcomes = [Outcome.SAME, Outcome.SAME, Outcome.CHANGED, Outcome.LOST, Outcome.ERROR]
    records = [
        Record(str(at), 0.0, 1.0, pause_s=at, outcome=outcome, why="x" if at == 4 else "")
        for at, outcome in enumerate(outcomes)
    ]
    row = row_of("fault", 3, records)
    assert (row.lost, row.changed, row.errors, row.p99_pause_s) == (1, 1, 1, 4)
    assert not row.holds
    assert row.whys == {"x": 1}
    assert percentile(range(1, 201), 99) == 198
    assert percentile([], 99) == 0


def test_only_errors_of_the_services_own_count_when_logs_are_read(tmp_path: Path) -> None:
    lines = (
        '{"event": "step.failed", "level": "error"}',
        '{"event": "bad frame", "level": "warning", "why": "\\"error\\""}',
        "Traceback (most recent call last):",
        'not json with "error"',
    )
    (tmp_path / "verifier-0.log").write_text("\n".join(lines))
    assert error_events(tmp_path) == {"verifier-0: step.failed": 1, "verifier-0: traceback": 1}

"""What becomes of a request whose verifier sends what it should not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from treecast.errors import InvalidFrame
from treecast.sampling.logprobs import TokenLogprobs
from treecast.services.router.fleet import BREAKER_THRESHOLD
from treecast.wire.frames import Completed, FinishReason, Progress

from ..scripted_verifier import ScriptedVerifier, output_of
from .rig import HELLO, RouterClient


async def skip(link: Any, start: Any) -> None:
    """Begin at the second token."""
    link.send(Progress(start.handle, 1, (97,)))


async def test_request_fails_alone_when_its_tokens_have_a_gap(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    good = await client.generate().read_tokens(1)

    verifier.run = skip
    with pytest.raises(InvalidFrame, match=r"^progress begins at token 1; 0 tokens came before$"):
        await client.generate().read_all()
    await verifier.until(lambda: bool(verifier.cancelled))
    assert verifier.cancelled == [verifier.started[1].handle]
    verifier.allow(10)
    assert (await good.read_all()).tokens() == output_of(HELLO, 5)


async def test_verifier_gets_a_rest_when_its_tokens_never_fit(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.run = skip
    for _ in range(BREAKER_THRESHOLD):
        assert not client.router.fleet.verifiers[0].breaker.tripped
        with pytest.raises(InvalidFrame, match="progress begins at token 1"):
            await client.generate().read_all()
    assert client.router.fleet.verifiers[0].breaker.tripped


async def test_request_fails_when_its_end_comes_together_with_tokens_that_do_not_fit(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    async def skip_and_end(link: Any, start: Any) -> None:
        await skip(link, start)
        link.send(Completed(start.handle, FinishReason.LENGTH))

    verifier.run = skip_and_end
    with pytest.raises(InvalidFrame, match="progress begins at token 1"):
        await client.generate().read_all()


async def test_request_fails_alone_when_a_frame_of_its_is_malformed(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    async def unknown_token(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, (258,)))

    verifier.run = unknown_token
    with pytest.raises(InvalidFrame, match=r"^token 0 of progress is 258; the vocabulary has 258$"):
        await client.generate().read_all()
    await verifier.until(lambda: bool(verifier.cancelled))
    assert verifier.cancelled == [verifier.started[0].handle]
    assert client.metric("verifier_streams") == 1


async def test_repeated_tokens_are_dropped_when_they_are_the_same(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    tokens = tuple(output_of(HELLO, 5))

    def progress(start: Any, low: int, high: int) -> Progress:
        logprobs = tuple(TokenLogprobs(-float(index)) for index in range(low, high))
        return Progress(start.handle, low, tokens[low:high], logprobs)

    async def repeat(link: Any, start: Any) -> None:
        link.send(progress(start, 0, 3))
        await resumed.wait()
        link.send(progress(start, 1, 2))
        await resumed.wait()
        link.send(progress(start, 1, 5))
        link.send(Completed(start.handle, FinishReason.LENGTH))

    resumed, verifier.run = asyncio.Event(), repeat
    reply = await client.generate(sampling={"logprobs": 0}).read_tokens(3)
    resumed.set()
    assert (await reply.read_all()).tokens() == list(tokens)
    logprobs = [one.chosen for delta in reply.of("delta") for one in delta.logprobs]
    assert logprobs == [0, -1, -2, -3, -4]


async def test_request_fails_when_repeated_tokens_differ(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    async def change(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, (97, 98)))
        await resumed.wait()
        link.send(Progress(start.handle, 1, (99, 100)))

    resumed, verifier.run = asyncio.Event(), change
    reply = await client.generate().read_tokens(2)
    resumed.set()
    with pytest.raises(
        InvalidFrame, match=r"^progress repeats tokens from 1 on, and changes them$"
    ):
        await reply.read_all()
    assert reply.tokens() == [97, 98]

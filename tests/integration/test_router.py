"""The router through its real port, over verifiers that follow a script on theirs."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from treecast.errors import (
    Cancelled,
    DeadlineExceeded,
    DuplicateRequest,
    HandedOver,
    InvalidFrame,
    InvalidRequest,
    NotServed,
    Overloaded,
    PromptTooLong,
    StaleLease,
    TreecastError,
    Unavailable,
)
from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.noise import noise_key
from treecast.sampling.params import Law, Proposal, SpeculationParams
from treecast.services.router.__main__ import main
from treecast.services.router.dispatch import Dispatcher
from treecast.services.router.metrics import RouterMetrics
from treecast.services.router.placement import Wanted
from treecast.services.router.queue import Share
from treecast.services.router.router import Router
from treecast.services.router.settings import RouterSettings
from treecast.v1 import router_pb2 as pb
from treecast.v1 import router_pb2_grpc, sampling_pb2
from treecast.v1 import verifier_pb2 as verifier_pb
from treecast.wire.channel import open_channel
from treecast.wire.frames import (
    Completed,
    Cost,
    FinishReason,
    Heartbeat,
    Progress,
    Role,
    Usage,
)
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.registry import Entry, Registration
from treecast.wire.status import from_rpc_error

from ..byte_tokenizer import BOS, TEMPLATE
from ..conftest import LocalRedis
from .scripted_verifier import FOREVER, ScriptedVerifier, output_of, text_of

FULL = r"^queue has 2 requests, 2 of them of tenant 'default'; the limit is 2$"
HELLO = (BOS, *b"hello")
ROUTERS = itertools.count(1)
LAW_MSS = sampling_pb2.LAW_MSS
PROPOSAL_COUPLED = sampling_pb2.PROPOSAL_COUPLED
PROPOSAL_TOPK = sampling_pb2.PROPOSAL_TOPK


@dataclass
class Reply:
    """A `Generate` stream as a client sees it."""

    call: Any
    events: list[pb.GenerateResponse] = field(default_factory=list)

    async def read(self, done: Callable[[Self], bool]) -> Self:
        """Read on until `done`; a stream that ends before fails the test."""
        async with asyncio.timeout(10):
            while not done(self):
                event = await self.call.read()
                assert event is not grpc.aio.EOF, f"ended after {self.events}"
                self.events.append(event)
        return self

    async def read_tokens(self, count: int) -> Self:
        return await self.read(lambda reply: len(reply.tokens()) >= count)

    async def read_all(self) -> Self:
        """To the end. Raises the error that the stream ended with, translated."""
        async with asyncio.timeout(10):
            try:
                while (event := await self.call.read()) is not grpc.aio.EOF:
                    self.events.append(event)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None
        return self

    def of(self, kind: str, sample: int = 0) -> list[Any]:
        return [
            getattr(event, kind)
            for event in self.events
            if event.WhichOneof("event") == kind and event.sample_index == sample
        ]

    def tokens(self, sample: int = 0) -> list[int]:
        return [token for delta in self.of("delta", sample) for token in delta.token_ids]

    def text(self, sample: int = 0) -> str:
        return "".join(delta.text for delta in self.of("delta", sample))

    @property
    def finished(self) -> pb.Finished:
        [finished] = self.of("finished")
        return finished


class RouterClient:
    """A client of one router."""

    def __init__(self, router: Router, channel: grpc.aio.Channel) -> None:
        self.router = router
        self.stub: Any = router_pb2_grpc.RouterServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    def generate(self, timeout: float | None = None, **request: Any) -> Reply:
        """A request for 5 greedy tokens after "hello", unless it says otherwise."""
        prompts = {"text", "chat", "tokens"}
        base: dict[str, Any] = {} if prompts & request.keys() else {"text": "hello"}
        base["sampling"] = {"temperature": 0, "max_tokens": 5} | request.pop("sampling", {})
        return Reply(self.stub.Generate(pb.GenerateRequest(**base, **request), timeout=timeout))

    async def streams(self, count: int) -> None:
        """Wait until the router has that many verifiers."""
        fleet = self.router.fleet
        assert await fleet.until(lambda: len(fleet.candidates()) == count or None, 10)

    async def queued(self, count: int) -> None:
        async with asyncio.timeout(10):
            # Nothing tells who joins the queue, so it is looked at.
            while self.router.service.num_waiting != count:
                await asyncio.sleep(0.001)

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.router.metrics.registry, name, **labels)


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """Sum of the samples that have these labels, whatever others they have."""
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"treecast_router_{name}" and labels.items() <= sample.labels.items()
    )


@asynccontextmanager
async def routing(
    verifiers: Sequence[ScriptedVerifier] = (), redis_url: str | None = None, **settings: Any
) -> AsyncIterator[RouterClient]:
    """A router over some verifiers, with the streams to them open."""
    settings = {
        "verifiers": tuple(verifier.address for verifier in verifiers),
        "redis_url": redis_url,
        "verifier_grace_s": 10.0,
        "metrics_listen": None,
    } | settings
    async with (
        Router(RouterSettings(**settings), f"router-{next(ROUTERS)}") as router,
        open_channel(router.address) as channel,
    ):
        client = RouterClient(router, channel)
        await client.streams(len(verifiers))
        yield client


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts verifiers that end with the test."""
    async with AsyncExitStack() as stack:

        async def start(name: str = "v1", **options: Any) -> ScriptedVerifier:
            return await stack.enter_async_context(ScriptedVerifier(name, **options))

        yield start


@pytest.fixture
async def verifier(start: Callable[..., Any]) -> ScriptedVerifier:
    return await start()


@pytest.fixture
async def client(verifier: ScriptedVerifier) -> AsyncIterator[RouterClient]:
    async with routing([verifier]) as client:
        yield client


# --- a request --------------------------------------------------------------------------------


async def test_events_come_in_order_and_tokens_as_text(client: RouterClient) -> None:
    reply = await client.generate(request_id="r", sampling={"seed": 7}).read_all()
    kinds = [event.WhichOneof("event") for event in reply.events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    assert reply.of("started") == [
        pb.Started(
            request_id="r",
            seed=7,
            prompt_ids=HELLO,
            model="bytes",
            model_revision="r1",
            numerics_fingerprint="f1",
        )
    ]
    assert reply.tokens() == output_of(HELLO, 5)
    assert reply.text() == text_of(HELLO, 5)
    assert reply.finished == pb.Finished(
        reason=verifier_pb.FINISH_REASON_LENGTH,
        usage=verifier_pb.Usage(prompt_tokens=6, output_tokens=5, steps=5),
        placements=1,
        same_numerics=True,
    )


async def test_tokens_come_as_they_are_made(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 0
    reply = client.generate()
    for count in range(1, 5):
        verifier.allow(1)
        await reply.read_tokens(count)
        assert reply.tokens() == output_of(HELLO, count)
        assert reply.text() == text_of(HELLO, count)
    verifier.allow(1)
    assert (await reply.read_all()).text() == text_of(HELLO, 5)


async def test_start_says_all_that_the_client_said(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    sampling = {
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": 3,
        "seed": 7,
        "stop": ["zz"],
        "logprobs": 2,
        "logit_bias": {5: 1.5},
    }
    reply = await client.generate(
        request_id="r",
        sampling=sampling,
        max_nodes=0,
        truncate_prompt=True,
        tokens={"ids": [1, 2]},
        proposal=PROPOSAL_TOPK,
        growth="<1,1,3>",
    ).read_all()
    [start] = verifier.started
    assert (start.request_id, start.prompt, start.committed) == ("r", (1, 2), ())
    assert start.session is None
    assert start.deadline_ms is None
    assert start.speculation == SpeculationParams(Law.REPLAY, Proposal.TOPK, "<1,1,3>", max_nodes=0)
    assert start.truncate_prompt
    assert start.noise_key == noise_key(7, 0)
    assert (start.sampling.temperature, start.sampling.top_p) == (0.8, 0.95)
    assert (start.sampling.stop, start.sampling.logit_bias) == (("zz",), {5: 1.5})
    assert [one.chosen for delta in reply.of("delta") for one in delta.logprobs] == [-0.5] * 3


async def test_seed_is_drawn_when_none_is_given(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    replies = [await client.generate().read_all() for _ in range(2)]
    seeds = [reply.of("started")[0].seed for reply in replies]
    assert seeds[0] != seeds[1]
    assert [start.noise_key for start in verifier.started] == [noise_key(seed) for seed in seeds]
    assert [start.sampling.seed for start in verifier.started] == seeds


async def test_chat_goes_through_the_models_template(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    await client.generate(chat=chat).read_all()
    assert verifier.started[0].prompt == (BOS, *b"u:hi;a:")


async def test_tokenizer_is_fetched_when_it_is_larger_than_other_messages(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.files.chat_template = "{# " + "x" * 5_000_000 + " #}" + TEMPLATE
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    await client.generate(chat=chat).read_all()
    assert verifier.started[0].prompt == (BOS, *b"u:hi;a:")


async def test_tokenizer_comes_from_another_verifier_when_the_first_hangs_up(
    start: Callable[..., Any],
) -> None:
    one = await start("v1")
    one.answers.clear()
    async with routing([one]) as client:
        reply = client.generate()
        await one.asked.wait()
        two = await start("v2")
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        one.hang_up()
        assert (await reply.read_all()).tokens() == output_of(HELLO, 5)


async def test_stop_string_is_cut_and_text_before_it_kept(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    letters = text_of(HELLO, 5)

    async def stop_at_the_fourth(link: Any, start: Any) -> None:
        for index, token in enumerate(output_of(HELLO, 4)):
            link.send(Progress(start.handle, index, (token,)))
        link.send(Completed(start.handle, FinishReason.STOP_STRING, stop_characters=2))

    verifier.run = stop_at_the_fourth
    reply = await client.generate(sampling={"stop": [letters[2:4]]}).read_all()
    assert reply.text() == letters[:2]
    assert reply.tokens() == output_of(HELLO, 4)
    assert reply.finished.reason == verifier_pb.FINISH_REASON_STOP_STRING


async def test_text_that_might_have_been_a_stop_string_comes_with_the_end(
    client: RouterClient,
) -> None:
    letters = text_of(HELLO, 5)
    reply = await client.generate(sampling={"stop": [letters[-2:] + "~"]}).read_all()
    assert reply.text() == letters
    assert reply.of("delta")[-1] == pb.Delta(text=letters[-2:])


async def test_samples_share_a_session_and_have_noise_of_their_own(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    reply = await client.generate(
        request_id="r", num_samples=3, sampling={"seed": 7, "max_tokens": 2}
    ).read_all()
    assert [start.noise_key for start in verifier.started] == [noise_key(7, i) for i in range(3)]
    [key] = {start.session for start in verifier.started}
    assert (key.tenant, key.session_id) == ("samples/default", "r")
    for index in range(3):
        kinds = [e.WhichOneof("event") for e in reply.events if e.sample_index == index]
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert reply.tokens(index) == output_of(HELLO, 2)
    await verifier.until(lambda: bool(verifier.forgotten))
    assert [forget.session for forget in verifier.forgotten] == [key]


async def test_output_is_tokens_alone_when_the_model_has_no_tokenizer(
    start: Callable[..., Any],
) -> None:
    toy = await start(model="toy")
    toy.files = verifier_pb.GetTokenizerResponse()
    async with routing([toy]) as client:
        reply = await client.generate(tokens={"ids": [1, 2]}).read_all()
        assert reply.tokens() == output_of([1, 2], 5)
        assert reply.text() == ""
        with pytest.raises(
            InvalidRequest, match=r"^model 'toy' has no tokenizer; send the prompt as token ids$"
        ):
            await client.generate(text="hello").read_all()
        with pytest.raises(
            InvalidRequest, match=r"^model 'toy' has no tokenizer; stop strings need one$"
        ):
            await client.generate(tokens={"ids": [1]}, sampling={"stop": ["x"]}).read_all()
        assert len(toy.started) == 1


# --- bad input --------------------------------------------------------------------------------

TOO_LONG = "x" * 512  # and the token that begins every text


@pytest.mark.parametrize(
    ("request_fields", "kind", "message"),
    [
        ({"text": ""}, InvalidRequest, "prompt is empty"),
        ({"tokens": {}}, InvalidRequest, "prompt is empty"),
        ({"chat": {}}, InvalidRequest, "prompt is empty"),
        (
            {"chat": {"messages": [{"role": "robot", "content": "x"}]}},
            InvalidRequest,
            "role is 'robot'; allowed: system, user, assistant",
        ),
        (
            {"tokens": {"ids": [1, 258]}},
            InvalidRequest,
            "token id 258 is unknown; the vocabulary has 258",
        ),
        (
            {"resume": {"committed": [300], "model_revision": "r1"}},
            InvalidRequest,
            "token id 300 is unknown; the vocabulary has 258",
        ),
        ({"text": TOO_LONG}, PromptTooLong, "prompt has 513 tokens; the limit is 512"),
        (
            {"request_id": "x" * 129},
            InvalidRequest,
            "request_id has 129 characters; allowed: 1..128",
        ),
        ({"request_id": ""}, InvalidRequest, "request_id has 0 characters; allowed: 1..128"),
        (
            {"session_id": "x" * 129},
            InvalidRequest,
            "session_id has 129 characters; allowed: 1..128",
        ),
        ({"priority": 11}, InvalidRequest, "priority is 11; allowed: -10..10"),
        ({"priority": -11}, InvalidRequest, "priority is -11; allowed: -10..10"),
        ({"num_samples": 0}, InvalidRequest, "num_samples is 0; allowed: 1..16"),
        ({"num_samples": 17}, InvalidRequest, "num_samples is 17; allowed: 1..16"),
        (
            {"sampling": {"temperature": float("nan")}},
            InvalidRequest,
            "temperature is nan; allowed: finite",
        ),
        ({"sampling": {"top_p": 0}}, InvalidRequest, "top_p is 0.0; allowed: (0, 1]"),
        ({"sampling": {"max_tokens": 0}}, InvalidRequest, "max_tokens is 0; allowed: 1 or more"),
        (
            {"sampling": {"stop_token_ids": [258]}},
            InvalidRequest,
            "token id in stop_token_ids is 258; allowed: below the vocabulary size 258",
        ),
        ({"law": 9}, InvalidRequest, "law is 9; known: 1 (replay), 2 (mss)"),
        (
            {"law": LAW_MSS, "proposal": PROPOSAL_COUPLED},
            InvalidRequest,
            "proposal under law mss is coupled; allowed: without_replacement, iid",
        ),
        (
            {"growth": "9" * 257},
            InvalidRequest,
            "number of characters in growth is 257; allowed: at most 256",
        ),
        (
            {"growth": "wide"},
            InvalidRequest,
            "growth is 'wide'; it must be best-first, dp, dp:NODES or "
            "dp:NODES:FIXED_MS,ROW_MS,PASS_MS, or widths by level such as <1,1,3>",
        ),
        (
            {"law": LAW_MSS, "growth": "best-first"},
            InvalidRequest,
            "growth under law mss is 'best-first'; allowed: widths by level such as <3,2,1,1>",
        ),
        (
            {"law": LAW_MSS},
            NotServed,
            "law mss is not served by model 'bytes'; served: replay",
        ),
        ({"model": "other"}, NotServed, "model 'other' is not served; served: bytes"),
        (
            {"resume": {"committed": [97], "model_revision": "r0"}},
            NotServed,
            "revision 'r0' of model 'bytes' is not served any more; served: r1",
        ),
        (
            {"resume": {"committed": [97]}, "num_samples": 2},
            InvalidRequest,
            "num_samples is 2; a resumed request has 1",
        ),
        (
            {"resume": {"committed": [97]}, "sampling": {"temperature": 1}},
            InvalidRequest,
            "resume needs sampling.seed, as the first stream's Started gave it",
        ),
        (
            {"resume": {"committed": [97] * 6}},
            InvalidRequest,
            "resume has 6 committed tokens; max_tokens is 5",
        ),
    ],
)
async def test_request_is_refused_by_name_and_value_when_it_is_out_of_bounds(
    verifier: ScriptedVerifier,
    client: RouterClient,
    request_fields: dict[str, Any],
    kind: type[TreecastError],
    message: str,
) -> None:
    with pytest.raises(TreecastError) as refusal:
        await client.generate(**request_fields).read_all()
    assert (type(refusal.value), refusal.value.message) == (kind, message)
    assert verifier.started == []
    assert client.metric("requests_total", outcome=kind.reason.lower()) == 1


async def test_long_prompt_is_passed_on_when_it_may_be_truncated(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    await client.generate(text=TOO_LONG, truncate_prompt=True).read_all()
    assert len(verifier.started[0].prompt) == 512  # its end; the verifier makes room for output


async def test_second_request_is_refused_when_its_id_is_running(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    first = await client.generate(request_id="r").read_tokens(1)
    with pytest.raises(DuplicateRequest, match=r"^request 'r' is running$"):
        await client.generate(request_id="r").read_all()
    verifier.allow(4)
    assert (await first.read_all()).tokens() == output_of(HELLO, 5)
    verifier.allow(5)
    await client.generate(request_id="r").read_all()


async def test_verifiers_refusal_reaches_the_client_as_it_is(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.refusal = Overloaded("pool has 3 free pages; 5 are needed", retry_after_s=2.5)
    with pytest.raises(Overloaded, match=r"^pool has 3 free pages; 5 are needed$") as refusal:
        await client.generate().read_all()
    assert refusal.value.retry_after_s == 2.5


# --- who ends a request -----------------------------------------------------------------------


async def test_verifier_is_told_at_once_when_the_client_is_gone(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 2
    reply = await client.generate().read_tokens(2)
    reply.call.cancel()
    await verifier.until(lambda: bool(verifier.cancelled))
    assert verifier.cancelled == [verifier.started[0].handle]
    verifier.allow(5)
    assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
    assert client.metric("requests_total", outcome="client_gone") == 1
    assert client.metric("running_requests") == 0


async def test_verifier_is_told_when_a_request_is_aborted(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    reply = await client.generate(request_id="r").read_tokens(1)
    assert (await client.stub.Abort(pb.AbortRequest(request_id="r"))).aborted
    with pytest.raises(Cancelled, match=r"^request 'r' was aborted$"):
        await reply.read_all()
    await verifier.until(lambda: bool(verifier.cancelled))
    assert verifier.cancelled == [verifier.started[0].handle]
    assert not (await client.stub.Abort(pb.AbortRequest(request_id="r"))).aborted


async def test_request_leaves_the_queue_when_it_is_aborted(start: Callable[..., Any]) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier]) as client:
        first = await client.generate().read_tokens(1)
        waiting = client.generate(request_id="r")
        await client.queued(1)
        assert (await client.stub.Abort(pb.AbortRequest(request_id="r"))).aborted
        with pytest.raises(Cancelled, match=r"^request 'r' was aborted$"):
            await waiting.read_all()
        await client.queued(0)
        verifier.allow(4)
        await first.read_all()
        assert len(verifier.started) == 1


async def test_many_samples_get_their_room_when_single_requests_keep_coming(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=2, budget=1)
    async with routing([verifier]) as client:
        first = await client.generate(request_id="first").read_tokens(1)
        samples = client.generate(request_id="samples", num_samples=2)
        await client.queued(1)
        late = client.generate(request_id="late")
        await client.queued(2)  # though there is a place for it
        verifier.allow(64)
        await asyncio.gather(first.read_all(), samples.read_all(), late.read_all())
    order = [one.request_id.partition("/")[0] for one in verifier.started]
    assert order == ["first", "samples", "samples", "late"]


async def test_all_samples_are_cancelled_when_one_fails(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 0
    reply = client.generate(num_samples=3)
    await verifier.until(lambda: len(verifier.started) == 3)
    handles = [start.handle for start in verifier.started]
    verifier.fail(handles[1], InvalidRequest("no"))
    with pytest.raises(InvalidRequest, match=r"^no$"):
        await reply.read_all()
    await verifier.until(lambda: len(verifier.cancelled) == 2)
    assert sorted(verifier.cancelled) == [handles[0], handles[2]]


async def test_verifier_learns_how_much_time_is_left(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    await client.generate(timeout=60).read_all()
    left_ms = verifier.started[0].deadline_ms
    assert left_ms is not None
    assert 30_000 < left_ms < 60_000


async def test_request_ends_in_the_queue_when_its_deadline_passes(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier], deadline_margin_s=0.7) as client:
        first = await client.generate().read_tokens(1)
        with pytest.raises(
            DeadlineExceeded, match=r"^deadline passed while the request waited for a verifier$"
        ):
            await client.generate(timeout=1.0).read_all()
        assert client.metric("queue_requests") == 0
        verifier.allow(4)
        await first.read_all()
        assert len(verifier.started) == 1


async def test_request_ends_when_its_deadline_passes_before_any_verifier_is_there() -> None:
    async with routing(deadline_margin_s=0.7) as client:
        with pytest.raises(
            DeadlineExceeded, match=r"^deadline passed while the request waited for a verifier$"
        ):
            await client.generate(timeout=1.0).read_all()


# --- queue ------------------------------------------------------------------------------------


async def test_requests_wait_and_go_by_priority_when_verifiers_are_full(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier]) as client:
        replies = [await client.generate(request_id="first").read_tokens(1)]
        for count, (name, priority) in enumerate([("low", -1), ("plain", 0), ("high", 5)], 1):
            replies.append(client.generate(request_id=name, priority=priority))
            await client.queued(count)
        status = await client.stub.GetStatus(pb.GetStatusRequest())
        assert (status.queued, status.running) == (3, 1)
        verifier.allow(100)
        for reply in replies:
            assert (await reply.read_all()).tokens() == output_of(HELLO, 5)
        order = [start.request_id for start in verifier.started]
        assert order == ["first", "high", "plain", "low"]
        waited = {
            p: client.metric("queue_wait_seconds_count", priority=p) for p in ("-1", "0", "5")
        }
        assert waited == {"-1": 1, "0": 2, "5": 1}


async def test_verifier_is_told_how_long_the_output_may_be(start: Callable[..., Any]) -> None:
    """By what the last one to the same prompt came to, and the metrics say how far off it was."""
    verifier = await start()
    async with routing([verifier]) as client:
        for max_tokens in (5, 7):
            await client.generate(sampling={"max_tokens": max_tokens}).read_all()
        assert [start.expected_tokens for start in verifier.started] == [5, 5]
        for source in ("limit", "typical"):
            assert client.metric("length_guesses_total", source=source) == 1
        assert client.metric("length_error_doublings_sum", source="limit") == 0
        off = client.metric("length_error_doublings_sum", source="typical")
        assert off == pytest.approx(math.log2(7 / 5))


async def test_verifier_is_told_nothing_when_nobody_guesses(start: Callable[..., Any]) -> None:
    verifier = await start()
    async with routing([verifier], length_predictor="none") as client:
        await client.generate().read_all()
        assert [start.expected_tokens for start in verifier.started] == [None]


async def test_guess_grows_when_a_verifier_is_lost_after_more_tokens(
    start: Callable[..., Any],
) -> None:
    one, two = await start("v1"), await start("v2")
    async with routing([one, two]) as client:
        await client.generate(sampling={"max_tokens": 4}).read_all()
        one.started.clear(), two.started.clear()
        one.budget = two.budget = 6
        reply = await client.generate(sampling={"max_tokens": 20}).read_tokens(6)
        lost, other = (one, two) if one.started else (two, one)
        await lost.kill()
        other.allow(100)
        await reply.read_all()
        assert lost.started[-1].expected_tokens == 4
        assert other.started[-1].expected_tokens == 12


async def test_shorter_requests_go_first_when_the_queue_is_told_to(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1, budget=1)
    settings = {"queue_order": "shortest", "length_predictor": "max-tokens"}
    async with routing([verifier], queue_give_way_s=100, **settings) as client:
        replies = [await client.generate(request_id="first").read_tokens(1)]
        for name, length in (("long", 30), ("short", 2), ("middle", 9)):
            replies.append(client.generate(request_id=name, sampling={"max_tokens": length}))
            await client.queued(len(replies) - 1)
        verifier.allow(100)
        for reply in replies:
            await reply.read_all()
        order = [start.request_id for start in verifier.started]
        assert order == ["first", "short", "middle", "long"]


async def test_place_is_given_back_when_its_request_is_cancelled_as_it_comes(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1)
    async with routing([verifier]) as client:
        fleet = client.router.fleet
        dispatcher = Dispatcher(fleet, 10, 10.0, RouterMetrics())
        wanted = Wanted("bytes", "r1", "r")
        [seat] = await dispatcher.admit(wanted, Share("t"), None)
        waiting = asyncio.create_task(dispatcher.admit(wanted, Share("t"), None))
        await asyncio.sleep(0)
        assert dispatcher.num_waiting == 1
        seat.leave()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [candidate.free for candidate in fleet.candidates()] == [1]


async def test_request_is_refused_when_the_queue_is_full(start: Callable[..., Any]) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier], queue_limit=2) as client:
        replies = [await client.generate().read_tokens(1), client.generate(), client.generate()]
        await client.queued(2)
        with pytest.raises(Overloaded, match=FULL) as refusal:
            await client.generate().read_all()
        assert refusal.value.retry_after_s == 1.0
        verifier.allow(100)
        for reply in replies:
            await reply.read_all()


async def test_requests_go_to_the_least_loaded_verifier(start: Callable[..., Any]) -> None:
    one, two = await start("v1", budget=0), await start("v2", budget=0)
    async with routing([one, two]) as client:
        replies = []
        for _ in range(4):
            replies.append(client.generate())
            await replies[-1].read(lambda reply: bool(reply.of("started")))
        for verifier in (one, two):  # clients are told of a placement before the verifier is
            await verifier.until(lambda verifier=verifier: len(verifier.started) == 2)
        assert client.metric("placements_total", by="load") == 4
        one.allow(100)
        two.allow(100)
        for reply in replies:
            await reply.read_all()


# --- loss of a verifier -----------------------------------------------------------------------


async def test_stream_goes_on_unchanged_when_its_verifier_is_lost(
    start: Callable[..., Any],
) -> None:
    one, two = await start("v1", budget=3), await start("v2", budget=3)
    async with routing([one, two]) as client:
        reply = await client.generate(sampling={"max_tokens": 8, "seed": 7}).read_tokens(3)
        first, second = (one, two) if one.started else (two, one)
        await first.kill()
        await reply.read_tokens(6)
        assert second.started[0].committed == tuple(output_of(HELLO, 3))
        second.allow(100)
        await reply.read_all()
        assert reply.tokens() == output_of(HELLO, 8)
        assert reply.text() == text_of(HELLO, 8)
        assert len(reply.of("started")) == 1
        assert (reply.finished.placements, reply.finished.same_numerics) == (2, True)
        before, after = first.started[0], second.started[0]
        assert after == replace(before, handle=after.handle, committed=after.committed)
        assert after.handle != before.handle
        assert client.metric("replacements_total", why="lost") == 1


async def test_usage_adds_up_over_placements_when_a_verifier_is_lost(
    start: Callable[..., Any],
) -> None:
    async def three_in_two_steps(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, (97,), cost=Cost(1, 5, 0)))
        link.send(Progress(start.handle, 1, (98, 99), cost=Cost(1, 7, 1)))

    async def the_rest(link: Any, start: Any) -> None:
        usage = Usage(6, 4, 5, steps=1, drafted=3, accepted=1)
        link.send(Progress(start.handle, 3, (100, 101), cost=Cost(1, 3, 1)))
        link.send(Completed(start.handle, FinishReason.LENGTH, usage))

    one = await start("v1")
    one.run = three_in_two_steps
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(3)
        two = await start("v2")
        two.run = the_rest
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        await one.kill()
        await reply.read_all()
    assert reply.finished.usage == verifier_pb.Usage(
        prompt_tokens=6, cached_tokens=4, output_tokens=5, steps=3, drafted=15, accepted=2
    )


async def test_text_is_seamless_when_a_verifier_is_lost_within_a_character(
    start: Callable[..., Any],
) -> None:
    euro = "€".encode()

    async def two_bytes(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, tuple(euro[:2])))

    async def the_third(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 2, (euro[2],)))
        link.send(Completed(start.handle, FinishReason.LENGTH))

    one = await start("v1")
    one.run = two_bytes
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        assert reply.text() == ""
        two = await start("v2")
        two.run = the_third
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        await one.kill()
        assert (await reply.read_all()).text() == "€"


def entries(*verifiers: ScriptedVerifier) -> tuple[Entry, ...]:
    return tuple(Entry(verifier.address) for verifier in verifiers)


async def test_request_waits_for_a_new_verifier_when_the_only_one_is_lost(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        await one.kill()
        await client.queued(1)
        two = await start("v2")
        client.router.fleet.follow(entries(two))
        assert (await reply.read_all()).tokens() == output_of(HELLO, 5)


async def test_request_goes_back_to_its_verifier_when_that_has_returned(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        one.allow(FOREVER)
        one.hang_up()
        finished = (await reply.read_all()).finished
    assert reply.tokens() == output_of(HELLO, 5)
    assert finished.placements == 2


async def test_request_goes_first_and_is_not_refused_when_it_lost_its_verifier(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", capacity=1, budget=2)
    async with routing([one], queue_limit=1) as client:
        lost = await client.generate(request_id="lost").read_tokens(2)
        waiting = client.generate(request_id="waiting", priority=10)
        await client.queued(1)
        await one.kill()
        await client.queued(2)
        two = await start("v2", capacity=1)
        client.router.fleet.follow(entries(two))
        assert (await lost.read_all()).tokens() == output_of(HELLO, 5)
        await waiting.read_all()
        assert [start.request_id for start in two.started] == ["lost", "waiting"]


async def test_every_request_ends_unavailable_when_all_verifiers_are_lost(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one], verifier_grace_s=0.2) as client:
        reply = await client.generate().read_tokens(2)
        await one.kill()
        for each in (reply, client.generate(), client.generate(model="bytes")):
            with pytest.raises(Unavailable, match=r"; waited 0\.2 s$") as refusal:
                await each.read_all()
            assert refusal.value.retry_after_s == 1.0
        assert client.metric("running_requests") == 0


async def test_result_says_so_when_the_stream_went_on_with_other_numerics(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        two = await start("v2", fingerprint="f2")
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        await one.kill()
        await reply.read_all()
        assert reply.tokens() == output_of(HELLO, 5)
        assert (reply.finished.placements, reply.finished.same_numerics) == (2, False)


async def test_stream_goes_on_with_equal_numerics_when_they_can_be_had(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        idle, busy = await start("v2", fingerprint="f2"), await start("v3")
        busy.state = Heartbeat(running=5)
        client.router.fleet.follow(entries(one, idle, busy))
        await client.streams(3)
        await one.kill()
        assert (await reply.read_all()).tokens() == output_of(HELLO, 5)
        assert (len(idle.started), len(busy.started)) == (0, 1)
        assert reply.finished.same_numerics


async def test_request_moves_when_its_verifier_hands_it_over(start: Callable[..., Any]) -> None:
    one, two = await start("v1"), await start("v2")

    async def hand_over(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, tuple(output_of(HELLO, 2))))
        verifiers[0].fail(start.handle, HandedOver("draining"))

    async with routing([one, two]) as client:
        verifiers = [one, two]
        first = await client.generate(request_id="r").read_all()
        if not one.started:
            verifiers.reverse()
        verifiers[0].run = hand_over
        reply = await client.generate(request_id="r").read_all()
        assert reply.tokens() == first.tokens() == output_of(HELLO, 5)
        assert reply.finished.placements == 2
        assert client.metric("replacements_total", why="handed_over") == 1


async def test_request_fails_when_it_has_cost_too_many_verifiers(
    start: Callable[..., Any],
) -> None:
    verifiers = [await start(f"v{number}") for number in range(3)]
    for each in verifiers:
        each.refusal = Unavailable("dying")
    async with routing(verifiers, max_placements=2) as client:
        with pytest.raises(Unavailable, match=r"^request lost 2 verifiers; the limit is 2$"):
            await client.generate().read_all()


async def test_request_fails_alone_when_its_tokens_have_a_gap(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    good = await client.generate().read_tokens(1)

    async def skip(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 1, (97,)))

    verifier.run = skip
    with pytest.raises(InvalidFrame, match=r"^progress begins at token 1; 0 tokens came before$"):
        await client.generate().read_all()
    await verifier.until(lambda: bool(verifier.cancelled))
    assert verifier.cancelled == [verifier.started[1].handle]
    verifier.allow(10)
    assert (await good.read_all()).tokens() == output_of(HELLO, 5)


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


async def test_draining_verifier_gets_nothing_new_and_finishes_what_it_has(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=1)
    async with routing([one]) as client:
        running = await client.generate().read_tokens(1)
        one.state = Heartbeat(draining=True)
        fleet = client.router.fleet
        assert await fleet.until(lambda: not fleet.open_hellos() or None, 10)
        two = await start("v2")
        client.router.fleet.follow(entries(one, two))
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
        one.allow(10)
        await running.read_all()
        assert (len(one.started), len(two.started)) == (1, 1)
        assert running.finished.placements == 1


async def test_one_stream_is_kept_when_a_verifier_is_listed_by_two_names(
    verifier: ScriptedVerifier,
) -> None:
    port = verifier.address.rpartition(":")[2]
    async with routing([verifier]) as client:
        client.router.fleet.follow((*entries(verifier), Entry(f"localhost:{port}")))
        fleet = client.router.fleet
        assert await fleet.until(
            lambda: [one.address for one in fleet.verifiers] == [f"localhost:{port}"] or None, 10
        )
        await client.streams(1)
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
        await verifier.kill()
        await client.streams(0)
        assert {one.address for one in fleet.verifiers} == {verifier.address, f"localhost:{port}"}


async def test_verifier_is_kept_while_it_answers_when_it_is_not_listed_any_more(
    start: Callable[..., Any],
) -> None:
    one = await start("v1")
    async with routing([one]) as client:
        fleet = client.router.fleet
        fleet.follow(())
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
        await one.kill()
        await client.streams(0)
        assert fleet.verifiers == []


async def test_address_is_given_up_when_it_is_not_listed_any_more_and_does_not_answer() -> None:
    async with routing() as client:
        fleet = client.router.fleet
        fleet.follow((Entry("127.0.0.1:1"),))
        assert [one.address for one in fleet.verifiers] == ["127.0.0.1:1"]
        fleet.follow(())
        assert fleet.verifiers == []


async def test_requests_that_the_heartbeat_counts_are_not_counted_again(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    verifier.state = Heartbeat(running=7)
    fleet = client.router.fleet
    reply = await client.generate().read_tokens(1)
    # Seven elsewhere and ours, as the verifier says from its next heartbeat on.
    verifier.state = Heartbeat(running=8)
    assert await fleet.until(lambda: fleet.candidates()[0].beat.running == 8 or None, 10)
    assert [candidate.load for candidate in fleet.candidates()] == [8]
    verifier.allow(10)
    await reply.read_all()


# --- resume -----------------------------------------------------------------------------------


async def test_resumed_stream_says_only_what_is_new(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    whole = output_of(HELLO, 5)
    reply = await client.generate(
        tokens={"ids": HELLO},
        resume={
            "committed": whole[:2],
            "model_revision": "r1",
            "numerics_fingerprint": "f1",
        },
    ).read_all()
    assert verifier.started[0].committed == tuple(whole[:2])
    assert reply.tokens() == whole[2:]
    assert reply.text() == text_of(HELLO, 5)[2:]
    assert reply.finished.same_numerics


async def test_resumed_text_is_seamless_when_it_was_cut_within_a_character(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    euro = "€".encode()

    async def the_third(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 2, (euro[2],)))
        link.send(Completed(start.handle, FinishReason.LENGTH))

    verifier.run = the_third
    reply = await client.generate(resume={"committed": euro[:2]}).read_all()
    assert reply.text() == "€"


async def test_resumed_result_says_so_when_numerics_have_changed(client: RouterClient) -> None:
    reply = await client.generate(
        resume={"committed": output_of(HELLO, 2), "numerics_fingerprint": "f0"}
    ).read_all()
    assert not reply.finished.same_numerics


# --- sessions ---------------------------------------------------------------------------------


async def test_second_turn_comes_to_the_same_verifier_through_another_router(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifiers = [await start(f"v{number}") for number in range(4)]
    async with routing(verifiers, empty_redis) as first, routing(verifiers, empty_redis) as second:
        for session in ("a", "b", "c"):
            for client in (first, second, first):
                await client.generate(session_id=session).read_all()
        homes = {
            session: {
                each.hello.instance_id
                for each in verifiers
                for start in each.started
                if start.session.session_id == session
            }
            for session in ("a", "b", "c")
        }
        assert {len(home) for home in homes.values()} == {1}
        keys = {start.session for each in verifiers for start in each.started}
        assert len(keys) == 3  # one epoch per session, since none moved
        assert first.metric("placements_total", by="affinity") == 3
        assert second.metric("placements_total", by="affinity") == 3
        assert first.router.redis_ok


async def test_epoch_grows_when_a_session_moves_after_a_loss(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifiers = [await start("v1", budget=2), await start("v2", budget=2)]
    async with routing(verifiers, empty_redis) as client:
        reply = await client.generate(session_id="s").read_tokens(2)
        first, second = verifiers if verifiers[0].started else verifiers[::-1]
        await first.kill()
        second.allow(100)
        await reply.read_all()
        await client.generate(session_id="s").read_all()
        before, after = first.started[0].session, second.started[0].session
        assert before is not None
        assert after is not None
        assert after.epoch > before.epoch
        assert second.started[1].session == after


async def test_request_claims_a_newer_epoch_when_its_own_is_stale(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifier = await start(capacity=1)
    plainly = verifier.run

    async def refuse_first(link: Any, start: Any) -> None:
        verifier.run = plainly
        verifier.fail(start.handle, StaleLease("session lease has epoch 1; 2 has been seen"))

    async with routing([verifier], empty_redis) as client:
        await client.generate(session_id="s").read_all()
        verifier.run = refuse_first
        reply = await client.generate(session_id="s").read_all()
        assert reply.tokens() == output_of(HELLO, 5)
        assert reply.finished.placements == 1
        epochs = [start.session.epoch for start in verifier.started if start.session]
        assert epochs[0] == epochs[1] < epochs[2]


async def test_stale_lease_is_told_when_claiming_again_does_not_help(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.refusal = StaleLease("session lease has epoch 1; 2 has been seen")
    with pytest.raises(StaleLease, match="has been seen"):
        await client.generate(session_id="s").read_all()
    assert len(verifier.started) == 4


async def test_session_is_forgotten_where_it_lived_when_it_is_closed(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifiers = [await start("v1"), await start("v2")]
    async with routing(verifiers, empty_redis) as client:
        await client.generate(session_id="s").read_all()
        [home] = [each for each in verifiers if each.started]
        closed = await client.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
        assert closed.closed
        await home.until(lambda: bool(home.forgotten))
        assert [forget.session for forget in home.forgotten] == [home.started[0].session]
        again = await client.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
        assert not again.closed


# --- without Redis ----------------------------------------------------------------------------


@pytest.mark.parametrize("url", [None, "redis://127.0.0.1:1"], ids=["none", "unreachable"])
async def test_sessions_are_placed_by_hash_when_there_is_no_redis(
    start: Callable[..., Any], url: str | None
) -> None:
    verifiers = [await start(f"v{number}") for number in range(3)]
    async with routing(verifiers, url) as first, routing(verifiers, url) as second:
        for client in (first, second, first):
            await client.generate(session_id="s").read_all()
        [home] = [each for each in verifiers if each.started]
        epochs = [start.session.epoch for start in home.started if start.session]
        assert epochs == sorted(epochs)
        assert first.metric("placements_total", by="rendezvous") == 2
        assert not first.router.redis_ok
        redis_up = first.router.metrics.registry.get_sample_value("treecast_redis_up")
        assert redis_up == (0 if url else None)
        status = await first.stub.GetStatus(pb.GetStatusRequest())
        assert not status.redis_ok
        closed = await first.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
        assert closed.closed
        for each in verifiers:
            await each.until(lambda each=each: len(each.forgotten) == 1)  # type: ignore[misc]
        assert home.forgotten[0].session.epoch >= epochs[-1]


async def test_requests_are_served_when_redis_dies(
    start: Callable[..., Any], own_redis: LocalRedis
) -> None:
    verifiers = [await start("v1"), await start("v2")]
    async with routing(verifiers, own_redis.url) as client:
        await client.generate(session_id="s").read_all()
        assert (await client.stub.GetStatus(pb.GetStatusRequest())).redis_ok
        own_redis.kill()
        for _ in range(3):
            reply = await client.generate(session_id="s").read_all()
            assert reply.tokens() == output_of(HELLO, 5)
        status = await client.stub.GetStatus(pb.GetStatusRequest())
        assert not status.redis_ok
        assert client.router.metrics.registry.get_sample_value("treecast_redis_up") == 0


async def test_verifiers_are_found_through_redis(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifier = await start()
    redis = GuardedRedis(empty_redis)
    async with (
        Registration(redis, Role.VERIFIER, verifier.address, "v1"),
        routing([], empty_redis) as client,
    ):
        await client.streams(1)
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
    await redis.close()


# --- what the router says of itself -----------------------------------------------------------


async def test_models_are_listed_with_their_verifiers(start: Callable[..., Any]) -> None:
    verifiers = [
        await start("v1"),
        await start("v2"),
        await start("v3", model="another", model_revision="r7", context_tokens=64),
    ]
    verifiers[2].files = verifier_pb.GetTokenizerResponse()
    async with routing(verifiers) as client:
        answer = await client.stub.ListModels(pb.ListModelsRequest())
        assert list(answer.models) == [
            pb.Model(name="another", revision="r7", vocab_size=258, context_tokens=64, verifiers=1),
            pb.Model(name="bytes", revision="r1", vocab_size=258, context_tokens=512, verifiers=2),
        ]
        with pytest.raises(
            InvalidRequest, match=r"^model is not set and 2 are served: another, bytes$"
        ):
            await client.generate().read_all()
        other = await client.generate(model="another", tokens={"ids": HELLO}).read_all()
        assert other.of("started")[0].model_revision == "r7"
        assert other.text() == ""
        reply = await client.generate(model="bytes").read_all()
        assert reply.text() == text_of(HELLO, 5)


async def test_status_names_every_verifier(start: Callable[..., Any]) -> None:
    verifier = await start()
    verifier.state = Heartbeat(running=2, waiting=1, kv_pages_free=30, kv_pages_total=32)
    async with routing([verifier]) as client:
        client.router.fleet.follow((*entries(verifier), Entry("127.0.0.1:1")))
        status = await client.stub.GetStatus(pb.GetStatusRequest())
        assert list(status.verifiers) == [
            pb.VerifierStatus(address="127.0.0.1:1"),
            pb.VerifierStatus(
                address=verifier.address,
                healthy=True,
                instance_id="v1",
                model="bytes",
                model_revision="r1",
                running=2,
                waiting=1,
                kv_pages_free=30,
                kv_pages_total=32,
                speculators=["s1", "s2"],
                numerics_fingerprint="f1",
            ),
        ]
        assert (status.queued, status.running) == (0, 0)


async def test_router_is_ready_from_its_first_verifier_until_it_drains(
    start: Callable[..., Any],
) -> None:
    one = await start()
    async with routing() as client, asyncio.timeout(10):
        watch = client.health.Watch(
            health_pb2.HealthCheckRequest(service="treecast.v1.RouterService")
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        client.router.fleet.follow(entries(one))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await one.kill()
        await client.streams(0)
        await client.router.drain()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_running_requests_finish_and_new_ones_are_refused_when_draining(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    running = await client.generate().read_tokens(1)
    draining = asyncio.create_task(client.router.drain())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match=r"^router is draining$"):
        await client.generate().read_all()
    assert not draining.done()
    verifier.allow(10)
    assert (await running.read_all()).tokens() == output_of(HELLO, 5)
    await draining


async def test_metrics_tell_what_was_served(client: RouterClient) -> None:
    for _ in range(2):
        await client.generate().read_all()
    whose = {"tenant": "default", "model": "bytes"}
    assert client.metric("requests_total", outcome="length", **whose) == 2
    assert client.metric("tokens_total", **whose) == 10
    assert client.metric("time_to_first_token_seconds_count", **whose) == 2
    assert client.metric("request_seconds_count", **whose) == 2
    assert client.metric("verifier_streams") == 1
    assert client.metric("running_requests") == 0


# --- as a process -----------------------------------------------------------------------------


@asynccontextmanager
async def router_process(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treecast.services.router", "--announce", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_process_announces_itself_serves_and_stops_when_told(
    verifier: ScriptedVerifier,
) -> None:
    seeds = f"127.0.0.1:1,{verifier.address}"
    async with router_process("--verifiers", seeds) as process:
        assert process.stdout is not None
        line = json.loads(await process.stdout.readline())
        assert line.keys() == {"role", "address", "metrics", "instance_id", "pid"}
        assert line["role"] == "router"
        async with open_channel(line["address"]) as channel:
            stub: Any = router_pb2_grpc.RouterServiceStub(channel)
            request = pb.GenerateRequest(text="hello", sampling={"max_tokens": 2})
            assert (await Reply(stub.Generate(request)).read_all()).tokens() == output_of(HELLO, 2)
        metrics = await asyncio.to_thread(fetch, f"http://{line['metrics']}/metrics")
        whose = 'model="bytes",outcome="length",tenant="default"'
        assert f"treecast_router_requests_total{{{whose}}} 1.0" in metrics
        process.terminate()
        _, log = await process.communicate()
    assert process.returncode == 0
    assert log.index(b"service.draining") < log.index(b"service.stopped")


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read(), "utf-8")


@pytest.fixture
def _logs_set_back() -> Iterator[None]:
    """A router that starts in this process sets up logs for all of it."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("_logs_set_back")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--verifiers", "nowhere"],
            "seed is 'nowhere'; it must be host:port or dns:///name:port, port 1..65535",
        ),
        (["--redis-url", "http://x"], "redis_url is 'http://x': Redis URL must specify one of"),
        (
            ["--queue-limit", "0"],
            "--queue-limit (or TREECAST_QUEUE_LIMIT) is '0': Input should be greater than or equal",
        ),
        (["--colour", "red"], "error parsing CLI: unrecognized arguments: --colour red"),
        (["--log-level", "loud"], "log_level is 'loud'; allowed: debug, info, warning, error"),
    ],
)
def test_router_does_not_start_when_a_setting_is_bad(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert capsys.readouterr().err.startswith(f"treecast-router: {message}")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--listen", "cannot listen on BUSY: address already in use"),
        ("--metrics-listen", "metrics_listen BUSY cannot be bound: Address already in use"),
    ],
)
async def test_process_ends_when_an_address_is_in_use(flag: str, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        async with router_process(flag, busy) as process:
            out, log = await process.communicate()
    assert process.returncode == 2
    assert out == b""
    assert log.decode().splitlines()[-1] == f"treecast-router: {message.replace('BUSY', busy)}"


async def test_router_never_loads_torch_or_transformers() -> None:
    check = "import sys, treecast.services.router.router as _; print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", check, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    loaded = set(out.decode().split())
    assert "treecast.services.router.text" in loaded
    assert not {"torch", "transformers"} & loaded

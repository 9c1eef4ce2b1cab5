"""A draft swapped under streams: the same text, no stream touched, the new revision shown."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import transformers

from treecast import SamplingParams
from treecast.drafting.base import DraftRequest
from treecast.drafting.growth import BestFirst
from treecast.drafting.ssm import SSMDrafter
from treecast.drafting.swap import SwappableDrafter
from treecast.engine.toy import ToyEngine
from treecast.errors import (
    InvalidRequest,
    ModelError,
    NotServed,
    PermissionDenied,
    TreecastError,
    Unavailable,
)
from treecast.model_folder import model_revision
from treecast.sampling.params import Law, SpeculationParams
from treecast.services.router.server import Router
from treecast.services.router.settings import RouterSettings
from treecast.services.speculator.loading import load_engines
from treecast.services.speculator.server import Speculator, server_of
from treecast.services.speculator.settings import SpeculatorSettings
from treecast.v1 import speculator_pb2 as pb
from treecast.v1 import speculator_pb2_grpc
from treecast.wire.frames import Hello, NeedSync, Role
from treecast.wire.status import from_rpc_error

from .pair_rig import verifier as verifier_stream
from .test_speculator import attach, commit, speculator_rig
from .toy_mesh import NUMBERS, Mesh, toy_verifier
from .verifier_rig import VOCAB, plain

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def save_draft(folder: Path, seed: int, vocab_size: int = VOCAB) -> Path:
    """A tiny random model with the toy's vocabulary and, as the toy, no tokenizer."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def drafts(tmp_path: Path) -> Path:
    """Drafts `a` and `b`, and `small` of another vocabulary."""
    save_draft(tmp_path / "a", 1)
    save_draft(tmp_path / "b", 2)
    save_draft(tmp_path / "small", 3, vocab_size=64)
    return tmp_path


@dataclass
class Rig:
    speculator: Speculator
    address: str
    mesh: Mesh

    async def reload(self, model: str = "", drafter: str = "") -> pb.ReloadResponse:
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = speculator_pb2_grpc.SpeculatorAdminServiceStub(channel)
            try:
                return await stub.Reload(pb.ReloadRequest(model=model, drafter=drafter))
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None

    async def hello(self) -> Hello:
        """What a verifier that dials now is told."""
        ours = Hello("late-verifier", Role.VERIFIER, vocab_size=VOCAB)
        async with verifier_stream(self.address, ours) as (_, recorder):
            await recorder.heard("opened")
            return recorder.links[-1].peer

    def shown(self) -> dict[str, float]:
        """Revisions in the metric, with their values."""
        return {
            sample.labels["revision"]: sample.value
            for family in self.speculator.metrics.registry.collect()
            for sample in family.samples
            if sample.name == "treecast_speculator_draft_model_info"
        }


@asynccontextmanager
async def mesh(drafts: Path, **settings: Any) -> AsyncIterator[Rig]:
    """Router, toy verifier, and a speculator that drafts for it with a real model."""
    given = SpeculatorSettings(
        model=str(drafts / "a"), drafts_root=drafts, dtype="float32", torch_threads=1,
        pool_tokens=8192, **settings,
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        thread = ThreadPoolExecutor(1)
        engines = await asyncio.wrap_future(thread.submit(load_engines, given))
        speculator = Speculator(given, engines, f"speculator-{next(NUMBERS)}", thread)
        server = server_of(speculator)
        address = await server.listen("127.0.0.1:0")
        speculator.start()
        stack.push_async_callback(server.stop, 0)
        stack.callback(speculator.close)
        worker = await stack.enter_async_context(
            toy_verifier(speculators=(address,), planner="full", toy_step_s=0.01)
        )
        routing = RouterSettings(verifiers=(worker.address,), metrics_listen=None)
        router = await stack.enter_async_context(Router(routing, f"router-{next(NUMBERS)}"))
        made = Mesh(router, [worker], [address], {})
        await made.until(lambda: len(router.fleet.candidates()) == 1)
        async with asyncio.timeout(60):
            while not worker.verifier.assignments.instances:
                await asyncio.sleep(0.01)  # nothing tells when a verifier's stream opens
        yield Rig(speculator, address, made)


async def test_text_stays_the_same_when_a_draft_is_swapped_under_streams(drafts: Path) -> None:
    before, after = model_revision(drafts / "a"), model_revision(drafts / "b")
    async with mesh(drafts) as rig, rig.mesh.client() as client:
        streams = [client.generate([5, 6, k], LONG) for k in range(4)]
        running = [asyncio.create_task(stream.result()) for stream in streams]
        async with asyncio.timeout(60):
            while rig.speculator.grower.num_drafts < 4:
                await asyncio.sleep(0.005)
        verifier_link = next(iter(rig.speculator._verifiers.links))
        done = await rig.reload(str(drafts / "b"))
        assert (done.drafter, done.revision_before, done.revision) == ("ssm", before, after)
        assert done.sessions_moved + done.sessions_kept <= 4
        assert done.sessions_moved > 0, "the streams ended before the swap"
        for k, result in enumerate(await asyncio.gather(*running)):
            assert list(result.token_ids) == plain([5, 6, k], LONG)
            assert result.samples[0].placements == 1
            assert result.resumes == 0
        assert next(iter(rig.speculator._verifiers.links)) is verifier_link
        assert rig.shown() == {after: 1.0}
        assert (await rig.hello()).model_revision == after
        assert rig.speculator._drafter.drafters[0].num_models == 1  # type: ignore[attr-defined]


async def test_the_same_folder_is_read_again_at_hangup(drafts: Path) -> None:
    after = model_revision(drafts / "b")
    async with mesh(drafts) as rig:
        rig.speculator.reload_on_hangup()
        shutil.copy(drafts / "b" / "model.safetensors", drafts / "a" / "model.safetensors")
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(60):
            while rig.shown() != {after: 1.0}:
                await asyncio.sleep(0.01)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)


@pytest.mark.parametrize(
    ("model", "drafter", "error", "message"),
    [
        ("{}/small", "", InvalidRequest,
         "draft small has a vocabulary of 64 tokens; that of ssm, a, has 97"),
        ("{}/none", "", ModelError, "model folder .* does not exist"),
        ("{}/../elsewhere", "", PermissionDenied,
         "draft folder .* may not be named; allowed: below --drafts-root"),
        ("", "ngram", NotServed, "draft model 'ngram' is not one of this speculator's: ssm"),
    ],
)  # fmt: skip
async def test_the_old_draft_goes_on_when_the_new_one_is_refused(
    drafts: Path, model: str, drafter: str, error: type[TreecastError], message: str
) -> None:
    before = model_revision(drafts / "a")
    async with mesh(drafts) as rig, rig.mesh.client() as client:
        stream = asyncio.create_task(client.generate([5, 6], LONG).result())
        with pytest.raises(TreecastError, match=message) as raised:
            await rig.reload(model.format(drafts), drafter)
        assert isinstance(raised.value, error)
        assert list((await stream).token_ids) == plain([5, 6], LONG)
        assert rig.shown() == {before: 1.0}
        assert (await client.generate([7], LONG).result()).usage.drafted > 0


async def test_a_session_under_mss_ends_with_the_draft_that_it_began_with() -> None:
    """Of two sessions only the one under replay is asked to attach anew."""
    async with speculator_rig(growth="<1,1>") as rig, rig.verifier() as v:
        drawn = SpeculationParams.of(Law.MSS, growth="<2,1>")
        sampled = SamplingParams(temperature=1.0, max_tokens=24)
        v.send(attach(1, 1, 2), attach(2, 1, 2, sampling=sampled, speculation=drawn))
        await v.draft(1, base_len=2)
        await v.draft(2, base_len=2)
        reloaded = await rig.speculator.reloading.reload("", "")
        assert (reloaded.moved, reloaded.kept) == (1, 1)
        await v.hear(NeedSync, 1, lambda frame: True)
        drafter = rig.speculator._drafter.drafters[0]
        assert isinstance(drafter, SwappableDrafter)
        assert drafter.num_models == 2
        v.send(attach(1, 1, 2, 8), commit(2, 2, 40))
        await v.draft(1, base_len=3)
        await v.draft(2, base_len=3)
        assert NeedSync not in v.heard(2)
        assert drafter.num_models == 2


@dataclass
class Held:
    """The drafting thread, held up between two drafts."""

    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> None:
        self.begun.set()
        assert self.go_on.wait(60)


async def test_a_new_draft_takes_over_whole_when_its_caller_leaves() -> None:
    """Drafter, engine, hello and sessions change together, or not at all."""
    async with speculator_rig(growth="<1,1>") as rig, rig.verifier() as v:
        speculator, held = rig.speculator, Held()
        v.send(attach(1, 1, 2))
        await v.draft(1, base_len=2)
        speculator.grower.between_drafts(held)
        assert await asyncio.to_thread(held.begun.wait, 60)
        calling = asyncio.create_task(speculator.reloading.reload("", ""))
        await rig.until(lambda: bool(speculator.grower._chores))
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        with pytest.raises(Unavailable, match="another draft is being loaded"):
            await speculator.reloading.reload("", "")
        held.go_on.set()
        await v.hear(NeedSync, 1, lambda frame: True)
        drafter = speculator._drafter.drafters[0]
        assert isinstance(drafter, SwappableDrafter)
        assert drafter._newest._engine is speculator.reloading.drafts[0].engine is not rig.engine
        assert rig.metric("swaps_total", outcome="done") == 1
        assert rig.metric("swaps_total", outcome="failed") == 0
        v.send(attach(1, 1, 2, 8))
        await v.draft(1, base_len=3)


async def test_drafting_goes_on_when_what_was_to_be_done_between_drafts_is_cancelled() -> None:
    async with speculator_rig(growth="<1,1>") as rig, rig.verifier() as v:
        held, ran = Held(), threading.Event()
        rig.speculator.grower.between_drafts(held)
        assert await asyncio.to_thread(held.begun.wait, 60)
        assert rig.speculator.grower.between_drafts(ran.set).cancel()
        held.go_on.set()
        v.send(attach(1, 1, 2))
        await v.draft(1, base_len=2)
        assert not ran.is_set()


def test_sessions_stay_with_their_model_until_they_are_closed() -> None:
    def model() -> SSMDrafter:
        return SSMDrafter(ToyEngine(vocab_size=VOCAB), BestFirst())

    first, second = model(), model()
    drafter = SwappableDrafter(first)
    request = DraftRequest([1, 2], 2, LONG, 0)
    drafter.open(1, request)
    drafter.swap(second)
    drafter.open(2, request)
    trees = drafter.draft({1: 4, 2: 4})
    assert trees[1].tokens == trees[2].tokens  # the same toy
    assert drafter.num_models == 2
    drafter.close(1)
    assert drafter.num_models == 1
    drafter.commit(2, [8])
    assert drafter.foresaw(2)
    with pytest.raises(InvalidRequest, match=r"vocabulary of 50 tokens .* with one of 97"):
        drafter.swap(SSMDrafter(ToyEngine(vocab_size=50), BestFirst()))

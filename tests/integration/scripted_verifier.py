"""A VerifierService on a real port whose model is a rule, and whose pace the test sets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Self

from treecast.errors import TreecastError
from treecast.sampling.logprobs import TokenLogprobs
from treecast.v1 import verifier_pb2 as pb
from treecast.v1 import verifier_pb2_grpc
from treecast.wire import codec
from treecast.wire.acceptor import Acceptor
from treecast.wire.channel import MAX_ANSWER_BYTES
from treecast.wire.frames import (
    BadFrame,
    Cancel,
    Completed,
    Failed,
    FinishReason,
    Forget,
    Heartbeat,
    Hello,
    Progress,
    Role,
    RouterFrame,
    ServingFrame,
    Start,
    Usage,
)
from treecast.wire.hop import SERVE
from treecast.wire.link import Link
from treecast.wire.server import Server

from ..byte_tokenizer import SPECIAL_TOKENS, TEMPLATE, byte_tokenizer

RouterLink = Link[ServingFrame, RouterFrame]

FOREVER = 10**9


def output_of(prompt: Sequence[int], num_tokens: int, committed: Sequence[int] = ()) -> list[int]:
    """What the rule makes of a prompt: each token, a small letter, follows from all before it."""
    context, output = [*prompt, *committed], []
    for _ in range(num_tokens):
        output.append(97 + (7 * sum(context) + len(context)) % 26)
        context.append(output[-1])
    return output


def text_of(prompt: Sequence[int], num_tokens: int) -> str:
    return bytes(output_of(prompt, num_tokens)).decode()


class ScriptedVerifier(verifier_pb2_grpc.VerifierServiceServicer):
    """Emits a token at a time, while its budget lasts.

    Attributes:
        hello, state: hello and heartbeat as sent to routers; both may be changed.
        budget: tokens that may still be emitted, over all requests.
        refusal: an error that every request gets instead of tokens.
        answers: cleared, it holds back `GetTokenizer`, after setting `asked`.
        run: what becomes of a request; the rule, unless the test puts something else here.
        started, cancelled, forgotten: what came, in order.
    """

    def __init__(self, name: str = "v1", budget: int = FOREVER, **hello: Any) -> None:
        identity: dict[str, Any] = {
            "vocab_size": 258,
            "capacity": 8,
            "model": "bytes",
            "model_revision": "r1",
            "fingerprint": "f1",
            "context_tokens": 512,
        }
        self.hello = Hello(name, Role.VERIFIER, **(identity | hello))
        self.state = Heartbeat()
        self.budget = budget
        self.refusal: TreecastError | None = None
        self.files = pb.GetTokenizerResponse(
            tokenizer_json=byte_tokenizer().to_str().encode(),
            chat_template=TEMPLATE,
            special_tokens=SPECIAL_TOKENS,
        )
        self.started: list[Start] = []
        self.cancelled: list[int] = []
        self.forgotten: list[Forget] = []
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.address = ""
        self.run: Callable[[RouterLink, Start], Coroutine[Any, Any, None]] = self._follow_rule
        self._changed = asyncio.Event()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._streams = Acceptor(SERVE, lambda: self.hello, lambda: self.state, self)
        self._server = Server(max_answer_bytes=MAX_ANSWER_BYTES)

    async def __aenter__(self) -> Self:
        self._server.add(
            verifier_pb2_grpc.add_VerifierServiceServicer_to_server,
            self,
            "treecast.v1.VerifierService",
        )
        self.address = await self._server.listen("127.0.0.1:0")
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()

    def hang_up(self) -> None:
        """Close the streams to routers, which dial again."""
        self._streams.close("hung up")

    async def kill(self) -> None:
        """Vanish at once, with whatever was running."""
        self._streams.close("killed")
        await self._server.stop(None)
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def allow(self, num_tokens: int) -> None:
        """Let that many more tokens be emitted."""
        self.budget += num_tokens
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()`; looked at whenever something arrives, ends or is allowed."""
        async with asyncio.timeout(10):
            await self._until(holds)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def fail(self, handle: int, error: TreecastError) -> None:
        """End a request with an error."""
        for link in self._streams.links:
            link.send(Failed(handle, error))

    # --- the model ----------------------------------------------------------------------------

    async def _follow_rule(self, link: RouterLink, start: Start) -> None:
        if self.refusal is not None:
            link.send(Failed(start.handle, self.refusal))
            return
        done = len(start.committed)
        left = start.sampling.max_tokens - done
        for index, token in enumerate(output_of(start.prompt, left, start.committed), done):
            await self._spend()
            logprobs = () if start.sampling.logprobs is None else (TokenLogprobs(-0.5),)
            link.send(Progress(start.handle, index, (token,), logprobs))
        usage = Usage(len(start.prompt), 0, start.sampling.max_tokens, left)
        link.send(Completed(start.handle, FinishReason.LENGTH, usage))

    async def _spend(self) -> None:
        await self._until(lambda: self.budget > 0)
        self.budget -= 1

    # --- PairHandler --------------------------------------------------------------------------

    def opened(self, link: RouterLink) -> None:
        self._changed.set()

    def beat(self, link: RouterLink, heartbeat: Heartbeat) -> None:
        self._changed.set()

    def closed(self, link: RouterLink) -> None:
        for task in self._running.values():
            task.cancel()

    def failed_frame(self, link: RouterLink, error: BadFrame) -> None:
        link.send(Failed(error.handle, error))

    def received(self, link: RouterLink, frame: RouterFrame) -> None:
        match frame:
            case Start():
                self.started.append(frame)
                self._running[frame.handle] = asyncio.create_task(self.run(link, frame))
            case Cancel():
                self.cancelled.append(frame.handle)
                self._running[frame.handle].cancel()
                link.send(Completed(frame.handle, FinishReason.CANCELLED))
            case Forget():
                self.forgotten.append(frame)
        self._changed.set()

    # --- RPCs ---------------------------------------------------------------------------------

    async def Serve(
        self, request_iterator: AsyncIterator[pb.ServeRequest], context: Any
    ) -> AsyncIterator[pb.ServeResponse]:
        async for message in self._streams.accept(request_iterator, context):
            yield message

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Any
    ) -> pb.GetTokenizerResponse:
        self.asked.set()
        await self.answers.wait()
        return self.files

    async def GetLoad(self, request: pb.GetLoadRequest, context: Any) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(identity=codec.encode_hello(self.hello), speculators=["s1", "s2"])

"""A RouterService on a real port that plays one script per call, and keeps what it was sent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, Self

import grpc

from treecast.errors import TreecastError
from treecast.v1 import router_pb2 as pb
from treecast.v1 import router_pb2_grpc, verifier_pb2
from treecast.wire.status import code_of, to_rpc_status

Script = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateResponse]]


class ScriptedRouter(router_pb2_grpc.RouterServiceServicer):
    """Answers the n-th `Generate` with the n-th script given, and the last one from then on."""

    def __init__(self, *scripts: Script, port: int = 0) -> None:
        self.requests: list[pb.GenerateRequest] = []
        self.closed: list[str] = []
        self.ended = threading.Event()
        """Set when a call has ended, by either side."""
        self._scripts = deque(scripts)
        self._server = grpc.server(ThreadPoolExecutor(4))
        router_pb2_grpc.add_RouterServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop(grace=None).wait()

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        context.add_callback(self.ended.set)
        script = self._scripts.popleft() if len(self._scripts) > 1 else self._scripts[0]
        yield from script(request, context)

    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=request.request_id == "running")

    def CloseSession(
        self, request: pb.CloseSessionRequest, context: grpc.ServicerContext
    ) -> pb.CloseSessionResponse:
        self.closed.append(request.session_id)
        return pb.CloseSessionResponse(closed=request.session_id == "known")

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        model = pb.Model(name="toy", revision="r1", vocab_size=64, context_tokens=512, verifiers=2)
        return pb.ListModelsResponse(models=[model])

    def GetStatus(
        self, request: pb.GetStatusRequest, context: grpc.ServicerContext
    ) -> pb.GetStatusResponse:
        verifier = pb.VerifierStatus(
            address="10.0.0.1:7000",
            healthy=True,
            instance_id="v1",
            model="toy",
            model_revision="r1",
            running=1,
            kv_pages_free=30,
            kv_pages_total=32,
            speculators=["s1"],
            numerics_fingerprint="f1",
        )
        return pb.GetStatusResponse(verifiers=[verifier], queued=3, running=1, redis_ok=True)


def started(**changes: object) -> pb.GenerateResponse:
    fields: dict[str, object] = {
        "request_id": "q1",
        "seed": 7,
        "prompt_ids": [5, 6],
        "model": "toy",
        "model_revision": "r1",
        "numerics_fingerprint": "f1",
    }
    index = changes.pop("sample_index", 0)
    return pb.GenerateResponse(sample_index=index, started=pb.Started(**(fields | changes)))


def delta(text: str, *ids: int, sample_index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(sample_index=sample_index, delta=pb.Delta(text=text, token_ids=ids))


def finished(output_tokens: int, sample_index: int = 0) -> pb.GenerateResponse:
    usage = verifier_pb2.Usage(
        prompt_tokens=2,
        cached_tokens=1,
        output_tokens=output_tokens,
        steps=2,
        drafted=5,
        accepted=1,
        accepted_by_depth=[1, 0],
        offered_by_depth=[2, 1],
    )
    done = pb.Finished(
        reason=verifier_pb2.FINISH_REASON_LENGTH, usage=usage, placements=1, same_numerics=True
    )
    return pb.GenerateResponse(sample_index=sample_index, finished=done)


def play(*responses: pb.GenerateResponse) -> Script:
    """A script that sends these and ends well."""
    return lambda request, context: iter(responses)


def fail(error: TreecastError, *before: pb.GenerateResponse) -> Script:
    """A script that sends some responses and then ends with an error."""

    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        yield from before
        refuse(context, error)

    return script


def hang(*before: pb.GenerateResponse) -> Script:
    """A script that sends some responses and then nothing, until the call has ended."""

    def script(
        request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        ended = threading.Event()
        if not context.add_callback(ended.set):
            return
        yield from before
        ended.wait(30)

    return script


def refuse(context: grpc.ServicerContext, error: TreecastError) -> NoReturn:
    details = ("grpc-status-details-bin", to_rpc_status(error).SerializeToString())
    context.set_trailing_metadata((details,))
    context.abort(code_of(error), error.message)

"""What the fuzzer starts from: valid messages of every RPC but Drain, Resume and Reload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from treecast.sampling.params import Law
from treecast.v1 import router_pb2, sampling_pb2, speculator_pb2, verifier_pb2
from treecast.wire import codec
from treecast.wire.frames import Heartbeat, Hello, Role

VOCAB = 97
"""Of the toy engine."""

HANDLES = range(1, 9)


@dataclass(frozen=True, slots=True)
class Rpc:
    """One unary or server-streaming method and valid requests of it."""

    path: str
    requests: tuple[Message, ...]
    streams: bool = False


_SAMPLING = sampling_pb2.SamplingParams(
    temperature=0.8,
    top_p=0.9,
    seed=1,
    max_tokens=4,
    logprobs=2,
    logit_bias={5: 1.0},
    stop_token_ids=[3],
    ignore_eos=True,
)

_GENERATE = (
    router_pb2.GenerateRequest(
        tokens=router_pb2.TokenPrompt(ids=[1, 2, 3]), sampling=_SAMPLING, num_samples=2
    ),
    router_pb2.GenerateRequest(
        request_id="fuzz",
        model="toy",
        tokens=router_pb2.TokenPrompt(ids=[1, 2, 3]),
        sampling=_SAMPLING,
        session_id="fuzz",
        resume=router_pb2.Resume(
            committed=[4], model_revision="toy-97", numerics_fingerprint="toy-97"
        ),
    ),
    router_pb2.GenerateRequest(text="x", growth="<1,1,3>", max_nodes=3),
    router_pb2.GenerateRequest(
        chat=router_pb2.ChatPrompt(messages=[router_pb2.ChatMessage(role="user", content="x")])
    ),
)

LIAR_REVISION = "toy-lies"
FOR_LIAR = router_pb2.GenerateRequest(
    tokens=router_pb2.TokenPrompt(ids=[1, 2, 3]),
    sampling=_SAMPLING,
    resume=router_pb2.Resume(committed=[4], model_revision=LIAR_REVISION),
)
"""A request that only a verifier of that revision may have: the load's never come there."""

_HEALTH = (
    Rpc("/grpc.health.v1.Health/Check", (health_pb2.HealthCheckRequest(service=""),)),
    Rpc("/grpc.health.v1.Health/Watch", (health_pb2.HealthCheckRequest(service=""),), True),
)

ROUTER = (
    Rpc("/treecast.v1.RouterService/Generate", _GENERATE, True),
    Rpc("/treecast.v1.RouterService/Abort", (router_pb2.AbortRequest(request_id="fuzz"),)),
    Rpc(
        "/treecast.v1.RouterService/CloseSession",
        (router_pb2.CloseSessionRequest(session_id="fuzz"),),
    ),
    Rpc("/treecast.v1.RouterService/ListModels", (router_pb2.ListModelsRequest(),)),
    Rpc("/treecast.v1.RouterService/GetStatus", (router_pb2.GetStatusRequest(),)),
    *_HEALTH,
)
VERIFIER = (
    Rpc(
        "/treecast.v1.VerifierService/GetTokenizer",
        (verifier_pb2.GetTokenizerRequest(model_revision="toy-97"),),
    ),
    Rpc("/treecast.v1.VerifierService/GetLoad", (verifier_pb2.GetLoadRequest(),)),
    *_HEALTH,
)
SPECULATOR = _HEALTH

EDGE: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/chat/completions",
        {
            "model": "toy",
            "messages": [{"role": "user", "content": "x"}],
            "max_completion_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["x"],
        },
    ),
    (
        "/v1/completions",
        {
            "model": "toy",
            "prompt": [1, 2, 3],
            "max_tokens": 4,
            "n": 2,
            "seed": 1,
            "logit_bias": {"5": 1.0},
            "temperature": 0.8,
            "top_p": 0.9,
            "session_id": "fuzz",
        },
    ),
)
"""Paths of the HTTP edge and valid bodies of theirs."""

REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
REFLECTED = reflection_pb2.ServerReflectionRequest(list_services="")


@dataclass(frozen=True, slots=True)
class PairCorpus:
    """One direction of a pair stream.

    Attributes:
        message: holds frames in its field `frames`.
        last: ends whatever the frames of a message began.
    """

    path: str
    message: type[Message]
    frames: tuple[Message, ...]
    last: tuple[Message, ...]


def _session(handle: int) -> verifier_pb2.SessionKey | None:
    return verifier_pb2.SessionKey(session_id="fuzz", epoch=handle) if handle % 2 else None


def _starts() -> tuple[Message, ...]:
    return tuple(
        verifier_pb2.RouterFrame(
            start=verifier_pb2.Start(
                handle=handle,
                request_id=f"fuzz-{handle}",
                prompt=[1, 2, 3],
                committed=[4],
                sampling=_SAMPLING,
                session=_session(handle),
                deadline_ms=1000,
                max_nodes=handle,
            )
        )
        for handle in HANDLES
    )


SERVE = PairCorpus(
    "/treecast.v1.VerifierService/Serve",
    verifier_pb2.ServeRequest,
    (
        *_starts(),
        *(
            verifier_pb2.RouterFrame(cancel=verifier_pb2.Cancel(handle=handle))
            for handle in HANDLES
        ),
        verifier_pb2.RouterFrame(forget=verifier_pb2.Forget(session=_session(1))),
        verifier_pb2.RouterFrame(heartbeat=codec.encode_heartbeat(Heartbeat())),
    ),
    tuple(
        verifier_pb2.RouterFrame(cancel=verifier_pb2.Cancel(handle=handle)) for handle in HANDLES
    ),
)

SPECULATE = PairCorpus(
    "/treecast.v1.SpeculatorService/Speculate",
    speculator_pb2.SpeculateRequest,
    (
        *(
            speculator_pb2.VerifierFrame(
                attach=speculator_pb2.Attach(
                    handle=handle,
                    tokens=[1, 2, 3, 1, 2],
                    prompt_len=3,
                    sampling=_SAMPLING,
                    node_budget=8,
                    tokens_per_s=10,
                )
            )
            for handle in HANDLES
        ),
        *(
            speculator_pb2.VerifierFrame(
                commit=speculator_pb2.Commit(
                    handle=handle, from_len=5, tokens=[3, 1], node_budget=8
                )
            )
            for handle in HANDLES
        ),
        *(
            speculator_pb2.VerifierFrame(detach=speculator_pb2.Detach(handle=handle))
            for handle in HANDLES
        ),
    ),
    tuple(
        speculator_pb2.VerifierFrame(detach=speculator_pb2.Detach(handle=handle))
        for handle in HANDLES
    ),
)


def hello(role: Role, instance_id: str, vocab_size: int = VOCAB) -> Hello:
    """What lets a fuzzer in."""
    return Hello(
        instance_id,
        role,
        vocab_size=0 if role is Role.ROUTER else vocab_size,
        laws=tuple(Law),
        capacity=64,
        proposers=("hostile",) if role is Role.SPECULATOR else (),
        model="toy",
        model_revision="toy-97",
        context_tokens=1024,
    )

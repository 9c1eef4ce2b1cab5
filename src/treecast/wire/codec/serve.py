"""Frames between a router and a verifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from treecast.errors import InvalidFrame, InvalidRequest
from treecast.v1 import verifier_pb2 as pb
from treecast.wire.codec.bounds import (
    MAX_PRIORITY,
    MAX_TEXT_CHARACTERS,
    MAX_TOKENS,
    MAX_TRACEPARENT_CHARACTERS,
    Limits,
    check_at_most,
    check_text,
    check_tokens,
)
from treecast.wire.codec.framing import Decoder, Encoder, decode_frames, encode_body
from treecast.wire.codec.messages import (
    decode_cost,
    decode_finish_reason,
    decode_logprobs,
    decode_sampling,
    decode_session_key,
    decode_speculation,
    decode_usage,
    encode_cost,
    encode_finish_reason,
    encode_law,
    encode_logprobs,
    encode_proposal,
    encode_sampling,
    encode_session_key,
    encode_usage,
)
from treecast.wire.codec.rounds import decode_round, encode_round
from treecast.wire.frames import (
    Cancel,
    Completed,
    Failed,
    Forget,
    Heartbeat,
    Hello,
    Progress,
    RouterFrame,
    ServingFrame,
    Start,
)
from treecast.wire.rounds import MAX_ROUNDS, Round
from treecast.wire.status import from_rpc_status, to_rpc_status


def encode_router_frames(frames: Iterable[RouterFrame | Hello | Heartbeat]) -> pb.ServeRequest:
    bodies = (encode_body(frame, _ENCODERS) for frame in frames)
    return pb.ServeRequest(frames=[pb.RouterFrame(**body) for body in bodies])


def decode_router_frames(
    message: pb.ServeRequest, limits: Limits | None = None
) -> Iterator[RouterFrame | Hello | Heartbeat | InvalidFrame]:
    """See `decode_frames`."""
    return decode_frames(message.frames, _DOWN, limits or Limits())


def encode_serving_frames(frames: Iterable[ServingFrame | Hello | Heartbeat]) -> pb.ServeResponse:
    bodies = (encode_body(frame, _ENCODERS) for frame in frames)
    return pb.ServeResponse(frames=[pb.ServingFrame(**body) for body in bodies])


def decode_serving_frames(
    message: pb.ServeResponse, limits: Limits | None = None
) -> Iterator[ServingFrame | Hello | Heartbeat | InvalidFrame]:
    """See `decode_frames`."""
    return decode_frames(message.frames, _UP, limits or Limits())


def encode_start(start: Start) -> pb.Start:
    return pb.Start(
        handle=start.handle,
        request_id=start.request_id,
        session=None if start.session is None else encode_session_key(start.session),
        prompt=start.prompt,
        committed=start.committed,
        sampling=encode_sampling(start.sampling),
        noise_key=start.noise_key,
        law=encode_law(start.speculation.law),
        proposal=encode_proposal(start.speculation.proposal),
        growth=start.speculation.growth,
        max_nodes=start.speculation.max_nodes,
        deadline_ms=start.deadline_ms,
        truncate_prompt=start.truncate_prompt,
        tenant=start.tenant,
        report_rounds=start.report_rounds,
        traceparent=start.traceparent,
        expected_tokens=start.expected_tokens,
        priority=start.priority,
        adapter=start.adapter,
    )


def decode_start(message: pb.Start, limits: Limits) -> Start:
    """Whether the model can take the prompt is for the verifier's admission to say.

    Raises:
        InvalidRequest: too many tokens, a sampling value out of its bounds, or a speculation that
            cannot be served.
        InvalidFrame: a name that is too long.
    """
    check_at_most(len(message.prompt), MAX_TOKENS, "number of prompt tokens", InvalidRequest)
    check_at_most(len(message.committed), MAX_TOKENS, "number of committed tokens", InvalidRequest)
    max_nodes = message.max_nodes if message.HasField("max_nodes") else None
    return Start(
        handle=message.handle,
        request_id=check_text(message.request_id, "request_id"),
        prompt=tuple(message.prompt),
        committed=tuple(message.committed),
        session=decode_session_key(message.session) if message.HasField("session") else None,
        sampling=decode_sampling(message.sampling),
        noise_key=message.noise_key,
        speculation=decode_speculation(message, max_nodes),
        deadline_ms=message.deadline_ms if message.HasField("deadline_ms") else None,
        truncate_prompt=message.truncate_prompt,
        tenant=check_text(message.tenant, "tenant"),
        report_rounds=message.report_rounds,
        traceparent=check_text(message.traceparent, "traceparent", MAX_TRACEPARENT_CHARACTERS),
        expected_tokens=message.expected_tokens if message.HasField("expected_tokens") else None,
        priority=_check_priority(message.priority),
        adapter=check_text(message.adapter, "adapter"),
    )


def _check_priority(priority: int) -> int:
    check_at_most(abs(priority), MAX_PRIORITY, "size of priority", InvalidRequest)
    return priority


def encode_progress(progress: Progress) -> pb.Progress:
    return pb.Progress(
        handle=progress.handle,
        from_index=progress.from_index,
        tokens=progress.tokens,
        logprobs=[encode_logprobs(one) for one in progress.logprobs],
        cost=encode_cost(progress.cost),
        rounds=[encode_round(one) for one in progress.rounds],
    )


def decode_progress(message: pb.Progress, limits: Limits) -> Progress:
    """Raises InvalidFrame.

    For an unknown token, log-probabilities for some tokens only, a cost that cannot be theirs, or
    rounds that they cannot have come from.
    """
    tokens = check_tokens(message.tokens, "progress", limits)
    check_at_most(message.from_index + len(tokens), MAX_TOKENS, "output length after progress")
    if len(message.logprobs) not in (0, len(tokens)):
        raise InvalidFrame(
            f"progress has {len(message.logprobs)} logprobs for {len(tokens)} tokens"
        )
    logprobs = tuple(decode_logprobs(one) for one in message.logprobs)
    cost = decode_cost(message.cost, len(tokens))
    rounds = _decode_rounds(message, limits)
    return Progress(message.handle, message.from_index, tokens, logprobs, cost, rounds)


def _decode_rounds(message: pb.Progress, limits: Limits) -> tuple[Round, ...]:
    """Rounds of the very tokens beside them, in order; the last ones may have none."""
    check_at_most(len(message.rounds), MAX_ROUNDS, "number of rounds in progress")
    rounds, at = [], 0
    for one in (decode_round(item, limits) for item in message.rounds):
        expected = tuple(message.tokens[at : at + len(one.tokens)])
        if (one.from_index, one.tokens) != (message.from_index + at, expected):
            raise InvalidFrame(
                f"round from token {one.from_index} on is none of the tokens from "
                f"{message.from_index + at} on"
            )
        rounds.append(one)
        at += len(expected)
    return tuple(rounds)


def encode_completed(completed: Completed) -> pb.Completed:
    return pb.Completed(
        handle=completed.handle,
        reason=encode_finish_reason(completed.finish),
        usage=encode_usage(completed.usage),
        stop_characters=completed.stop_characters,
    )


def decode_completed(message: pb.Completed, limits: Limits) -> Completed:
    """Raises InvalidFrame for an unknown finish reason, or more to cut than a stop string has."""
    check_at_most(message.stop_characters, MAX_TEXT_CHARACTERS, "stop_characters")
    return Completed(
        handle=message.handle,
        finish=decode_finish_reason(message.reason),
        usage=decode_usage(message.usage),
        stop_characters=message.stop_characters,
    )


_ENCODERS: dict[type, Encoder] = {
    Start: lambda frame: {"start": encode_start(frame)},
    Cancel: lambda frame: {"cancel": pb.Cancel(handle=frame.handle)},
    Forget: lambda frame: {"forget": pb.Forget(session=encode_session_key(frame.session))},
    Progress: lambda frame: {"progress": encode_progress(frame)},
    Completed: lambda frame: {"completed": encode_completed(frame)},
    Failed: lambda frame: {
        "failed": pb.Failed(handle=frame.handle, status=to_rpc_status(frame.error))
    },
}

_DOWN: dict[str, Decoder[RouterFrame]] = {
    "start": decode_start,
    "cancel": lambda message, limits: Cancel(message.handle),
    "forget": lambda message, limits: Forget(decode_session_key(message.session)),
}

_UP: dict[str, Decoder[ServingFrame]] = {
    "progress": decode_progress,
    "completed": decode_completed,
    "failed": lambda message, limits: Failed(message.handle, from_rpc_status(message.status)),
}

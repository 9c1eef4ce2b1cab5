"""Frames between a verifier and a speculator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from treecast.errors import InvalidFrame
from treecast.v1 import speculator_pb2 as pb
from treecast.wire.codec.bounds import (
    MAX_TEXT_CHARACTERS,
    MAX_TOKENS,
    MAX_TRACEPARENT_CHARACTERS,
    UINT32_MAX,
    Limits,
    check_at_most,
    check_text,
    check_tokens,
)
from treecast.wire.codec.framing import Decoder, Encoder, decode_frames, encode_body
from treecast.wire.codec.messages import (
    decode_sampling,
    decode_speculation,
    encode_law,
    encode_proposal,
    encode_sampling,
)
from treecast.wire.codec.trees import decode_tree, encode_tree
from treecast.wire.frames import (
    Attach,
    Commit,
    Detach,
    Draft,
    Heartbeat,
    Hello,
    NeedSync,
    Refused,
    SpeculatorFrame,
    VerifierFrame,
)


def encode_verifier_frames(
    frames: Iterable[VerifierFrame | Hello | Heartbeat],
) -> pb.SpeculateRequest:
    bodies = (encode_body(frame, _ENCODERS) for frame in frames)
    return pb.SpeculateRequest(frames=[pb.VerifierFrame(**body) for body in bodies])


def decode_verifier_frames(
    message: pb.SpeculateRequest, limits: Limits | None = None
) -> Iterator[VerifierFrame | Hello | Heartbeat | InvalidFrame]:
    """See `decode_frames`."""
    return decode_frames(message.frames, _DOWN, limits or Limits())


def encode_speculator_frames(
    frames: Iterable[SpeculatorFrame | Hello | Heartbeat],
) -> pb.SpeculateResponse:
    bodies = (encode_body(frame, _ENCODERS) for frame in frames)
    return pb.SpeculateResponse(frames=[pb.SpeculatorFrame(**body) for body in bodies])


def decode_speculator_frames(
    message: pb.SpeculateResponse, limits: Limits | None = None
) -> Iterator[SpeculatorFrame | Hello | Heartbeat | InvalidFrame]:
    """See `decode_frames`."""
    return decode_frames(message.frames, _UP, limits or Limits())


def encode_attach(attach: Attach) -> pb.Attach:
    return pb.Attach(
        handle=attach.handle,
        tokens=attach.tokens,
        prompt_len=attach.prompt_len,
        sampling=encode_sampling(attach.sampling),
        noise_key=attach.noise_key,
        node_budget=attach.node_budget,
        law=encode_law(attach.speculation.law),
        proposal=encode_proposal(attach.speculation.proposal),
        growth=attach.speculation.growth,
        tokens_per_s=attach.tokens_per_s,
        traceparent=attach.traceparent,
    )


def decode_attach(message: pb.Attach, limits: Limits) -> Attach:
    """A node budget over the receiver's cap is taken as the cap; `max_nodes` does not travel.

    Raises:
        InvalidFrame: no tokens, too many, or a prompt that is none of them or longer.
        InvalidRequest: a sampling value out of its bounds, or a speculation that cannot be served.
    """
    tokens = check_tokens(message.tokens, "attach", limits)
    if not 1 <= message.prompt_len <= len(tokens):
        raise InvalidFrame(
            f"attach has prompt_len {message.prompt_len}; allowed: 1..{len(tokens)}, its tokens"
        )
    return Attach(
        handle=message.handle,
        tokens=tokens,
        prompt_len=message.prompt_len,
        sampling=decode_sampling(message.sampling),
        noise_key=message.noise_key,
        node_budget=min(message.node_budget, limits.max_nodes),
        speculation=decode_speculation(message),
        tokens_per_s=_check_rate(message.tokens_per_s),
        traceparent=check_text(message.traceparent, "traceparent", MAX_TRACEPARENT_CHARACTERS),
    )


def encode_commit(commit: Commit) -> pb.Commit:
    return pb.Commit(
        handle=commit.handle,
        from_len=commit.from_len,
        tokens=commit.tokens,
        node_budget=commit.node_budget,
        tokens_per_s=commit.tokens_per_s,
    )


def decode_commit(message: pb.Commit, limits: Limits) -> Commit:
    """A node budget over the receiver's cap is taken as the cap.

    Raises:
        InvalidFrame: an unknown token, or a text that would grow too long.
    """
    tokens = check_tokens(message.tokens, "commit", limits)
    check_at_most(message.from_len + len(tokens), MAX_TOKENS, "text length after a commit")
    budget = min(message.node_budget, limits.max_nodes)
    rate = _check_rate(message.tokens_per_s)
    return Commit(message.handle, message.from_len, tokens, budget, rate)


def _check_rate(tokens_per_s: float) -> float:
    if not 0 <= tokens_per_s < math.inf:
        raise InvalidFrame(f"tokens_per_s is {tokens_per_s}; it must be finite and not negative")
    return tokens_per_s


def encode_draft(draft: Draft) -> pb.Draft:
    return pb.Draft(
        handle=draft.handle,
        base_len=draft.base_len,
        tree=encode_tree(draft.tree),
        drafting_us=min(draft.drafting_us, UINT32_MAX),
    )


def decode_draft(message: pb.Draft, limits: Limits) -> Draft:
    """Raises InvalidTree as `decode_tree` does, InvalidFrame for a base that no text can have."""
    check_at_most(message.base_len, MAX_TOKENS, "base_len of a draft")
    tree = decode_tree(message.tree, limits)
    return Draft(message.handle, message.base_len, tree, message.drafting_us)


def decode_refused(message: pb.Refused, limits: Limits) -> Refused:
    why = check_text(message.reason, "the reason of a refusal", MAX_TEXT_CHARACTERS)
    return Refused(message.handle, why, message.no_room)


def encode_refused(refused: Refused) -> pb.Refused:
    why = refused.why[:MAX_TEXT_CHARACTERS]
    return pb.Refused(handle=refused.handle, reason=why, no_room=refused.no_room)


_ENCODERS: dict[type, Encoder] = {
    Attach: lambda frame: {"attach": encode_attach(frame)},
    Commit: lambda frame: {"commit": encode_commit(frame)},
    Detach: lambda frame: {"detach": pb.Detach(handle=frame.handle)},
    Draft: lambda frame: {"draft": encode_draft(frame)},
    NeedSync: lambda frame: {"need_sync": pb.NeedSync(handle=frame.handle)},
    Refused: lambda frame: {"refused": encode_refused(frame)},
}

_DOWN: dict[str, Decoder[VerifierFrame]] = {
    "attach": decode_attach,
    "commit": decode_commit,
    "detach": lambda message, limits: Detach(message.handle),
}

_UP: dict[str, Decoder[SpeculatorFrame]] = {
    "draft": decode_draft,
    "need_sync": lambda message, limits: NeedSync(message.handle),
    "refused": decode_refused,
}

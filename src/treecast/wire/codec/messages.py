"""Messages that several services share: sampling, log-probabilities, hello, heartbeat, usage."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from treecast.adapter import MAX_ADAPTERS, NAME_FORM, Adapter, is_adapter_name
from treecast.errors import InvalidFrame, InvalidRequest
from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.params import (
    MAX_LOGPROBS,
    Law,
    Proposal,
    SamplingParams,
    SpeculationParams,
    check_counts,
)
from treecast.tree import MAX_DEPTH, MAX_NODES, MAX_PROPOSERS
from treecast.v1 import pair_pb2, sampling_pb2, verifier_pb2
from treecast.wire.codec.bounds import (
    UINT32_MAX,
    check_at_most,
    check_text,
)
from treecast.wire.frames import Cost, FinishReason, Heartbeat, Hello, Role, SessionKey, Usage

_MAX_LAWS = 8

_REALS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_COUNTS = ("top_k", "seed", "max_tokens", "logprobs")
_BEAT_COUNTS = (
    "step_age_ms",
    "step_predicted_ms",
    "free_capacity",
    "running",
    "waiting",
    "kv_pages_free",
    "kv_pages_total",
)


def encode_sampling(params: SamplingParams) -> sampling_pb2.SamplingParams:
    return sampling_pb2.SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        **dict([params.constraint] if params.constraint[0] else []),
    )


def decode_sampling(message: sampling_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take the defaults of `SamplingParams`.

    Raises:
        InvalidRequest: a value out of its bounds, by name.
    """
    check_counts(message.logit_bias, message.stop, message.stop_token_ids)
    given: dict[str, float | int] = {}
    for name in _REALS:
        if message.HasField(name):  # type: ignore[arg-type]
            given[name] = shortest(getattr(message, name))
    for name in _COUNTS:
        if message.HasField(name):  # type: ignore[arg-type]
            given[name] = getattr(message, name)
    return SamplingParams(
        **given,  # type: ignore[arg-type]
        logit_bias={token: shortest(bias) for token, bias in message.logit_bias.items()},
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        json_schema=message.json_schema,
        regex=message.regex,
        grammar=message.grammar,
    )


def shortest(value: float) -> float:
    """The float64 that a float32 was most likely written as: 0.8, not 0.800000011920929.

    So a value given with up to 6 digits crosses the wire unchanged, and the mesh computes with the
    very number that the same request uses in one process.
    """
    return float(str(np.float32(value)))


def encode_law(law: Law) -> sampling_pb2.Law.ValueType:
    return sampling_pb2.Law.ValueType(law.value)


def decode_law(value: int) -> Law:
    """Unspecified is replay.

    Raises:
        InvalidRequest: a law that this version does not know.
    """
    if value == sampling_pb2.LAW_UNSPECIFIED:
        return Law.REPLAY
    try:
        return Law(value)
    except ValueError:
        raise InvalidRequest(f"law is {value}; known: 1 (replay), 2 (mss)") from None


def encode_proposal(proposal: Proposal) -> sampling_pb2.Proposal.ValueType:
    return sampling_pb2.Proposal.ValueType(proposal.value)


class SpeculationMessage(Protocol):
    """A message with the fields that say how a request is speculated on."""

    law: sampling_pb2.Law.ValueType
    proposal: sampling_pb2.Proposal.ValueType
    growth: str


def decode_speculation(
    message: SpeculationMessage, max_nodes: int | None = None
) -> SpeculationParams:
    """An unspecified proposal is the law's own.

    Raises:
        InvalidRequest: a law or proposal that this version does not know, a proposal that the law
            cannot serve, or a growth of too many characters.
    """
    law, proposal = decode_law(message.law), _decode_proposal(message.proposal)
    return SpeculationParams.of(law, proposal, message.growth, max_nodes)


def _decode_proposal(value: int) -> Proposal | None:
    if value == sampling_pb2.PROPOSAL_UNSPECIFIED:
        return None
    try:
        return Proposal(value)
    except ValueError:
        known = ", ".join(f"{one.value} ({one.name.lower()})" for one in Proposal)
        raise InvalidRequest(f"proposal is {value}; known: {known}") from None


def encode_logprobs(logprobs: TokenLogprobs) -> sampling_pb2.TokenLogprobs:
    return sampling_pb2.TokenLogprobs(
        chosen=logprobs.chosen, top_ids=logprobs.top_ids, top_logprobs=logprobs.top
    )


def decode_logprobs(message: sampling_pb2.TokenLogprobs) -> TokenLogprobs:
    """Raises InvalidFrame for lists that differ in length or are longer than `MAX_LOGPROBS`."""
    ids, values = len(message.top_ids), len(message.top_logprobs)
    if ids != values:
        raise InvalidFrame(f"logprobs have {ids} token ids and {values} values")
    check_at_most(ids, MAX_LOGPROBS, "number of top logprobs")
    return TokenLogprobs(message.chosen, tuple(message.top_ids), tuple(message.top_logprobs))


def encode_hello(hello: Hello) -> pair_pb2.Hello:
    return pair_pb2.Hello(
        protocol_version=hello.protocol_version,
        instance_id=hello.instance_id,
        role=pair_pb2.Role.ValueType(hello.role.value),
        vocab_size=hello.vocab_size,
        tokenizer_hash=hello.tokenizer_hash,
        laws=[encode_law(law) for law in hello.laws],
        capacity=hello.capacity,
        proposers=hello.proposers,
        model=hello.model,
        model_revision=hello.model_revision,
        numerics_fingerprint=hello.fingerprint,
        context_tokens=hello.context_tokens,
        shares_cores=hello.shares_cores,
        adapters=[pair_pb2.Adapter(name=one.name, revision=one.revision) for one in hello.adapters],
        keeps_grammars=hello.keeps_grammars,
    )


def decode_hello(message: pair_pb2.Hello) -> Hello:
    """Laws that this version does not know are left out.

    Raises:
        InvalidFrame: no instance id, no role that is known, or a name or list that is too long.
    """
    if not message.instance_id:
        raise InvalidFrame("hello has an empty instance_id")
    if message.role not in {role.value for role in Role}:
        raise InvalidFrame(f"hello has role {message.role}; known: 1..{len(Role)}")
    check_at_most(len(message.laws), _MAX_LAWS, "number of laws in hello")
    check_at_most(len(message.proposers), MAX_PROPOSERS, "number of proposers in hello")
    check_at_most(len(message.adapters), MAX_ADAPTERS, "number of adapters in hello")
    known = {law.value for law in Law}
    return Hello(
        protocol_version=message.protocol_version,
        instance_id=check_text(message.instance_id, "instance_id"),
        role=Role(message.role),
        vocab_size=message.vocab_size,
        tokenizer_hash=check_text(message.tokenizer_hash, "tokenizer_hash"),
        laws=tuple(Law(law) for law in message.laws if law in known),
        capacity=message.capacity,
        proposers=tuple(check_text(name, "a proposer's name") for name in message.proposers),
        model=check_text(message.model, "model"),
        model_revision=check_text(message.model_revision, "model_revision"),
        fingerprint=check_text(message.numerics_fingerprint, "numerics_fingerprint"),
        context_tokens=message.context_tokens,
        shares_cores=message.shares_cores,
        adapters=tuple(decode_adapter(one) for one in message.adapters),
        keeps_grammars=message.keeps_grammars,
    )


def decode_adapter(message: pair_pb2.Adapter) -> Adapter:
    """Raises InvalidFrame for a name that no adapter may have."""
    if not is_adapter_name(message.name):
        raise InvalidFrame(f"an adapter in hello has no name of {NAME_FORM}")
    return Adapter(message.name, check_text(message.revision, "an adapter's revision"))


def encode_heartbeat(beat: Heartbeat) -> pair_pb2.Heartbeat:
    """Counts beyond uint32 are sent as its largest value."""
    counts = {name: min(int(getattr(beat, name)), UINT32_MAX) for name in _BEAT_COUNTS}
    return pair_pb2.Heartbeat(steps=beat.steps, draining=beat.draining, **counts)


def decode_heartbeat(message: pair_pb2.Heartbeat) -> Heartbeat:
    counts = {name: getattr(message, name) for name in _BEAT_COUNTS}
    return Heartbeat(steps=message.steps, draining=message.draining, **counts)


def encode_session_key(key: SessionKey) -> verifier_pb2.SessionKey:
    return verifier_pb2.SessionKey(tenant=key.tenant, session_id=key.session_id, epoch=key.epoch)


def decode_session_key(message: verifier_pb2.SessionKey) -> SessionKey:
    """Raises InvalidFrame for an empty session id or a name that is too long."""
    if not message.session_id:
        raise InvalidFrame("session key has an empty session_id")
    return SessionKey(
        tenant=check_text(message.tenant, "tenant"),
        session_id=check_text(message.session_id, "session_id"),
        epoch=message.epoch,
    )


def encode_finish_reason(reason: FinishReason) -> verifier_pb2.FinishReason.ValueType:
    return verifier_pb2.FinishReason.ValueType(reason.value)


def decode_finish_reason(value: int) -> FinishReason:
    """Raises InvalidFrame for a reason that this version does not know."""
    try:
        return FinishReason(value)
    except ValueError:
        raise InvalidFrame(f"finish reason is {value}; known: 1..{len(FinishReason)}") from None


def encode_cost(cost: Cost) -> verifier_pb2.Cost:
    return verifier_pb2.Cost(steps=cost.steps, drafted=cost.drafted, accepted=cost.accepted)


def decode_cost(message: verifier_pb2.Cost, num_tokens: int) -> Cost:
    """Raises InvalidFrame for more than steps that yielded so many tokens can take."""
    check_at_most(message.steps, num_tokens, "number of steps in progress")
    check_at_most(message.drafted, num_tokens * MAX_NODES, "number of drafted nodes in progress")
    check_at_most(message.accepted, num_tokens, "number of accepted nodes in progress")
    return Cost(message.steps, message.drafted, message.accepted)


def encode_usage(usage: Usage) -> verifier_pb2.Usage:
    """Sums beyond uint32 are sent as its largest value."""
    return verifier_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        output_tokens=usage.output_tokens,
        steps=min(usage.steps, UINT32_MAX),
        drafted=min(usage.drafted, UINT32_MAX),
        accepted=min(usage.accepted, UINT32_MAX),
        accepted_by_depth=usage.accepted_by_depth,
        offered_by_depth=usage.offered_by_depth,
    )


def decode_usage(message: verifier_pb2.Usage) -> Usage:
    """Raises InvalidFrame for depth lists that differ in length or exceed the deepest tree."""
    accepted, offered = len(message.accepted_by_depth), len(message.offered_by_depth)
    if accepted != offered:
        raise InvalidFrame(f"usage has {accepted} accepted depths and {offered} offered depths")
    check_at_most(offered, MAX_DEPTH, "number of depths in usage")
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        output_tokens=message.output_tokens,
        steps=message.steps,
        drafted=message.drafted,
        accepted=message.accepted,
        accepted_by_depth=tuple(message.accepted_by_depth),
        offered_by_depth=tuple(message.offered_by_depth),
    )

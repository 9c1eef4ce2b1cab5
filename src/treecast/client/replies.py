"""Unary replies in our terms."""

from __future__ import annotations

from treecast.v1 import router_pb2

from .results import Model, Status, VerifierStatus


def read_models(reply: router_pb2.ListModelsResponse) -> tuple[Model, ...]:
    return tuple(
        Model(
            name=model.name,
            revision=model.revision,
            vocab_size=model.vocab_size,
            context_tokens=model.context_tokens,
            verifiers=model.verifiers,
            adapters=tuple(one.name for one in model.adapters),
        )
        for model in reply.models
    )


def read_status(reply: router_pb2.GetStatusResponse) -> Status:
    return Status(
        verifiers=tuple(_read_verifier(verifier) for verifier in reply.verifiers),
        queued=reply.queued,
        running=reply.running,
        redis_ok=reply.redis_ok,
        draining=reply.draining,
    )


def _read_verifier(verifier: router_pb2.VerifierStatus) -> VerifierStatus:
    return VerifierStatus(
        address=verifier.address,
        healthy=verifier.healthy,
        instance_id=verifier.instance_id,
        model=verifier.model,
        model_revision=verifier.model_revision,
        running=verifier.running,
        waiting=verifier.waiting,
        kv_pages_free=verifier.kv_pages_free,
        kv_pages_total=verifier.kv_pages_total,
        speculators=tuple(verifier.speculators),
        numerics_fingerprint=verifier.numerics_fingerprint,
        draining=verifier.draining,
    )

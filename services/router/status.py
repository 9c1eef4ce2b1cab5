"""What the router says of its verifiers."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from treecast.errors import TreecastError
from treecast.v1 import router_pb2 as pb
from treecast.v1 import verifier_pb2
from treecast.wire.frames import Hello

from .fleet import Verifier, answer

LOAD_TIMEOUT_S = 0.5

log = structlog.get_logger()


def models_of(hellos: Iterable[Hello]) -> list[pb.Model]:
    """One entry for each revision, by name, with the number of verifiers that serve it."""
    models: dict[tuple[str, str], pb.Model] = {}
    for hello in hellos:
        model = models.setdefault(
            (hello.model, hello.model_revision),
            pb.Model(
                name=hello.model,
                revision=hello.model_revision,
                vocab_size=hello.vocab_size,
                context_tokens=hello.context_tokens,
            ),
        )
        model.verifiers += 1
        known = {(one.name, one.revision) for one in model.adapters}
        for one in hello.adapters:
            if (one.name, one.revision) not in known:
                model.adapters.add(name=one.name, revision=one.revision)
    return [models[key] for key in sorted(models)]


async def status_of(verifier: Verifier) -> pb.VerifierStatus:
    """From its last heartbeat; its speculators it is asked for, half a second at most."""
    candidate = verifier.candidate
    if candidate is None:
        return pb.VerifierStatus(address=verifier.address, healthy=False)
    hello, beat = candidate.hello, candidate.beat
    return pb.VerifierStatus(
        address=verifier.address,
        healthy=True,
        instance_id=hello.instance_id,
        model=hello.model,
        model_revision=hello.model_revision,
        running=beat.running,
        waiting=beat.waiting,
        kv_pages_free=beat.kv_pages_free,
        kv_pages_total=beat.kv_pages_total,
        speculators=await _speculators(verifier),
        numerics_fingerprint=hello.fingerprint,
        draining=beat.draining,
    )


async def _speculators(verifier: Verifier) -> list[str]:
    request = verifier_pb2.GetLoadRequest()
    try:
        load = await answer(verifier.stub.GetLoad(request, timeout=LOAD_TIMEOUT_S))
    except TreecastError as error:
        log.warning("verifier.no_load", address=verifier.address, why=error.message)
        return []
    return list(load.speculators)

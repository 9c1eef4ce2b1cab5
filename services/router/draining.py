"""Taking this router, or one of its verifiers, out of service and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from treecast.errors import NotServed, Unavailable
from treecast.v1 import verifier_pb2 as pb

from .fleet import Fleet, Verifier, answer

TIMEOUT_S = 2.0

log = structlog.get_logger()


class Draining:
    """What was taken out of service.

    Attributes:
        active: this router takes no new requests.
        stopping: nor will it again.
    """

    def __init__(self, fleet: Fleet, set_serving: Callable[[bool], Awaitable[None]]) -> None:
        """`set_serving` tells balancers whether to send this router anybody."""
        self.active = False
        self.stopping = False
        self._fleet = fleet
        self._set_serving = set_serving

    def check(self) -> None:
        """Raises Unavailable while this router takes no requests."""
        if self.active:
            raise Unavailable("router is draining")

    async def stop(self) -> None:
        """Drain this router for good."""
        self.stopping = True
        await self.drain_router()

    async def drain_router(self) -> None:
        self.active = True
        await self._set_serving(False)
        log.info("router.draining")

    async def resume_router(self) -> None:
        """Raises Unavailable: it is being stopped."""
        if self.stopping:
            raise Unavailable("router is stopping; it cannot be resumed")
        self.active = False
        await self._set_serving(True)
        log.info("router.resumed")

    async def drain_verifier(self, target: str, hand_over_after_ms: int | None) -> int:
        """Returns the requests that still run there.

        Raises:
            NotServed: no such verifier.
            Unavailable: it does not answer.
        """
        request = pb.VerifierServiceDrainRequest(hand_over_after_ms=hand_over_after_ms)
        reply = await answer(self._find(target).stub.Drain(request, timeout=TIMEOUT_S))
        return reply.running

    async def resume_verifier(self, target: str) -> None:
        """Raises as `drain_verifier` does."""
        request = pb.VerifierServiceResumeRequest()
        await answer(self._find(target).stub.Resume(request, timeout=TIMEOUT_S))

    def _find(self, target: str) -> Verifier:
        for verifier in self._fleet.verifiers:
            candidate = verifier.candidate
            if candidate and target in (verifier.address, candidate.instance_id):
                return verifier
        known = ", ".join(verifier.address for verifier in self._fleet.verifiers) or "none"
        raise NotServed(f"no verifier {target[:256]!r} answers; dialed: {known}")

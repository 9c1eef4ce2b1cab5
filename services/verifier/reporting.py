"""What a step has brought a request, told to all who follow it."""

from __future__ import annotations

import time
from collections import Counter

from treecast.sampling.laws import Walk
from treecast.wire.frames import Cost, Progress
from treecast.wire.rounds import MAX_ROUNDS, Round

from .metrics import VerifierMetrics
from .plan import Work
from .rounds import StepTimes, round_of
from .spans import RequestSpans
from .speculation import Speculation


class Reporter:
    """Tells speculators, the router, metrics and spans of new output."""

    def __init__(
        self, speculation: Speculation, metrics: VerifierMetrics, spans: RequestSpans
    ) -> None:
        self._speculation = speculation
        self._metrics = metrics
        self._spans = spans

    def tell(self, work: Work, walked: Walk, times: StepTimes) -> None:
        """The request's text grows by what was accepted, and everybody hears of it."""
        request = work.request
        begin = request.num_output
        request.tokens.extend(walked.tokens)
        self._count(work, walked)
        self._spans.stepped(work, walked, times)
        rounds = _report(work, walked, begin, times) if request.start.report_rounds else ()
        self._speculation.committed(work, walked)
        cost = Cost(1, len(work.tree), len(walked.accepted))
        tokens, logprobs = tuple(walked.tokens), tuple(walked.logprobs)
        request.link.send(Progress(request.start.handle, begin, tokens, logprobs, cost, rounds))

    def _count(self, work: Work, walked: Walk) -> None:
        request, count = work.request, len(walked.tokens)
        request.tally.add(work.tree, len(walked.accepted))
        accepted = Counter(work.tree.proposers[node] for node in walked.accepted)
        for bits, verified in Counter(work.tree.proposers).items():
            names = self._speculation.proposers(request, bits)
            self._metrics.trees.proposed(names, verified, accepted[bits])
        depth = max(work.tree.depths, default=0)
        self._metrics.trees.verified(len(work.tree), depth, len(walked.accepted))
        self._metrics.requests.tokens.inc(count)
        self._metrics.requests.step_tokens.observe(count)
        now = time.monotonic()
        if request.last_commit_at is None:
            self._metrics.requests.first_token.observe(now - request.arrived_at)
            self._spans.prefilled(request, now)
        else:
            self._metrics.requests.inter_token.observe((now - request.last_commit_at) / count)
        request.last_commit_at = now


def _report(work: Work, walked: Walk, begin: int, times: StepTimes) -> tuple[Round, ...]:
    """The step as the request's round; none once there were enough of them."""
    if work.request.tally.steps > MAX_ROUNDS:
        return ()
    return (round_of(work, walked, begin, times),)

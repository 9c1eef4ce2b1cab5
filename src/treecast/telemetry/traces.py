"""Spans of requests, for whoever collects them by OTLP.

Off unless an endpoint is set, and then free: nothing of OpenTelemetry is imported, and a step asks
one flag. What was said or generated is never told.

    treecast.request         router: one request, from arrival to its last event
      treecast.queue         router: until a verifier has a place
      treecast.serve         verifier: one sample on one verifier
        treecast.queue       verifier: until there is room in the batch
        treecast.prefill     verifier: from there to the first token
        treecast.step        verifier: the request's 1st, 2nd, 4th, 8th, ... step
        treecast.draft       speculator: the session's 1st, 2nd, 4th, 8th, ... tree

So a request has at most two dozen spans from each process, however long its output is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from treecast.errors import SettingsError

Attributes = Mapping[str, str | int | float | bool]

_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Span(Protocol):
    """A span that has begun."""

    @property
    def traceparent(self) -> str:
        """W3C trace context for what belongs to it; empty outside a trace."""

    def note(self, attributes: Attributes) -> None:
        """Add to what is known of it."""

    def end(self, error: str = "") -> None:
        """Over, because of an error if one is named. Safe to repeat: only the first counts."""


class Tracing(Protocol):
    """One process's spans. Times are those of `time.monotonic()`."""

    @property
    def on(self) -> bool:
        """Whether spans go anywhere."""

    def begin(self, name: str, traceparent: str) -> Span:
        """Begin a span, now, below another one or, with an empty context, a trace of its own."""

    def record(
        self, name: str, traceparent: str, began_s: float, ended_s: float, attributes: Attributes
    ) -> None:
        """Tell of a span that is over; nothing if it belongs to no trace."""

    def close(self) -> None:
        """Send what is left, for a few seconds at most. Blocks."""


@dataclass(frozen=True, slots=True)
class Untraced:
    """A span that is not recorded; it passes its trace on."""

    traceparent: str = ""

    def note(self, attributes: Attributes) -> None:
        """Nothing."""

    def end(self, error: str = "") -> None:
        """Nothing."""


UNTRACED = Untraced()


class NoTracing:
    """Tracing that is off."""

    on = False

    def begin(self, name: str, traceparent: str) -> Span:
        return Untraced(traceparent) if traceparent else UNTRACED

    def record(
        self, name: str, traceparent: str, began_s: float, ended_s: float, attributes: Attributes
    ) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def open_tracing(endpoint: str | None, role: str, instance_id: str) -> Tracing:
    """The tracing that a service's settings ask for.

    Args:
        endpoint: http://HOST:PORT of an OTLP collector over gRPC, https:// for TLS; None for none.

    Raises:
        SettingsError: the extra `traces` is not installed.
    """
    if endpoint is None:
        return NoTracing()
    try:
        from treecast.telemetry.otlp import OtlpTracing
    except ImportError as error:
        raise SettingsError(
            f"otlp_endpoint is {endpoint!r}, which needs pip install 'treecast[traces]': {error}"
        ) from error
    return OtlpTracing(endpoint, role, instance_id)


def valid_traceparent(text: str | bytes | None) -> str:
    """A caller's trace context if it is one, else nothing: nobody's request fails for it."""
    return text if isinstance(text, str) and _TRACEPARENT.fullmatch(text) else ""


def is_told(number: int) -> bool:
    """Whether the n-th step or tree of a request gets a span: powers of two do."""
    return number & (number - 1) == 0

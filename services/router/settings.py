"""Settings of a router."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from treecast.settings import ServiceSettings
from treecast.wire.registry import Addresses

from .lengths import Predictor
from .queue import QueueOrder


class RouterSettings(ServiceSettings):
    """Give each request its verifier, and relay its tokens as text."""

    verifiers: Addresses = Field(
        (), description="verifiers to dial beside those in Redis: host:port or dns:///name:port"
    )
    http_listen: str | None = Field(
        None,
        description="address to serve the OpenAI-compatible HTTP API on; unset: not served; needs "
        "the extra [http]",
    )
    queue_limit: int = Field(256, ge=1, description="requests that may wait for a verifier")
    queue_order: QueueOrder = Field(
        "fcfs",
        description="who goes first of one tenant's requests of one priority: fcfs: who came "
        "first; shortest: who is expected to be done first, needs a --length-predictor",
    )
    queue_give_way_s: float = Field(
        0.1,
        ge=0,
        description="shortest: a request may go ahead of one that came earlier by this time for "
        "each token that it is expected to be shorter; so nobody is passed by one that came later "
        "than that, times the expected tokens",
    )
    length_predictor: Predictor = Field(
        "history",
        description="guess of each output's length, sent to verifiers: history: from the lengths "
        "of past outputs to alike prompts of the same tenant and model (hashed, in memory); "
        "max-tokens: what the request allows; none: no guess",
    )
    api_keys_file: Path | None = Field(
        None, description="TOML file of API keys, see docs/security.md; unset: open to everybody"
    )
    api_keys: str = Field("", description="more API keys, as the text of such a file")
    tls_clients: Literal["certificate", "any"] = Field(
        "certificate",
        description="whom to serve where tls_ca is set: clients with a certificate of it, or any; "
        "API keys tell tenants apart either way",
    )
    verifier_grace_s: float = Field(
        5.0, ge=0, description="how long a request waits while no verifier of its model is there"
    )
    max_placements: int = Field(
        4, ge=1, description="verifiers that one request may lose before it fails"
    )
    lease_ttl_s: float = Field(600, gt=0, description="an idle session keeps its verifier so long")
    deadline_margin_s: float = Field(
        0.05, ge=0, description="how much earlier than its client a verifier ends a request"
    )
    drain_s: float = Field(30, ge=0, description="time to finish running requests when stopping")

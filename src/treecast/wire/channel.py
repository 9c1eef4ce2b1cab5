"""Client channels: the same caps and keepalive on every one of them."""

from __future__ import annotations

import asyncio

import grpc

from treecast.wire.tls import Tls, server_name

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
"""Largest message that a server or a client takes; a sender splits what is more."""

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Largest answer to a call for a tokenizer: large vocabularies take tens of megabytes."""

CONNECT_TIMEOUT_MS = 5_000

_FIRST_RETRY_MS = 100
_LAST_RETRY_MS = 2_000

Options = list[tuple[str, str | int]]


def keepalive(time_ms: int, timeout_ms: int) -> Options:
    """Pings on a connection with calls, as often as it is silent for so long, and their patience.

    Left to themselves pings stop after the second without data, and wait 60 s for their answer
    whatever the keepalive's own timeout is.
    """
    return [
        ("grpc.keepalive_time_ms", time_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
    ]


PATIENT = keepalive(10_000, 5_000)
"""Where nobody waits, or where heartbeats tell sooner and more surely."""

PROMPT_MS = 1_000
PROMPT = keepalive(PROMPT_MS, 700)
"""A client's: a stopped router keeps its sockets open, and a stream that can go on through another
one should not wait for it. gRPC answers from threads of its own: a busy event loop is no silence.
"""


def channel_options(
    address: str,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    pings: Options = PATIENT,
    peer_name: str = "",
) -> Options:
    """Options of a channel; `dns:///` names are balanced over all their addresses.

    Args:
        peer_name: the name that the peer's certificate must have; empty for that in the address.
    """
    options: Options = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        *pings,
        ("grpc.initial_reconnect_backoff_ms", _FIRST_RETRY_MS),
        # Not a pause, whatever its name says: an attempt may take so long.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", _LAST_RETRY_MS),
        # Channels to one address do not share a connection, nor its back-off.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if address.startswith("dns:///"):
        options.append(("grpc.lb_policy_name", "round_robin"))
    if peer_name:
        options.append(("grpc.ssl_target_name_override", peer_name))
    return options


def open_channel(
    address: str,
    *,
    tls: Tls | None = None,
    peer_role: str = "",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    pings: Options = PATIENT,
) -> grpc.aio.Channel:
    """Open a channel, over TLS with the certificates of this moment if any. The caller closes it.

    Args:
        peer_role: what the peer's certificate must say it is, where its authority is ours; the
            host name of the address counts otherwise.
    """
    if tls is None:
        options = channel_options(address, max_message_bytes, pings)
        return grpc.aio.insecure_channel(address, options=options)
    name = server_name(peer_role) if peer_role and tls.mutual else ""
    options = channel_options(address, max_message_bytes, pings, name)
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=options)


def is_cancelled() -> bool:
    """Whether this task was asked to end: gRPC raises the same in those who wait for the calls of a
    channel that closes.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0

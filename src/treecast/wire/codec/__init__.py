"""The one translator between protobuf messages and domain values.

What is decoded comes from a peer and is taken as hostile: sizes are checked before anything is
built, and every refusal names the value and its bound.
"""

from treecast.wire.codec.bounds import Limits
from treecast.wire.codec.messages import (
    decode_finish_reason,
    decode_heartbeat,
    decode_hello,
    decode_law,
    decode_logprobs,
    decode_sampling,
    decode_session_key,
    decode_speculation,
    decode_usage,
    encode_finish_reason,
    encode_heartbeat,
    encode_hello,
    encode_law,
    encode_logprobs,
    encode_proposal,
    encode_sampling,
    encode_session_key,
    encode_usage,
)
from treecast.wire.codec.rounds import decode_round, encode_round
from treecast.wire.codec.serve import (
    decode_router_frames,
    decode_serving_frames,
    encode_router_frames,
    encode_serving_frames,
)
from treecast.wire.codec.speculate import (
    decode_speculator_frames,
    decode_verifier_frames,
    encode_speculator_frames,
    encode_verifier_frames,
)
from treecast.wire.codec.trees import decode_tree, encode_tree

__all__ = [
    "Limits",
    "decode_finish_reason",
    "decode_heartbeat",
    "decode_hello",
    "decode_law",
    "decode_logprobs",
    "decode_round",
    "decode_router_frames",
    "decode_sampling",
    "decode_serving_frames",
    "decode_session_key",
    "decode_speculation",
    "decode_speculator_frames",
    "decode_tree",
    "decode_usage",
    "decode_verifier_frames",
    "encode_finish_reason",
    "encode_heartbeat",
    "encode_hello",
    "encode_law",
    "encode_logprobs",
    "encode_proposal",
    "encode_round",
    "encode_router_frames",
    "encode_sampling",
    "encode_serving_frames",
    "encode_session_key",
    "encode_speculator_frames",
    "encode_tree",
    "encode_usage",
    "encode_verifier_frames",
]

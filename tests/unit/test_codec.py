"""What crosses the wire comes back the same; what a hostile peer sends is refused first."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.errors import InvalidFrame, InvalidRequest, InvalidTree, Overloaded, TreecastError
from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.params import PROPOSALS, Law, Proposal, SamplingParams, SpeculationParams
from treecast.tree import ROOT, TokenTree
from treecast.v1 import pair_pb2, sampling_pb2, speculator_pb2, tree_pb2, verifier_pb2
from treecast.wire import codec
from treecast.wire.codec import bounds
from treecast.wire.codec.trees import confidence_byte
from treecast.wire.frames import (
    Attach,
    BadFrame,
    Cancel,
    Commit,
    Completed,
    Cost,
    Detach,
    Draft,
    Failed,
    FinishReason,
    Forget,
    Heartbeat,
    Hello,
    NeedSync,
    Progress,
    Refused,
    Role,
    SessionKey,
    Start,
    Usage,
)

uint32 = st.integers(0, 2**32 - 1)
uint64 = st.integers(0, 2**64 - 1)
tokens = st.lists(st.integers(0, 9), max_size=8).map(tuple)
names = st.text(max_size=20)
float32 = st.floats(-1e6, 1e6, width=32)


def thousandths(low: int, high: int) -> st.SearchStrategy[float]:
    return st.integers(low, high).map(lambda n: n / 1000)


samplings = st.builds(
    SamplingParams,
    temperature=thousandths(0, 2000),
    top_k=st.integers(0, 2**31 - 1),
    top_p=thousandths(1, 1000),
    min_p=thousandths(0, 1000),
    repetition_penalty=thousandths(10, 10_000),
    presence_penalty=thousandths(-2000, 2000),
    frequency_penalty=thousandths(-2000, 2000),
    logit_bias=st.dictionaries(uint32, thousandths(-9000, 9000), max_size=4),
    seed=st.none() | uint64,
    max_tokens=st.integers(1, 2**32 - 1),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    stop_token_ids=st.lists(uint32, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
sessions = st.builds(SessionKey, names, st.text(min_size=1, max_size=20), uint64)
hellos = st.builds(
    Hello,
    instance_id=st.text(min_size=1, max_size=20),
    role=st.sampled_from(Role),
    vocab_size=uint32,
    tokenizer_hash=names,
    laws=st.lists(st.sampled_from(Law), max_size=3).map(tuple),
    capacity=uint32,
    proposers=st.lists(names, max_size=8).map(tuple),
    model=names,
    model_revision=names,
    fingerprint=names,
    context_tokens=uint32,
    shares_cores=st.booleans(),
    protocol_version=uint32,
)
heartbeats = st.builds(Heartbeat, uint64, *[uint32] * 7, st.booleans())
depths = st.lists(st.tuples(uint32, uint32), max_size=32)
usages = depths.flatmap(
    lambda pairs: st.builds(
        Usage,
        *[uint32] * 6,
        accepted_by_depth=st.just(tuple(a for a, _ in pairs)),
        offered_by_depth=st.just(tuple(o for _, o in pairs)),
    )
)


@st.composite
def speculations(draw: st.DrawFn, max_nodes: st.SearchStrategy[int | None]) -> SpeculationParams:
    law = draw(st.sampled_from(Law))
    proposal = draw(st.sampled_from(PROPOSALS[law]))
    return SpeculationParams(law, proposal, draw(st.text(max_size=256)), draw(max_nodes))


@st.composite
def attaches(draw: st.DrawFn) -> Attach:
    text = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    return Attach(
        handle=draw(uint64),
        tokens=tuple(text),
        prompt_len=draw(st.integers(1, len(text))),
        sampling=draw(samplings),
        noise_key=draw(uint64),
        node_budget=draw(st.integers(0, 256)),
        speculation=draw(speculations(st.none())),
        tokens_per_s=draw(st.floats(0, 1e6, width=32)),
    )


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Random trees whose confidences are ones that a byte can hold."""
    tree = TokenTree()
    for _ in range(draw(st.integers(0, 40))):
        open_nodes = [n for n in range(len(tree)) if tree.depths[n] < 32]
        parent = draw(st.sampled_from([ROOT, *open_nodes]))
        token = draw(st.integers(0, 9))
        if tree.child(parent, token) is None:
            belief = math.exp(-draw(st.integers(0, 255)) / 8)
            tree.add(token, parent, belief, draw(st.integers(1, 255)))
    return tree


@st.composite
def progresses(draw: st.DrawFn) -> Progress:
    output = draw(tokens)
    one = st.lists(st.tuples(uint32, float32), max_size=3).map(
        lambda top: TokenLogprobs(-0.5, tuple(i for i, _ in top), tuple(v for _, v in top))
    )
    logprobs = draw(st.just(()) | st.tuples(*[one] * len(output)))
    cost = Cost(len(output), draw(st.integers(0, 256)) * len(output), len(output))
    return Progress(draw(uint64), draw(st.integers(0, 1000)), output, logprobs, cost)


verifier_frames = st.one_of(
    hellos,
    heartbeats,
    attaches(),
    st.builds(Commit, uint64, st.integers(0, 2**19), tokens, st.integers(0, 256)),
    st.builds(Detach, uint64),
)
speculator_frames = st.one_of(
    hellos,
    heartbeats,
    st.builds(Draft, uint64, st.integers(0, 2**20), trees()),
    st.builds(NeedSync, uint64),
    st.builds(Refused, uint64, names),
)
router_frames = st.one_of(
    hellos,
    heartbeats,
    st.builds(
        Start,
        handle=uint64,
        request_id=names,
        prompt=tokens,
        sampling=samplings,
        noise_key=uint64,
        committed=tokens,
        session=st.none() | sessions,
        speculation=speculations(st.none() | uint32),
        deadline_ms=st.none() | uint32,
        truncate_prompt=st.booleans(),
    ),
    st.builds(Cancel, uint64),
    st.builds(Forget, sessions),
)
serving_frames = st.one_of(
    hellos,
    heartbeats,
    progresses(),
    st.builds(Completed, uint64, st.sampled_from(FinishReason), usages, st.integers(0, 4096)),
)


@given(st.lists(verifier_frames, max_size=4))
@settings(deadline=None)
def test_verifier_frames_survive_when_sent(frames: list[object]) -> None:
    message = codec.encode_verifier_frames(frames)  # type: ignore[arg-type]
    copy = speculator_pb2.SpeculateRequest.FromString(message.SerializeToString())
    assert list(codec.decode_verifier_frames(copy)) == frames


@given(st.lists(speculator_frames, max_size=4))
@settings(deadline=None)
def test_speculator_frames_survive_when_sent(frames: list[object]) -> None:
    message = codec.encode_speculator_frames(frames)  # type: ignore[arg-type]
    copy = speculator_pb2.SpeculateResponse.FromString(message.SerializeToString())
    assert list(codec.decode_speculator_frames(copy)) == frames


@given(st.lists(router_frames, max_size=4))
@settings(deadline=None)
def test_router_frames_survive_when_sent(frames: list[object]) -> None:
    message = codec.encode_router_frames(frames)  # type: ignore[arg-type]
    copy = verifier_pb2.ServeRequest.FromString(message.SerializeToString())
    assert list(codec.decode_router_frames(copy)) == frames


@given(st.lists(serving_frames, max_size=4))
@settings(deadline=None)
def test_serving_frames_survive_when_sent(frames: list[object]) -> None:
    message = codec.encode_serving_frames(frames)  # type: ignore[arg-type]
    copy = verifier_pb2.ServeResponse.FromString(message.SerializeToString())
    assert list(codec.decode_serving_frames(copy)) == frames


def test_failed_keeps_error_when_sent() -> None:
    message = codec.encode_serving_frames([Failed(3, Overloaded("queue is full", 2.5))])
    (frame,) = codec.decode_serving_frames(message)
    assert isinstance(frame, Failed)
    assert frame.handle == 3
    assert type(frame.error) is Overloaded
    assert frame.error.message == "queue is full"
    assert frame.error.retry_after_s == 2.5


@given(st.floats(0, 100, width=32, exclude_min=True))
@settings(deadline=None)
def test_any_float32_survives_when_sent(temperature: float) -> None:
    """Not only short decimals: what a float32 holds comes back as that float32."""
    sent = codec.encode_sampling(SamplingParams(temperature=temperature))
    assert np.float32(codec.decode_sampling(sent).temperature) == np.float32(temperature)


def test_sampling_has_documented_defaults_when_nothing_is_set() -> None:
    params = codec.decode_sampling(sampling_pb2.SamplingParams())
    assert params == SamplingParams()
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 1.0, 256)
    assert (params.seed, params.logprobs) == (None, None)


def test_zero_is_kept_when_it_is_set() -> None:
    sent = sampling_pb2.SamplingParams(temperature=0, seed=0, logprobs=0)
    params = codec.decode_sampling(sent)
    assert (params.temperature, params.seed, params.logprobs) == (0.0, 0, 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", float("nan"), "temperature is nan; allowed: finite"),
        ("temperature", float("inf"), "temperature is inf; allowed: finite"),
        ("temperature", 100.5, "temperature is 100.5; allowed: 0..100"),
        ("top_p", 0.0, "top_p is 0.0; allowed: (0, 1]"),
        ("top_p", 1.1, "top_p is 1.1; allowed: (0, 1]"),
        ("min_p", -0.1, "min_p is -0.1; allowed: 0..1"),
        ("presence_penalty", 101.0, "presence_penalty is 101.0; allowed: -100..100"),
        ("max_tokens", 0, "max_tokens is 0; allowed: 1 or more"),
        ("logprobs", 21, "logprobs is 21; allowed: 0..20"),
    ],
)
def test_sampling_is_refused_by_name_when_out_of_bounds(
    field: str, value: float, message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        codec.decode_sampling(sampling_pb2.SamplingParams(**{field: value}))  # type: ignore[arg-type]
    assert refused.value.message == message


def test_law_is_replay_when_unspecified_and_refused_when_unknown() -> None:
    assert codec.decode_law(0) is Law.REPLAY
    with pytest.raises(InvalidRequest, match=r"law is 9; known: 1 \(replay\), 2 \(mss\)"):
        codec.decode_law(9)


def test_proposal_is_the_laws_own_when_unspecified() -> None:
    own = {1: Proposal.COUPLED, 2: Proposal.WITHOUT_REPLACEMENT}
    for law, proposal in own.items():
        attach = speculator_pb2.Attach(law=law)  # type: ignore[arg-type]
        assert codec.decode_speculation(attach) == SpeculationParams(Law(law), proposal)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"proposal": 5},
            "proposal is 5; known: 1 (coupled), 2 (topk), 3 (iid), 4 (without_replacement)",
        ),
        (
            {"law": 2, "proposal": 1},
            "proposal under law mss is coupled; allowed: without_replacement, iid",
        ),
        (
            {"law": 2, "proposal": 2},
            "proposal under law mss is topk; allowed: without_replacement, iid",
        ),
        ({"growth": "1" * 257}, "number of characters in growth is 257; allowed: at most 256"),
    ],
)
def test_speculation_is_refused_by_name_when_it_cannot_be_served(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        codec.decode_speculation(speculator_pb2.Attach(**fields))
    assert refused.value.message == message


def test_confidence_byte_is_eighths_of_a_nat_when_encoded() -> None:
    # -8 ln(1) = 0; -8 ln(0.5) = 5.545; -8 ln(0.1) = 18.42; beyond 255 / 8 nats it is clipped.
    assert [confidence_byte(p) for p in (1.0, 0.5, 0.1, 1e-300)] == [0, 6, 18, 255]
    tree = codec.decode_tree(codec.encode_tree(TokenTree.chain([1, 2], 0.5)))
    assert tree.confidence == [math.exp(-0.75)] * 2


def test_parents_are_shifted_by_one_when_encoded() -> None:
    sent = codec.encode_tree(TokenTree.build([5, 6, 7], [ROOT, 0, ROOT]))
    assert list(sent.parents) == [0, 1, 0]


def raw_tree(**changes: object) -> tree_pb2.TokenTree:
    arrays: dict[str, object] = {
        "tokens": [5, 6],
        "parents": [0, 1],
        "log_confidence": bytes([0, 8]),
        "proposers": bytes([1, 1]),
    }
    return tree_pb2.TokenTree(**(arrays | changes))  # type: ignore[arg-type]


def chain_tree(depth: int) -> tree_pb2.TokenTree:
    return tree_pb2.TokenTree(
        tokens=[1] * depth,
        parents=range(depth),
        log_confidence=bytes(depth),
        proposers=bytes([1]) * depth,
    )


HOSTILE_TREES = [
    (raw_tree(parents=[0]), "tree arrays differ in length: 2 tokens, 1 parents, 2 confi"),
    (raw_tree(log_confidence=b"\0"), "2 parents, 1 confidences, 2 proposers"),
    (raw_tree(proposers=b"\1\1\1"), "2 confidences, 3 proposers"),
    (raw_tree(parents=[0, 2]), "node 1 has parent 1; a parent precedes its child"),
    (raw_tree(parents=[2, 1]), "node 0 has parent 1; a parent precedes its child"),
    (raw_tree(parents=[0, 4294967295]), "node 1 has parent 4294967294; a parent precedes"),
    (raw_tree(tokens=[5, 10]), "node 1 has token 10; the vocabulary has 10"),
    (raw_tree(proposers=b"\1\0"), "node 1 has proposer bits 0; the peer named 2"),
    (raw_tree(proposers=b"\4\1"), "node 0 has proposer bits 4; the peer named 2"),
    (raw_tree(tokens=[5, 5], parents=[0, 0]), "node 1 repeats token 5 among the children of"),
    (chain_tree(33), "tree has depth 33; the limit is 32"),
    (chain_tree(257), "tree has 257 nodes; the limit is 256"),
]


@pytest.mark.parametrize(("tree", "message"), HOSTILE_TREES)
def test_tree_is_refused_when_hostile(tree: tree_pb2.TokenTree, message: str) -> None:
    with pytest.raises(InvalidTree, match=message):
        codec.decode_tree(tree, codec.Limits(vocab_size=10, num_proposers=2))


def test_tree_is_kept_when_at_its_caps() -> None:
    assert max(codec.decode_tree(chain_tree(32)).depths) == 32
    wide = TokenTree.build(range(256), [ROOT] * 256)
    assert len(codec.decode_tree(codec.encode_tree(wide))) == 256


# Equal siblings are found while building, which is linear and capped by then.
@pytest.mark.parametrize("tree", [tree for tree, why in HOSTILE_TREES if "repeats" not in why])
def test_nothing_is_built_when_a_tree_is_refused(
    tree: tree_pb2.TokenTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arrays: object) -> TokenTree:
        raise AssertionError("built before it was checked")

    monkeypatch.setattr(TokenTree, "build", build)
    with pytest.raises(InvalidTree):
        codec.decode_tree(tree, codec.Limits(vocab_size=10, num_proposers=2))


@st.composite
def any_tree_messages(draw: st.DrawFn) -> tree_pb2.TokenTree:
    """Arrays of nearly equal lengths, so that many get past the first check."""
    count = draw(st.integers(0, 12))
    return tree_pb2.TokenTree(
        tokens=draw(st.lists(st.integers(0, 11), min_size=count, max_size=count)),
        parents=[draw(st.integers(0, node + 1)) for node in range(count)],
        log_confidence=draw(st.binary(min_size=count, max_size=count + 1)),
        proposers=draw(st.binary(min_size=count, max_size=count)),
    )


@given(any_tree_messages())
@settings(deadline=None)
def test_tree_is_sound_or_refused_when_it_is_anything(message: tree_pb2.TokenTree) -> None:
    try:
        tree = codec.decode_tree(message, codec.Limits(vocab_size=10))
    except InvalidTree:
        return
    tree.validate(vocab_size=10)


def up(**frame: object) -> speculator_pb2.SpeculateResponse:
    return speculator_pb2.SpeculateResponse(frames=[speculator_pb2.SpeculatorFrame(**frame)])  # type: ignore[arg-type]


def down(**frame: object) -> speculator_pb2.SpeculateRequest:
    return speculator_pb2.SpeculateRequest(frames=[speculator_pb2.VerifierFrame(**frame)])  # type: ignore[arg-type]


def test_bad_frame_names_its_session_when_neighbours_are_sound() -> None:
    message = up(draft=speculator_pb2.Draft(handle=1, base_len=4, tree=raw_tree()))
    message.frames.add().draft.CopyFrom(
        speculator_pb2.Draft(handle=2, base_len=4, tree=raw_tree(parents=[0, 2]))
    )
    message.frames.add().need_sync.handle = 3
    sound, bad, sync = codec.decode_speculator_frames(message)
    assert isinstance(sound, Draft)
    assert isinstance(bad, BadFrame)
    assert bad.handle == 2
    assert isinstance(bad.cause, InvalidTree)
    assert bad.message == "node 1 has parent 1; a parent precedes its child"
    assert sync == NeedSync(3)


@pytest.mark.parametrize(
    ("attach", "message"),
    [
        ({}, "attach has prompt_len 0; allowed: 1..0, its tokens"),
        ({"tokens": [1], "prompt_len": 2}, "attach has prompt_len 2; allowed: 1..1, its tokens"),
        ({"tokens": [1, 10], "prompt_len": 1}, "token 1 of attach is 10; the vocabulary has 10"),
    ],
)
def test_attach_is_refused_when_malformed(attach: dict[str, object], message: str) -> None:
    body = speculator_pb2.Attach(handle=7, **attach)  # type: ignore[arg-type]
    (bad,) = codec.decode_verifier_frames(down(attach=body), codec.Limits(vocab_size=10))
    assert isinstance(bad, BadFrame)
    assert (bad.handle, bad.message) == (7, message)


def test_frame_is_refused_when_its_text_is_too_long() -> None:
    long = [1] * (bounds.MAX_TOKENS + 1)
    (bad,) = codec.decode_verifier_frames(down(attach=speculator_pb2.Attach(tokens=long)))
    assert str(bad) == "number of tokens in attach is 1048577; the limit is 1048576"
    commit = speculator_pb2.Commit(from_len=bounds.MAX_TOKENS, tokens=[1])
    (bad,) = codec.decode_verifier_frames(down(commit=commit))
    assert str(bad) == "text length after a commit is 1048577; the limit is 1048576"
    draft = speculator_pb2.Draft(base_len=bounds.MAX_TOKENS + 1)
    (bad,) = codec.decode_speculator_frames(up(draft=draft))
    assert str(bad) == "base_len of a draft is 1048577; the limit is 1048576"


def test_node_budget_is_capped_when_beyond_the_receivers_cap() -> None:
    commit = speculator_pb2.Commit(tokens=[1], node_budget=100_000)
    (frame,) = codec.decode_verifier_frames(down(commit=commit), codec.Limits(max_nodes=64))
    assert isinstance(frame, Commit)
    assert frame.node_budget == 64


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_frame_is_refused_when_its_rate_is_no_rate(rate: float) -> None:
    commit = speculator_pb2.Commit(tokens=[1], tokens_per_s=rate)
    (bad,) = codec.decode_verifier_frames(down(commit=commit))
    assert str(bad) == f"tokens_per_s is {rate}; it must be finite and not negative"


def test_message_is_refused_when_it_has_too_many_frames() -> None:
    frame = speculator_pb2.SpeculatorFrame(need_sync=speculator_pb2.NeedSync(handle=1))
    message = speculator_pb2.SpeculateResponse(frames=[frame] * 4097)
    with pytest.raises(InvalidFrame, match="number of frames in a message is 4097; the limit"):
        list(codec.decode_speculator_frames(message))


def test_frame_without_a_session_is_an_error_value_when_malformed() -> None:
    unknown, nameless = codec.decode_speculator_frames(
        speculator_pb2.SpeculateResponse(
            frames=[
                speculator_pb2.SpeculatorFrame(),
                speculator_pb2.SpeculatorFrame(hello=pair_pb2.Hello(role=pair_pb2.ROLE_VERIFIER)),
            ]
        )
    )
    assert str(unknown) == "frame has no kind that this version knows"
    assert str(nameless) == "hello has an empty instance_id"
    assert not isinstance(unknown, BadFrame)


def test_serving_frames_are_refused_when_their_lists_disagree() -> None:
    message = verifier_pb2.ServeResponse()
    message.frames.add().progress.CopyFrom(
        verifier_pb2.Progress(
            handle=1, tokens=[1, 2], logprobs=[sampling_pb2.TokenLogprobs(chosen=-1)]
        )
    )
    message.frames.add().completed.CopyFrom(
        verifier_pb2.Completed(handle=2, reason=1, usage=verifier_pb2.Usage(accepted_by_depth=[1]))  # type: ignore[arg-type]
    )
    message.frames.add().completed.CopyFrom(verifier_pb2.Completed(handle=3))
    assert [(bad.handle, str(bad)) for bad in codec.decode_serving_frames(message)] == [  # type: ignore[union-attr]
        (1, "progress has 1 logprobs for 2 tokens"),
        (2, "usage has 1 accepted depths and 0 offered depths"),
        (3, "finish reason is 0; known: 1..5"),
    ]


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (Cost(steps=3), "number of steps in progress is 3; the limit is 2"),
        (Cost(drafted=513), "number of drafted nodes in progress is 513; the limit is 512"),
        (Cost(accepted=3), "number of accepted nodes in progress is 3; the limit is 2"),
    ],
)
def test_progress_is_refused_when_its_tokens_cannot_have_cost_that(
    cost: Cost, message: str
) -> None:
    sent = codec.encode_serving_frames([Progress(1, 0, (5, 6), cost=cost)])
    (bad,) = codec.decode_serving_frames(sent)
    assert (str(bad), type(bad)) == (message, BadFrame)


def test_start_is_refused_as_a_request_when_its_sampling_is_bad() -> None:
    message = verifier_pb2.ServeRequest()
    message.frames.add().start.CopyFrom(
        verifier_pb2.Start(
            handle=4, prompt=[1], sampling=sampling_pb2.SamplingParams(temperature=-1)
        )
    )
    (bad,) = codec.decode_router_frames(message)
    assert isinstance(bad, BadFrame)
    assert isinstance(bad.cause, InvalidRequest)


def test_start_is_refused_as_a_request_when_its_priority_is_out_of_bounds() -> None:
    message = verifier_pb2.ServeRequest()
    message.frames.add().start.CopyFrom(verifier_pb2.Start(handle=4, prompt=[1], priority=-11))
    (bad,) = codec.decode_router_frames(message)
    assert str(bad) == "size of priority is 11; the limit is 10"


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_give_frames_or_typed_errors_when_they_parse(data: bytes) -> None:
    try:
        message = verifier_pb2.ServeRequest.FromString(data)
    except DecodeError:
        return
    for frame in codec.decode_router_frames(message):
        assert isinstance(frame, TreecastError) or codec.encode_router_frames([frame])


def test_heartbeat_counts_are_capped_when_beyond_uint32() -> None:
    sent = codec.encode_heartbeat(Heartbeat(step_age_ms=2**40))
    assert codec.decode_heartbeat(sent).step_age_ms == 2**32 - 1


def test_biases_are_counted_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs microseconds, and a message has room for hundreds of thousands."""

    def refuse(value: float) -> float:
        raise AssertionError("a value was read")

    monkeypatch.setattr("treecast.wire.codec.messages.shortest", refuse)
    message = sampling_pb2.SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))
    with pytest.raises(InvalidRequest, match="number of logit_bias entries is 1025"):
        codec.decode_sampling(message)

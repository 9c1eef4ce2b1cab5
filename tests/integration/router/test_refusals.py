"""What the router refuses, by name and value."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from treecast.errors import (
    DuplicateRequest,
    InvalidRequest,
    NotServed,
    Overloaded,
    PromptTooLong,
    TreecastError,
)
from treecast.services.router import admission
from treecast.v1 import sampling_pb2

from ..scripted_verifier import ScriptedVerifier, output_of
from .rig import HELLO, RouterClient

LAW_MSS = sampling_pb2.LAW_MSS
PROPOSAL_COUPLED = sampling_pb2.PROPOSAL_COUPLED
TOO_LONG = "x" * 512  # and the token that begins every text


@pytest.mark.parametrize(
    ("request_fields", "kind", "message"),
    [
        ({"text": ""}, InvalidRequest, "prompt is empty"),
        ({"tokens": {}}, InvalidRequest, "prompt is empty"),
        ({"chat": {}}, InvalidRequest, "prompt is empty"),
        (
            {"chat": {"messages": [{"role": "robot", "content": "x"}]}},
            InvalidRequest,
            "role is 'robot'; allowed: system, user, assistant",
        ),
        (
            {"tokens": {"ids": [1, 258]}},
            InvalidRequest,
            "token id 258 is unknown; the vocabulary has 258",
        ),
        (
            {"resume": {"committed": [300], "model_revision": "r1"}},
            InvalidRequest,
            "token id 300 is unknown; the vocabulary has 258",
        ),
        ({"text": TOO_LONG}, PromptTooLong, "prompt has 513 tokens; the limit is 512"),
        (
            {"text": "x" * 2049},
            PromptTooLong,
            "prompt has 2049 characters; the limit is 512 tokens, which have 2048 at most",
        ),
        (
            {"request_id": "x" * 129},
            InvalidRequest,
            "request_id has 129 characters; allowed: 1..128",
        ),
        ({"request_id": ""}, InvalidRequest, "request_id has 0 characters; allowed: 1..128"),
        (
            {"session_id": "x" * 129},
            InvalidRequest,
            "session_id has 129 characters; allowed: 1..128",
        ),
        ({"priority": 11}, InvalidRequest, "priority is 11; allowed: -10..10"),
        ({"priority": -11}, InvalidRequest, "priority is -11; allowed: -10..10"),
        ({"num_samples": 0}, InvalidRequest, "num_samples is 0; allowed: 1..16"),
        ({"num_samples": 17}, InvalidRequest, "num_samples is 17; allowed: 1..16"),
        (
            {"sampling": {"temperature": float("nan")}},
            InvalidRequest,
            "temperature is nan; allowed: finite",
        ),
        ({"sampling": {"top_p": 0}}, InvalidRequest, "top_p is 0.0; allowed: (0, 1]"),
        ({"sampling": {"max_tokens": 0}}, InvalidRequest, "max_tokens is 0; allowed: 1 or more"),
        (
            {"sampling": {"stop_token_ids": [258]}},
            InvalidRequest,
            "token id in stop_token_ids is 258; allowed: below the vocabulary size 258",
        ),
        ({"law": 9}, InvalidRequest, "law is 9; known: 1 (replay), 2 (mss)"),
        (
            {"law": LAW_MSS, "proposal": PROPOSAL_COUPLED},
            InvalidRequest,
            "proposal under law mss is coupled; allowed: without_replacement, iid",
        ),
        (
            {"growth": "9" * 257},
            InvalidRequest,
            "number of characters in growth is 257; allowed: at most 256",
        ),
        (
            {"growth": "wide"},
            InvalidRequest,
            "growth is 'wide'; it must be best-first, dp, dp:NODES or "
            "dp:NODES:FIXED_MS,ROW_MS,PASS_MS, or widths by level such as <1,1,3>",
        ),
        (
            {"law": LAW_MSS, "growth": "<3,65>"},
            InvalidRequest,
            "growth under law mss has a width of 65; at most 64 draws are made below a node",
        ),
        (
            {"law": LAW_MSS, "growth": "best-first"},
            InvalidRequest,
            "growth under law mss is 'best-first'; allowed: widths by level such as <3,2,1,1>",
        ),
        (
            {"law": LAW_MSS},
            NotServed,
            "law mss is not served by model 'bytes'; served: replay",
        ),
        ({"model": "other"}, NotServed, "model 'other' is not served; served: bytes"),
        (
            {"resume": {"committed": [97], "model_revision": "r0"}},
            NotServed,
            "revision 'r0' of model 'bytes' is not served any more; served: r1",
        ),
        (
            {"resume": {"committed": [97]}, "num_samples": 2},
            InvalidRequest,
            "num_samples is 2; a resumed request has 1",
        ),
        (
            {"resume": {"committed": [97]}, "sampling": {"temperature": 1}},
            InvalidRequest,
            "resume needs sampling.seed, as the first stream's Started gave it",
        ),
        (
            {"resume": {"committed": [97] * 6}},
            InvalidRequest,
            "resume has 6 committed tokens; max_tokens is 5",
        ),
        (
            {"resume": {"committed": [97]}, "sampling": {"temperature": 0, "max_tokens": 512}},
            PromptTooLong,
            "prompt has 6 tokens and max_tokens is 512; the limit is 512 together",
        ),
    ],
)
async def test_request_is_refused_by_name_and_value_when_it_is_out_of_bounds(
    verifier: ScriptedVerifier,
    client: RouterClient,
    request_fields: dict[str, Any],
    kind: type[TreecastError],
    message: str,
) -> None:
    with pytest.raises(TreecastError) as refusal:
        await client.generate(**request_fields).read_all()
    assert (type(refusal.value), refusal.value.message) == (kind, message)
    assert verifier.started == []
    assert client.metric("requests_total", outcome=kind.reason.lower()) == 1


async def test_long_prompt_is_passed_on_when_it_may_be_truncated(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    await client.generate(text=TOO_LONG, truncate_prompt=True).read_all()
    assert len(verifier.started[0].prompt) == 512  # its end; the verifier makes room for output


async def test_few_long_prompts_are_encoded_at_once(
    client: RouterClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = 0, 0
    full, proceed, lock = threading.Event(), threading.Event(), threading.Lock()
    plainly = admission.encode

    def held(prompt: Any, *given: Any) -> tuple[int, ...]:
        nonlocal running, most
        if prompt.text == "short":
            return plainly(prompt, *given)
        with lock:
            running += 1
            most = max(most, running)
        if most == admission.NUM_ENCODERS:
            full.set()
        proceed.wait(10)
        with lock:
            running -= 1
        return plainly(prompt, *given)

    monkeypatch.setattr(admission, "encode", held)
    calls = [client.generate(text="x" * 501) for _ in range(2 * admission.NUM_ENCODERS)]
    long = asyncio.gather(*(call.read_all() for call in calls))
    await asyncio.to_thread(full.wait, 10)
    await client.generate(text="short").read_all()  # by now the others would have begun
    proceed.set()
    await long
    assert most == admission.NUM_ENCODERS


async def test_second_request_is_refused_when_its_id_is_running(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    first = await client.generate(request_id="r").read_tokens(1)
    with pytest.raises(DuplicateRequest, match=r"^request 'r' is running$"):
        await client.generate(request_id="r").read_all()
    verifier.allow(4)
    assert (await first.read_all()).tokens() == output_of(HELLO, 5)
    verifier.allow(5)
    await client.generate(request_id="r").read_all()


async def test_verifiers_refusal_reaches_the_client_as_it_is(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.refusal = Overloaded("pool has 3 free pages; 5 are needed", retry_after_s=2.5)
    with pytest.raises(Overloaded, match=r"^pool has 3 free pages; 5 are needed$") as refusal:
        await client.generate().read_all()
    assert refusal.value.retry_after_s == 2.5


async def test_prompt_is_refused_when_the_template_makes_nothing_of_it(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.files.chat_template = "{{ '' }}"
    chat = {"messages": [{"role": "user", "content": "x"}]}
    with pytest.raises(InvalidRequest, match=r"^prompt is empty$"):
        await client.generate(chat=chat).read_all()

"""From what a caller says to the request that travels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from treecast.errors import InvalidRequest
from treecast.sampling.params import SamplingParams, SpeculationParams
from treecast.v1 import router_pb2
from treecast.wire import codec
from treecast.wire.codec.bounds import UINT32_MAX


class ChatMessage(TypedDict):
    """One turn of a chat; the role is "system", "user" or "assistant"."""

    role: str
    content: str


Prompt = str | Sequence[ChatMessage] | Sequence[int]
"""Text as it is, a chat for the model's template, or token ids."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Everything about a request but its prompt and sampling; None leaves it to the router.

    Attributes:
        request_id: at most 128 characters; the router mints one otherwise.
        model: name of a served model.
        adapter: name of a LoRA adapter to compute it with.
        session_id: requests of one session reuse the KV cache of what their prompts share.
        priority: -10..10, higher goes first.
        num_samples: continuations of the same prompt, 1..16.
        speculation: law, proposal, growth and size of the trees.
        truncate_prompt: keep the end of a prompt that is too long, instead of refusing it.
        report_rounds: have each chunk hold the rounds that made it, which `treecast trace` draws.
    """

    request_id: str | None = None
    model: str | None = None
    adapter: str | None = None
    session_id: str | None = None
    priority: int = 0
    num_samples: int | None = None
    speculation: SpeculationParams = SpeculationParams()  # noqa: RUF009  frozen
    truncate_prompt: bool = False
    report_rounds: bool = False


def build_request(
    prompt: Prompt, sampling: SamplingParams, options: RequestOptions
) -> router_pb2.GenerateRequest:
    """Translate a call to its message.

    Raises:
        InvalidRequest: the prompt is of no known kind, or a number does not fit its field.
    """
    try:
        request = router_pb2.GenerateRequest(
            request_id=options.request_id,
            model=options.model,
            adapter=options.adapter or "",
            session_id=options.session_id,
            priority=options.priority,
            num_samples=options.num_samples,
            max_nodes=options.speculation.max_nodes,
            truncate_prompt=options.truncate_prompt,
            report_rounds=options.report_rounds,
            sampling=codec.encode_sampling(sampling),
            law=codec.encode_law(options.speculation.law),
            proposal=codec.encode_proposal(options.speculation.proposal),
            growth=options.speculation.growth,
        )
        _set_prompt(request, prompt)
    except ValueError as error:  # protobuf's, for a number out of its field's range
        raise InvalidRequest(f"a value of the request is out of range: {error}") from error
    return request


def build_drain(target: str, hand_over_after_s: float | None) -> router_pb2.DrainRequest:
    """Raises InvalidRequest: the time is below 0, or does not fit its field."""
    if hand_over_after_s is None:
        return router_pb2.DrainRequest(target=target)
    most_s = UINT32_MAX // 1000
    if not 0 <= hand_over_after_s <= most_s:
        raise InvalidRequest(f"hand_over_after_s is {hand_over_after_s:g}; allowed: 0..{most_s}")
    return router_pb2.DrainRequest(
        target=target, hand_over_after_ms=round(1000 * hand_over_after_s)
    )


def _set_prompt(request: router_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise InvalidRequest(
            f"prompt is a {type(prompt).__name__}; "
            "allowed: str, list of messages, list of token ids"
        )
    if not prompt:
        raise InvalidRequest("prompt is empty; it needs at least one message or token id")
    if isinstance(prompt[0], Mapping):
        request.chat.messages.extend(_message(item, at) for at, item in enumerate(prompt))
    else:
        request.tokens.ids.extend(_token_id(item, at) for at, item in enumerate(prompt))


def _message(item: object, at: int) -> router_pb2.ChatMessage:
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise InvalidRequest(f"message {at} of the prompt must have exactly role and content")
    if not all(isinstance(value, str) for value in item.values()):
        raise InvalidRequest(f"role and content of message {at} of the prompt must be text")
    return router_pb2.ChatMessage(role=item["role"], content=item["content"])


def _token_id(item: object, at: int) -> int:
    if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 2**32:
        raise InvalidRequest(f"token id {at} of the prompt is {item!r}; allowed: 0..2**32-1")
    return item

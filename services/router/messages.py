"""RouterService's messages to domain values and back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from treecast.adapter import NAME_FORM, Adapter, is_adapter_name
from treecast.drafting.drawn import check_growth
from treecast.errors import InvalidRequest
from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.params import SamplingParams, SpeculationParams
from treecast.v1 import router_pb2 as pb
from treecast.wire import codec
from treecast.wire.codec.bounds import MAX_PRIORITY, MAX_TOKENS
from treecast.wire.frames import Completed, Hello
from treecast.wire.rounds import Round

from .text import ChatMessage

MAX_ID_CHARACTERS = 128
MAX_SAMPLES = 16
MAX_CHAT_MESSAGES = 4096


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class Ask:
    """What a client asks for. The seed is always set, drawn here if the client left it open.

    Attributes:
        committed: output that the client has received already.
        revision, adapter_revision: the only one that will do; None for any.
        fingerprint: numerics that produced `committed`; empty if unknown.
    """

    request_id: str
    model: str | None
    prompt: Prompt
    sampling: SamplingParams
    seed: int
    session_id: str | None
    priority: int
    num_samples: int
    committed: tuple[int, ...]
    revision: str | None
    fingerprint: str
    speculation: SpeculationParams
    truncate_prompt: bool
    report_rounds: bool
    adapter: str
    adapter_revision: str | None

    def largest_cost(self, prompt_tokens: int) -> int:
        """Tokens that it may take: its prompt and all output, that it has already included.

        A resumed request's output is computed like a prompt where its KV is not at hand, and nobody
        can tell whether it was ever generated.
        """
        return prompt_tokens + self.num_samples * self.sampling.max_tokens


def parse_ask(message: pb.GenerateRequest) -> Ask:
    """Everything that can be checked without knowing the model.

    Raises:
        InvalidRequest: a value out of its bounds, by name.
    """
    sampling = codec.decode_sampling(message.sampling)
    _check_range("committed tokens", len(message.resume.committed), 0, MAX_TOKENS)
    max_nodes = message.max_nodes if message.HasField("max_nodes") else None
    ask = Ask(
        request_id=message.request_id if message.HasField("request_id") else _mint_id(),
        model=message.model if message.HasField("model") else None,
        prompt=_parse_prompt(message),
        sampling=sampling,
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed,
        session_id=message.session_id if message.HasField("session_id") else None,
        priority=message.priority,
        num_samples=message.num_samples if message.HasField("num_samples") else 1,
        committed=tuple(message.resume.committed),
        revision=message.resume.model_revision or None,
        fingerprint=message.resume.numerics_fingerprint,
        speculation=codec.decode_speculation(message, max_nodes),
        truncate_prompt=message.truncate_prompt,
        report_rounds=message.report_rounds,
        adapter=message.adapter,
        adapter_revision=message.resume.adapter_revision or None,
    )
    _check(ask)
    if message.HasField("resume"):
        _check_resume(ask)
    return replace(ask, sampling=replace(sampling, seed=ask.seed))


def _parse_prompt(message: pb.GenerateRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text" if message.text:
            return TextPrompt(message.text)
        case "chat" if message.chat.messages:
            _check_range("messages of the chat", len(message.chat.messages), 1, MAX_CHAT_MESSAGES)
            return ChatPrompt(
                tuple(ChatMessage(one.role, one.content) for one in message.chat.messages)
            )
        case "tokens" if message.tokens.ids:
            _check_range("tokens of the prompt", len(message.tokens.ids), 1, MAX_TOKENS)
            return TokenPrompt(tuple(message.tokens.ids))
    raise InvalidRequest("prompt is empty")


def _mint_id() -> str:
    return secrets.token_hex(8)


def _check(ask: Ask) -> None:
    check_id("request_id", ask.request_id)
    if ask.session_id is not None:
        check_id("session_id", ask.session_id)
    _check_range("priority", ask.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _check_range("num_samples", ask.num_samples, 1, MAX_SAMPLES)
    if ask.adapter and not is_adapter_name(ask.adapter):
        raise InvalidRequest(f"adapter is {ask.adapter[:64]!r}; a name has {NAME_FORM}")
    check_growth(ask.speculation)


def check_id(name: str, value: str) -> None:
    if not 1 <= len(value) <= MAX_ID_CHARACTERS:
        raise InvalidRequest(f"{name} has {len(value)} characters; allowed: 1..{MAX_ID_CHARACTERS}")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; allowed: {low}..{high}")


def _check_resume(ask: Ask) -> None:
    """The text goes on as it would have only under the same seed, and one sample at a time."""
    if ask.num_samples > 1:
        raise InvalidRequest(f"num_samples is {ask.num_samples}; a resumed request has 1")
    if ask.sampling.seed is None and ask.sampling.temperature > 0:
        raise InvalidRequest("resume needs sampling.seed, as the first stream's Started gave it")
    if len(ask.committed) > ask.sampling.max_tokens:
        raise InvalidRequest(
            f"resume has {len(ask.committed)} committed tokens; max_tokens is "
            f"{ask.sampling.max_tokens}"
        )


def started(
    index: int, ask: Ask, prompt: tuple[int, ...], verifier: Hello, adapter: Adapter | None
) -> pb.GenerateResponse:
    body = pb.Started(
        request_id=ask.request_id,
        seed=ask.seed,
        prompt_ids=prompt,
        model=verifier.model,
        model_revision=verifier.model_revision,
        numerics_fingerprint=verifier.fingerprint,
        adapter=adapter.name if adapter else "",
        adapter_revision=adapter.revision if adapter else "",
    )
    return pb.GenerateResponse(sample_index=index, started=body)


def delta(
    index: int,
    text: str,
    tokens: Sequence[int] = (),
    logprobs: Sequence[TokenLogprobs] = (),
    rounds: Sequence[pb.RoundReport] = (),
) -> pb.GenerateResponse:
    encoded = [codec.encode_logprobs(one) for one in logprobs]
    body = pb.Delta(text=text, token_ids=tokens, logprobs=encoded, rounds=rounds)
    return pb.GenerateResponse(sample_index=index, delta=body)


def round_report(one: Round, text: str, token_text: Callable[[int], str]) -> pb.RoundReport:
    """A round with its tokens in words; `text` is what became final with it."""
    return pb.RoundReport(
        round=codec.encode_round(one),
        text=text,
        node_texts=[token_text(token) for token in one.tree.tokens],
        bonus_text=token_text(one.bonus),
    )


def finished(
    index: int, end: Completed, placements: int, same_numerics: bool
) -> pb.GenerateResponse:
    body = pb.Finished(
        reason=codec.encode_finish_reason(end.finish),
        usage=codec.encode_usage(end.usage),
        placements=placements,
        same_numerics=same_numerics,
    )
    return pb.GenerateResponse(sample_index=index, finished=body)

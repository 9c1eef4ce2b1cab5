"""What clients may post, field by field, and the `GenerateRequest` that it means.

A field that is not here is refused by name: to ignore what a client asked for would be to lie. A
null is a field left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from treecast.errors import InvalidRequest
from treecast.sampling.params import MAX_LOGPROBS
from treecast.services.router.messages import MAX_SAMPLES
from treecast.v1 import router_pb2 as pb
from treecast.v1 import sampling_pb2

from .errors import RefusedField

ItemT = TypeVar("ItemT")
AskedT = TypeVar("AskedT", bound="Asked")

MAX_CHAT_TOKENS = 256
MAX_COMPLETION_TOKENS = 16
"""Where a request names none; the second is OpenAI's own."""

_MAX_ENTRIES = 1024
_SHOWN_CHARACTERS = 80


def _check_entries(given: Any) -> Any:  # whatever the JSON holds
    """Bounds an object before each of its entries can be at fault."""
    if isinstance(given, dict) and len(given) > _MAX_ENTRIES:
        raise ValueError(f"it has {len(given)} entries; the limit is {_MAX_ENTRIES}")
    return given


ListOf = Annotated[list[ItemT], Field(fail_fast=True)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], float], BeforeValidator(_check_entries)
]
Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:  # whatever the JSON holds
        if not isinstance(_check_entries(given), dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class StreamOptions(_Strict):
    include_usage: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """`developer` is what newer clients call the system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | ListOf[TextPart]

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class Asked(_Strict):
    """Fields of both endpoints. The second group is ours: `extra_body` of OpenAI's clients.

    Attributes:
        user: taken, and used for nothing.
    """

    default_max_tokens: ClassVar[int]

    model: str
    frequency_penalty: float | None = None
    logit_bias: Bias = {}
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    presence_penalty: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | ListOf[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None

    adapter: str = ""
    ignore_eos: bool = False
    min_p: float | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    repetition_penalty: float | None = None
    session_id: str | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report beside each one chosen; None for no report."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int:
        return self.max_tokens or self.default_max_tokens

    def to_request(self) -> pb.GenerateRequest:
        """The same for the router.

        Raises:
            InvalidRequest: text that is no Unicode, or a prompt that is missing.
        """
        try:
            request = pb.GenerateRequest(
                model=self.model,
                sampling=self._sampling(),
                num_samples=self.n,
                session_id=self.session_id,
                priority=self.priority,
                adapter=self.adapter,
            )
            self._set_prompt(request)
        except ValueError:
            raise InvalidRequest("a text of the request is not Unicode") from None
        return request

    def _sampling(self) -> sampling_pb2.SamplingParams:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return sampling_pb2.SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias={int(token): bias for token, bias in self.logit_bias.items()},
            seed=None if self.seed is None else self.seed % 2**64,
            max_tokens=self.most_tokens,
            stop=stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
        )

    def _set_prompt(self, request: pb.GenerateRequest) -> None:
        raise NotImplementedError


class ChatAsked(Asked):
    """Body of `POST /v1/chat/completions`."""

    default_max_tokens = MAX_CHAT_TOKENS

    messages: ListOf[Message]
    logprobs: bool = False
    max_completion_tokens: Count | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatAsked:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int:
        return self.max_completion_tokens or self.max_tokens or self.default_max_tokens

    def _set_prompt(self, request: pb.GenerateRequest) -> None:
        for one in self.messages:
            role = "system" if one.role == "developer" else one.role
            request.chat.messages.add(role=role, content=one.text)


class CompletionAsked(Asked):
    """Body of `POST /v1/completions`; one prompt, as text or token ids."""

    default_max_tokens = MAX_COMPLETION_TOKENS

    prompt: str | ListOf[TokenId]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def _set_prompt(self, request: pb.GenerateRequest) -> None:
        if isinstance(self.prompt, str):
            request.text = self.prompt
        else:
            request.tokens.ids.extend(self.prompt)


def parse(kind: type[AskedT], body: bytes) -> AskedT:
    """Read a body. Large ones take milliseconds, so not on an event loop.

    Raises:
        RefusedField: a field is unknown, missing or has a bad value; by its name.
        InvalidRequest: it is no JSON object.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(fault: Mapping[str, Any]) -> InvalidRequest:
    where, given = fault["loc"], fault.get("input")
    if not where:
        return InvalidRequest(f"body: {fault['msg']}")
    name = ".".join(str(part) for part in where)
    if fault["type"] == "extra_forbidden":
        return RefusedField(f"field {name!r} is not supported", name, "unsupported_parameter")
    if fault["type"] == "missing":
        return RefusedField(f"field {name!r} is missing", name, "missing_required_parameter")
    shown = repr(given)
    if len(shown) > _SHOWN_CHARACTERS:
        shown = f"a {type(given).__name__}"
    return RefusedField(f"{name} is {shown}: {fault['msg']}", name, "invalid_value")

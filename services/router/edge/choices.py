"""A router's events as the choices of an answer, whole or in pieces, in either endpoint's form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from treecast.services.router.text import ModelText
from treecast.v1 import router_pb2 as pb
from treecast.v1 import sampling_pb2
from treecast.v1 import verifier_pb2 as verifier_pb

Json = dict[str, Any]

_FINISH = {
    verifier_pb.FINISH_REASON_STOP_TOKEN: "stop",
    verifier_pb.FINISH_REASON_STOP_STRING: "stop",
    verifier_pb.FINISH_REASON_LENGTH: "length",
    verifier_pb.FINISH_REASON_DEADLINE: "length",
}


def finish_name(reason: int) -> str:
    """OpenAI's word; one that cut the output short counts as its length."""
    return _FINISH.get(verifier_pb.FinishReason.ValueType(reason), "length")


@dataclass(slots=True)
class Choice:
    """One sample so far, or what is new of it.

    Attributes:
        ids, logprobs: its tokens; as many of the second, if they were asked for.
        offset: characters of the sample's tokens before these.
    """

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[sampling_pb2.TokenLogprobs] = field(default_factory=list)
    finish: str | None = None
    offset: int = 0

    def take(self, event: pb.GenerateResponse) -> None:
        """Add a delta, or the end."""
        if event.WhichOneof("event") == "finished":
            self.finish = finish_name(event.finished.reason)
        self.text += event.delta.text
        self.ids += event.delta.token_ids
        self.logprobs += event.delta.logprobs


class Form(Protocol):
    """How an endpoint writes what was generated."""

    prefix: str
    whole: str
    chunk: str

    def opening(self, index: int) -> Json | None:
        """A stream's first piece of a choice, if there is one before its text."""

    def piece(self, choice: Choice, text: ModelText) -> Json:
        """What is new, in a stream."""

    def choice(self, choice: Choice, text: ModelText) -> Json:
        """All of it, in an answer that is not streamed."""


class ChatForm:
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, choice: Choice, text: ModelText) -> Json:
        delta = {"content": choice.text} if choice.text or choice.ids else {}
        return self._close(choice, text, "delta", delta)

    def choice(self, choice: Choice, text: ModelText) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self._close(choice, text, "message", message)

    def _close(self, choice: Choice, text: ModelText, name: str, body: Json) -> Json:
        logprobs = _chat_logprobs(choice, text) if choice.logprobs else None
        return {
            "index": choice.index,
            name: body,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }


class CompletionForm:
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def opening(self, index: int) -> Json | None:
        return None

    def piece(self, choice: Choice, text: ModelText) -> Json:
        return self.choice(choice, text)

    def choice(self, choice: Choice, text: ModelText) -> Json:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": _completion_logprobs(choice, text) if choice.logprobs else None,
            "finish_reason": choice.finish,
        }


def _chat_logprobs(choice: Choice, text: ModelText) -> Json:
    def entry(token_id: int, logprob: float) -> Json:
        token = text.token(token_id)
        utf8 = None if token.utf8 is None else list(token.utf8)
        return {"token": token.text, "logprob": logprob, "bytes": utf8}

    content = [
        entry(token_id, one.chosen) | {"top_logprobs": [entry(*pair) for pair in _top(one)]}
        for token_id, one in zip(choice.ids, choice.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _top(one: sampling_pb2.TokenLogprobs) -> Iterable[tuple[int, float]]:
    return zip(one.top_ids, one.top_logprobs, strict=True)


def _completion_logprobs(choice: Choice, text: ModelText) -> Json:
    names = [text.token(token_id).text for token_id in choice.ids]
    return {
        "tokens": names,
        "token_logprobs": [one.chosen for one in choice.logprobs],
        "top_logprobs": [
            {text.token(token_id).text: logprob for token_id, logprob in _top(one)}
            for one in choice.logprobs
        ],
        "text_offset": _offsets(names, choice.offset),
    }


def _offsets(names: Sequence[str], first: int) -> list[int]:
    offsets = [first]
    for name in names[:-1]:
        offsets.append(offsets[-1] + len(name))
    return offsets

"""From what a client asks to what can be placed: the model, its tokenizer, the prompt's tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from treecast.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotServed,
    PromptTooLong,
    TreecastError,
    Unavailable,
)
from treecast.text.tokenizer import TokenizerFiles
from treecast.v1 import verifier_pb2
from treecast.wire.frames import Hello

from .fleet import Fleet, Verifier, answer
from .messages import Ask, ChatPrompt, Prompt, TextPrompt
from .placement import choose_model
from .text import ModelText, TextCache

TOKENIZER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a request before it is placed.

    Attributes:
        model: hello of one of the verifiers that serve it.
    """

    model: Hello
    text: ModelText
    prompt: tuple[int, ...]


class Admission:
    """Checks requests against the models that are served; keeps their tokenizers."""

    def __init__(self, fleet: Fleet, grace_s: float) -> None:
        self._fleet = fleet
        self._grace_s = grace_s
        self._texts = TextCache()

    async def check(self, ask: Ask, deadline_s: float | None) -> Checked:
        """Find the model and tokenise the prompt.

        Args:
            deadline_s: time of the event loop; None for no limit.
        Raises:
            InvalidRequest: the prompt does not fit the model.
            NotServed: no such model, revision or law.
            Unavailable: no verifier was there for the grace period.
            DeadlineExceeded: nor until the deadline.
        """
        model = await self._find_model(ask, deadline_s)
        self._check_law(ask, model)
        text = await self._texts.get(
            model.model, model.model_revision, lambda: self._fetch_tokenizer(model)
        )
        prompt = await asyncio.to_thread(encode, ask.prompt, text)
        if ask.truncate_prompt:  # the verifier cuts what is too long still, with the output
            prompt = prompt[-model.context_tokens :]
        check_tokens(ask, prompt, model)
        return Checked(model, text, prompt)

    def text_of(self, model: str, revision: str) -> ModelText:
        """The tokenizer of a model that has been checked against before."""
        return self._texts.loaded(model, revision)

    async def _find_model(self, ask: Ask, deadline_s: float | None) -> Hello:
        def look() -> Hello | None:
            hellos = self._fleet.open_hellos()
            return choose_model(ask.model, ask.revision, hellos, self._fleet.models_seen)

        wait_s = self._grace_s
        if deadline_s is not None:
            wait_s = min(wait_s, deadline_s - asyncio.get_running_loop().time())
        model = await self._fleet.until(look, wait_s)
        if model is not None:
            return model
        if wait_s < self._grace_s:
            raise DeadlineExceeded("deadline passed while the request waited for a verifier")
        raise Unavailable(f"no verifier is available; waited {self._grace_s:g} s")

    def _check_law(self, ask: Ask, model: Hello) -> None:
        alike = [hello for hello in self._fleet.open_hellos() if same_model(hello, model)]
        served = {law for hello in alike for law in hello.laws}
        law = ask.speculation.law
        if law not in served:
            names = ", ".join(sorted(law.name.lower() for law in served))
            raise NotServed(
                f"law {law.name.lower()} is not served by model {model.model!r}; served: {names}"
            )

    async def _fetch_tokenizer(self, model: Hello) -> TokenizerFiles:
        """Ask the model's verifiers, one after the other, until one answers."""
        request = verifier_pb2.GetTokenizerRequest(model_revision=model.model_revision)
        problem: TreecastError = Unavailable("no verifier is available")
        asked: set[str] = set()
        while (verifier := self._not_in(asked, model)) is not None:
            asked.add(verifier.address)
            call = verifier.stub.GetTokenizer(request, timeout=TOKENIZER_TIMEOUT_S)
            try:
                files = await answer(call)
            except TreecastError as error:
                problem = error
                continue
            special_tokens = dict(files.special_tokens)
            return TokenizerFiles(files.tokenizer_json, files.chat_template, special_tokens)
        raise Unavailable(f"tokenizer of model {model.model!r} cannot be fetched: {problem}")

    def _not_in(self, asked: set[str], model: Hello) -> Verifier | None:
        for verifier in self._fleet.verifiers:
            candidate = verifier.candidate
            if candidate is None or not same_model(candidate.hello, model):
                continue
            if verifier.address not in asked:
                return verifier
        return None


def same_model(one: Hello, other: Hello) -> bool:
    return (one.model, one.model_revision) == (other.model, other.model_revision)


def encode(prompt: Prompt, text: ModelText) -> tuple[int, ...]:
    """A prompt's tokens. Long texts take milliseconds, so not for an event loop."""
    match prompt:
        case TextPrompt():
            return text.encode_text(prompt.text)
        case ChatPrompt():
            return text.encode_chat(prompt.messages)
    return prompt.ids


def check_tokens(ask: Ask, prompt: tuple[int, ...], model: Hello) -> None:
    """What can be checked once the model is known; the verifier has the last word.

    Raises:
        InvalidRequest: an unknown token id.
        PromptTooLong: the prompt alone is longer than the context.
    """
    if len(prompt) > model.context_tokens:
        raise PromptTooLong(f"prompt has {len(prompt)} tokens; the limit is {model.context_tokens}")
    ask.sampling.check_vocabulary(model.vocab_size)
    for token in (*prompt, *ask.committed):
        if token >= model.vocab_size:
            raise InvalidRequest(
                f"token id {token} is unknown; the vocabulary has {model.vocab_size}"
            )

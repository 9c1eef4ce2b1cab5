"""From what a client asks to what can be placed: the model, its tokenizer, the prompt's tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from treecast.adapter import Adapter
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
from .placement import adapter_meant, choose_adapter, choose_model
from .text import ModelText, Room, TextCache

TOKENIZER_TIMEOUT_S = 10.0

SHORT_CHARACTERS = 500
"""A prompt up to here is encoded in the time that it takes to have another thread do it."""

NUM_ENCODERS = 4
"""Long prompts that are encoded at once: a megabyte of text takes ninety of memory meanwhile."""

_MESSAGE_CHARACTERS = 50
"""What a chat's template adds to each message, roughly."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a request before it is placed.

    Attributes:
        model: hello of one of the verifiers that serve it.
        adapter: that it is to be computed with; None for the model alone.
    """

    model: Hello
    adapter: Adapter | None
    text: ModelText
    prompt: tuple[int, ...]


class Admission:
    """Checks requests against the models that are served; keeps their tokenizers."""

    def __init__(self, fleet: Fleet, grace_s: float) -> None:
        self._fleet = fleet
        self._grace_s = grace_s
        self._texts = TextCache()
        self._encoders = ThreadPoolExecutor(NUM_ENCODERS, "encoder")

    async def check(self, ask: Ask, deadline_s: float | None) -> Checked:
        """Find the model and tokenise the prompt.

        Args:
            deadline_s: time of the event loop; None for no limit.
        Raises:
            InvalidRequest: the prompt does not fit the model.
            NotServed: no such model, adapter or revision; the law, or grammars, are not served.
            Unavailable: no verifier was there for the grace period.
            DeadlineExceeded: nor until the deadline.
        """
        model, adapter = await self._find_model(ask, deadline_s)
        self._check_law(ask, model)
        self._check_grammar(ask, model)
        text = await self._texts.get(
            model.model, model.model_revision, lambda: self._fetch_tokenizer(model)
        )
        room = Room(model.context_tokens, ask.truncate_prompt)
        if num_characters(ask.prompt) > SHORT_CHARACTERS:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._encoders, encode, ask.prompt, text, room)
        else:
            prompt = encode(ask.prompt, text, room)
        if ask.truncate_prompt:  # the verifier cuts what is too long still, with the output
            prompt = prompt[-model.context_tokens :]
        check_tokens(ask, prompt, model)
        return Checked(model, adapter, text, prompt)

    def text_of(self, model: str, revision: str) -> ModelText:
        """The tokenizer of a model that has been checked against before."""
        return self._texts.loaded(model, revision)

    async def _find_model(self, ask: Ask, deadline_s: float | None) -> tuple[Hello, Adapter | None]:
        def look() -> tuple[Hello, Adapter | None] | None:
            return choose(ask, self._fleet.open_hellos(), self._fleet.models_seen)

        wait_s = self._grace_s
        if deadline_s is not None:
            wait_s = min(wait_s, deadline_s - asyncio.get_running_loop().time())
        found = await self._fleet.until(look, wait_s)
        if found is not None:
            return found
        if wait_s < self._grace_s:
            raise DeadlineExceeded("deadline passed while the request waited for a verifier")
        raise Unavailable(f"no verifier is available; waited {self._grace_s:g} s")

    def _check_law(self, ask: Ask, model: Hello) -> None:
        served = {law for hello in self._alike(model) for law in hello.laws}
        law = ask.speculation.law
        if law not in served:
            names = ", ".join(sorted(law.name.lower() for law in served))
            raise NotServed(
                f"law {law.name.lower()} is not served by model {model.model!r}; served: {names}"
            )

    def _check_grammar(self, ask: Ask, model: Hello) -> None:
        kind = ask.sampling.constraint[0]
        if kind and not any(hello.keeps_grammars for hello in self._alike(model)):
            raise NotServed(
                f"{kind} is not kept by any verifier of model {model.model!r}; one needs the "
                "package llguidance, and a model with a tokenizer and an end-of-sequence token"
            )

    def _alike(self, model: Hello) -> list[Hello]:
        return [hello for hello in self._fleet.open_hellos() if same_model(hello, model)]

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


def choose(
    ask: Ask, hellos: Sequence[Hello], remembered: Collection[str]
) -> tuple[Hello, Adapter | None] | None:
    """The model and the adapter that a request means; see `placement`.

    Returns:
        None if they are not served now but may be again.
    Raises:
        InvalidRequest, NotServed: as `choose_model` and `choose_adapter`.
    """
    name, adapter = adapter_meant(ask.model, ask.adapter, hellos)
    if not adapter:
        model = choose_model(name, ask.revision, hellos, remembered)
        return None if model is None else (model, None)
    able = [hello for hello in hellos if any(one.name == adapter for one in hello.adapters)]
    model = choose_model(name, ask.revision, able or hellos, remembered)
    if model is None:
        return None
    alike = [hello for hello in hellos if same_model(hello, model)]
    chosen = choose_adapter(adapter, ask.adapter_revision, alike, remembered)
    return None if chosen is None else (model, chosen)


def same_model(one: Hello, other: Hello) -> bool:
    return (one.model, one.model_revision) == (other.model, other.model_revision)


def num_characters(prompt: Prompt) -> int:
    """Of the text that is to be encoded, about; 0 for tokens."""
    match prompt:
        case TextPrompt():
            return len(prompt.text)
        case ChatPrompt():
            return sum(_MESSAGE_CHARACTERS + len(message.content) for message in prompt.messages)
    return 0


def encode(prompt: Prompt, text: ModelText, room: Room) -> tuple[int, ...]:
    """A prompt's tokens. Long texts take milliseconds, so not for an event loop."""
    match prompt:
        case TextPrompt():
            return text.encode_text(prompt.text, room)
        case ChatPrompt():
            return text.encode_chat(prompt.messages, room)
    return prompt.ids


def check_tokens(ask: Ask, prompt: tuple[int, ...], model: Hello) -> None:
    """What can be checked once the model is known; the verifier has the last word.

    Raises:
        InvalidRequest: no token at all, or an unknown one.
        PromptTooLong: the prompt alone is longer than the context, or the output that is taken up
            again may not fit beside it.
    """
    limit, max_tokens = model.context_tokens, ask.sampling.max_tokens
    if not prompt:
        raise InvalidRequest("prompt is empty")
    if len(prompt) > limit:
        raise PromptTooLong(f"prompt has {len(prompt)} tokens; the limit is {limit}")
    least = 1 if ask.truncate_prompt else len(prompt)
    if ask.committed and least + max_tokens > limit:
        raise PromptTooLong(
            f"prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; "
            f"the limit is {limit} together"
        )
    ask.sampling.check_vocabulary(model.vocab_size)
    for token in (*prompt, *ask.committed):
        if token >= model.vocab_size:
            raise InvalidRequest(
                f"token id {token} is unknown; the vocabulary has {model.vocab_size}"
            )

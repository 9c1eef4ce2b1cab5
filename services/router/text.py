"""Prompts to tokens and output to text, with the tokenizer's files that a verifier hands out."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treecast.errors import InvalidRequest, PromptTooLong
from treecast.text.detok import REPLACEMENT, DetokStream
from treecast.text.tokenizer import TokenizerFiles, decoder_of, longest_token

_KNOWN_TOKENS = 16_384
"""Whose texts are kept; to work one out takes two calls of the tokenizer."""

_SEAM_TOKENS = 64
"""The first tokens of a text that was cut may be others than in the whole text."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token.

    Attributes:
        utf8: its bytes, which alone may be no text; None where they cannot be known.
    """

    text: str
    utf8: bytes | None


@dataclass(frozen=True, slots=True)
class Room:
    """What a prompt has to fit into.

    Attributes:
        truncates: a longer one keeps its end.
    """

    tokens: int
    truncates: bool = False

    def fit(self, text: str, token_characters: int) -> str:
        """Bound a text before it is encoded, by the most characters that a token has.

        Returns:
            Enough of its end for the same last tokens, if it is to be cut.
        Raises:
            PromptTooLong: tokens of that length would be too many.
        """
        if self.truncates:
            return text[-(self.tokens + _SEAM_TOKENS) * token_characters :]
        if len(text) > (most := self.tokens * token_characters):
            raise PromptTooLong(
                f"prompt has {len(text)} characters; the limit is {self.tokens} tokens, "
                f"which have {most} at most"
            )
        return text


class ModelText:
    """Tokenises prompts and detokenises output of one model revision. Thread-safe."""

    def __init__(self, model: str, files: TokenizerFiles) -> None:
        """Parses the tokenizer: seconds, of which other threads get none (docs/scaling.md)."""
        self._model = model
        self._tokenizer = files.load()
        self._longest = longest_token(self._tokenizer) if self._tokenizer else 0
        self._decode = decoder_of(self._tokenizer) if self._tokenizer else _no_text
        self._template = _compile(files.chat_template)
        self._special_tokens = files.special_tokens
        self.token = functools.lru_cache(_KNOWN_TOKENS)(self._token)

    def encode_text(self, text: str, room: Room) -> tuple[int, ...]:
        """Tokens of a plain prompt, with the special tokens that the tokenizer puts around it.

        Raises:
            InvalidRequest: the text is empty, or the model has no tokenizer.
            PromptTooLong: it cannot fit, whatever its tokens are.
        """
        if not text:
            raise InvalidRequest("prompt is empty")
        return self._encode(text, room, special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage], room: Room) -> tuple[int, ...]:
        """Tokens of a chat in the model's own template, ready for the assistant's turn.

        Raises:
            InvalidRequest: no messages, an unknown role, no template, or one that refuses these
                messages.
            PromptTooLong: it cannot fit, whatever its tokens are.
        """
        if not messages:
            raise InvalidRequest("prompt is empty")
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequest(f"role is {message.role!r}; allowed: {', '.join(ROLES)}")
        return self._encode(self._render(messages), room, special_tokens=False)

    def detokenizer(self, stop: Sequence[str]) -> DetokStream:
        """A stream of output text; always empty if the model has no tokenizer.

        Raises:
            InvalidRequest: stop strings for a model without a tokenizer.
        """
        if self._tokenizer is None and stop:
            raise InvalidRequest(f"model {self._model!r} has no tokenizer; stop strings need one")
        return DetokStream(self._decode, stop)

    def _token(self, token_id: int) -> TokenText:
        """One token by itself, with the space before it, as log-probabilities name it."""
        if self._tokenizer is None:
            return TokenText("", None)
        once, twice = self._decode((token_id,)), self._decode((token_id, token_id))
        # The first token of a text may lose its space.
        text, piece = twice[len(once) :], self._tokenizer.id_to_token(token_id) or ""
        if REPLACEMENT in text:
            return TokenText(text, _bytes_of(piece))
        text = text or piece  # special tokens decode to nothing
        return TokenText(text, text.encode())

    def _encode(self, text: str, room: Room, special_tokens: bool) -> tuple[int, ...]:
        if self._tokenizer is None:
            raise InvalidRequest(
                f"model {self._model!r} has no tokenizer; send the prompt as token ids"
            )
        batch = [room.fit(text, self._longest)]
        # Unlike `encode`, lets other threads run meanwhile.
        [encoding] = self._tokenizer.encode_batch_fast(batch, add_special_tokens=special_tokens)
        return tuple(encoding.ids)

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        if self._template is None:
            raise InvalidRequest(
                f"model {self._model!r} has no chat template; send text or token ids"
            )
        try:
            return self._template.render(
                messages=[{"role": one.role, "content": one.content} for one in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"chat template refuses the messages: {error}") from error


def _bytes_of(piece: str) -> bytes | None:
    """Bytes of a token that holds a part of a character: `<0xE2>`, or in byte-level letters."""
    if named := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(named[1], 16)])
    if piece and set(piece) <= _BYTE_LETTERS.keys():
        return bytes(_BYTE_LETTERS[letter] for letter in piece)
    return None


def _byte_letters() -> dict[str, int]:
    """The letter of each byte in byte-level vocabularies (GPT-2's table).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


_BYTE_LETTERS = _byte_letters()
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")


def _no_text(token_ids: Sequence[int]) -> str:
    return ""


def _compile(template: str) -> jinja2.Template | None:
    """Templates come with models, so they run sandboxed; names as transformers gives them."""
    if not template:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is no more than them."""

    tags = {"generation"}  # noqa: RUF012  jinja declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,  # whatever a template holds
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own, leaves HTML characters as they are."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class TextCache:
    """`ModelText` by model and revision; concurrent requests wait for one fetch."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, str], asyncio.Task[ModelText]] = {}

    async def get(
        self, model: str, revision: str, fetch: Callable[[], Awaitable[TokenizerFiles]]
    ) -> ModelText:
        """Fetch once; a failed fetch is forgotten, so that the next request tries again."""
        task = self._texts.get((model, revision))
        if task is None or _has_failed(task):
            task = asyncio.create_task(_load(model, fetch))
            self._texts[model, revision] = task
        return await asyncio.shield(task)

    def loaded(self, model: str, revision: str) -> ModelText:
        """What `get` has returned before; never forgotten."""
        return self._texts[model, revision].result()


def _has_failed(task: asyncio.Task[ModelText]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


async def _load(model: str, fetch: Callable[[], Awaitable[TokenizerFiles]]) -> ModelText:
    return await asyncio.to_thread(ModelText, model, await fetch())

"""`treecast chat`: turns, with the KV cache kept between them."""

from __future__ import annotations

import sys
import time
import uuid
from typing import TYPE_CHECKING, Annotated

import typer

from treecast.errors import InvalidRequest, TreecastError

from . import options
from .generate import summary
from .output import stderr, write_json, write_text

if TYPE_CHECKING:
    from treecast.client import ChatMessage, Client, Result, SamplingParams

_COMMANDS = "/new begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    system: Annotated[
        str | None, typer.Option("--system", help="System message before the first turn.")
    ] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = None,
    max_nodes: options.MaxNodes = None,
    adapter: options.Adapter = None,
    session: options.Session = None,
    router: options.Router = None,
    api_key: options.ApiKey = None,
    as_json: options.Json = False,
) -> None:
    """Talk with the model; every turn sees the ones before it.

    The session's KV cache stays on its verifier, so a turn computes only what is new; it is freed
    at the end, unless --session names it. Lines from a pipe are turns too. /new begins anew, /exit
    or Ctrl-D leaves, Ctrl-C stops an answer.

    For example:

        treecast chat --system "You answer in one sentence."

        printf 'Hello!\\nWhat did I just say?\\n' | treecast chat --json
    """
    from treecast.client import Client, SamplingParams

    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens
    )
    with Client(router, api_key=api_key) as client:
        session_id = session or f"chat-{uuid.uuid4()}"
        talk = Talk(client, sampling, session_id, system, max_nodes, adapter)
        try:
            _converse(talk, as_json)
        finally:
            if session is None:
                talk.close()


class Talk:
    """A conversation: its messages, and the session that keeps their KV cache."""

    def __init__(
        self,
        client: Client,
        sampling: SamplingParams,
        session_id: str,
        system: str | None,
        max_nodes: int | None,
        adapter: str | None = None,
    ) -> None:
        self._client = client
        self._sampling = sampling
        self._session_id = session_id
        self._opening: list[ChatMessage] = []
        if system is not None:
            self._opening.append({"role": "system", "content": system})
        self._max_nodes = max_nodes
        self._adapter = adapter
        self.messages = list(self._opening)

    def restart(self) -> None:
        """Forget all turns."""
        self.messages = list(self._opening)

    def ask(self, text: str, show: bool) -> Result:
        """Take one turn; an answer that is not finished leaves no trace in the messages."""
        asked: list[ChatMessage] = [*self.messages, {"role": "user", "content": text}]
        stream = self._client.generate(
            asked,
            self._sampling,
            session_id=self._session_id,
            max_nodes=self._max_nodes,
            adapter=self._adapter,
        )
        with stream:
            for chunk in stream:
                if show:
                    write_text(chunk.text)
            result = stream.result()
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        return result

    def close(self) -> None:
        """Free the session; nobody waits for it when the mesh is gone."""
        try:
            self._client.close_session(self._session_id)
        except TreecastError as error:
            stderr().print(f"the session was not closed: {error.message}", style="dim")


def _converse(talk: Talk, as_json: bool) -> None:
    console = stderr()
    at_terminal = sys.stdin.isatty()
    if at_terminal and not as_json:
        console.print(_COMMANDS, style="dim")
    while (line := _read_turn(at_terminal and not as_json)) is not None:
        if line == "/exit":
            return
        if line == "/new":
            talk.restart()
        elif line:
            _take_turn(talk, line, as_json, at_terminal)


def _read_turn(prompted: bool) -> str | None:
    """The next line; None at the end of input."""
    if prompted:
        stderr().print("\nyou> ", end="", style="bold cyan")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _take_turn(talk: Talk, line: str, as_json: bool, at_terminal: bool) -> None:
    begun = time.monotonic()
    try:
        result = talk.ask(line, show=not as_json)
    except KeyboardInterrupt:
        if not at_terminal:
            raise
        if not as_json:
            write_text("\n")
        stderr().print("stopped; this turn is forgotten", style="dim")
        return
    except InvalidRequest as error:
        # Such as a conversation that has outgrown the context: it is the user's to begin anew.
        if not at_terminal:
            raise
        stderr().print(f"{error.message} (/new begins anew)", style="red")
        return
    seconds = time.monotonic() - begun
    if as_json:
        fields = {"text": result.text, "finish_reason": result.finish_reason}
        write_json({**fields, "usage": result.usage, "seconds": round(seconds, 4)})
        return
    write_text("\n")
    if at_terminal:
        cached = f", {result.usage.cached_tokens} prompt tokens cached"
        line = summary(result.usage, result.finish_reason.name, seconds)
        stderr().print(line + cached, style="dim")

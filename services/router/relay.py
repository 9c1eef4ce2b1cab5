"""One sample's output on its way to the client, whichever verifiers produce it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from treecast.errors import InvalidFrame
from treecast.sampling.logprobs import TokenLogprobs
from treecast.text.detok import DetokStream
from treecast.v1 import router_pb2 as pb
from treecast.wire.frames import Completed, Cost, Failed, Progress
from treecast.wire.rounds import Round

from . import messages
from .metrics import Caller, RouterMetrics
from .seat import Seat, SeatEnd
from .writer import Write


@dataclass(slots=True)
class Piece:
    """Tokens that are new to the client."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)


class Output:
    """The output so far; takes each token once, in order, from any number of verifiers."""

    def __init__(self, committed: Iterable[int] = ()) -> None:
        self.tokens = list(committed)

    def take(self, progress: Progress, piece: Piece) -> None:
        """Add what is new to the output and to `piece`.

        Raises:
            InvalidFrame: tokens are missing before these, or differ from those relayed.
        """
        known = len(self.tokens) - progress.from_index
        if known < 0:
            raise InvalidFrame(
                f"progress begins at token {progress.from_index}; "
                f"{len(self.tokens)} tokens came before"
            )
        overlap = self.tokens[progress.from_index : progress.from_index + len(progress.tokens)]
        if tuple(overlap) != progress.tokens[:known]:
            raise InvalidFrame(
                f"progress repeats tokens from {progress.from_index} on, and changes them"
            )
        before = len(self.tokens)
        self.tokens += progress.tokens[known:]
        piece.tokens += progress.tokens[known:]
        piece.logprobs += progress.logprobs[known:]
        piece.rounds += [one for one in progress.rounds if one.from_index >= before]


class Relay:
    """Turns a sample's frames into the client's events."""

    def __init__(
        self,
        index: int,
        committed: tuple[int, ...],
        text: DetokStream,
        token_text: Callable[[int], str],
        write: Write,
        metrics: RouterMetrics,
        caller: Caller,
        clock: Callable[[], float],
        arrived_s: float,
    ) -> None:
        """`committed` output is the client's already: it is not written again, nor its text, which
        `text` has taken in.
        """
        self.output = Output(committed)
        self._index = index
        self._text = text
        self._token_text = token_text
        self._write = write
        labels = (caller.tenant, caller.model)
        self._tokens = metrics.tokens.labels(*labels)
        self._first_token = metrics.first_token.labels(*labels)
        self._inter_token = metrics.inter_token.labels(*labels)
        self._clock = clock
        self._arrived_s = arrived_s
        self._last_s: float | None = None
        self._earlier = Cost()  # of placements that did not see the request through

    async def follow(self, seat: Seat) -> SeatEnd:
        """Write what comes from one placement until it ends, one way or another.

        It fails where the verifier's tokens do not fit what it, or an earlier one, sent.
        """
        cost = Cost()
        while True:
            piece = Piece()
            end: SeatEnd | None = None
            for frame in await seat.take():
                if not isinstance(frame, Progress):
                    end = frame
                    break
                try:
                    self.output.take(frame, piece)
                except InvalidFrame as error:
                    seat.fail(error)
                    end = Failed(seat.handle, error)
                    break
                cost += frame.cost
            if piece.tokens:
                await self._pass_on(piece)
            if end is not None:
                if not isinstance(end, Completed):
                    self._earlier += cost
                return end

    async def _pass_on(self, piece: Piece) -> None:
        self._measure(len(piece.tokens))
        texts, rounds = self._tell(piece)
        await self._write(
            messages.delta(self._index, "".join(texts), piece.tokens, piece.logprobs, rounds)
        )

    def _tell(self, piece: Piece) -> tuple[list[str], list[pb.RoundReport]]:
        """The text of the piece in order, and its rounds, each with its part of that text."""
        first = len(self.output.tokens) - len(piece.tokens)
        texts: list[str] = []
        reports: list[pb.RoundReport] = []
        told = 0
        for one in piece.rounds:
            end = one.from_index + len(one.tokens) - first
            texts.append(self._text.push(piece.tokens[told:end]))
            reports.append(messages.round_report(one, texts[-1], self._token_text))
            told = end
        texts.append(self._text.push(piece.tokens[told:]))
        return texts, reports

    def _measure(self, num_tokens: int) -> None:
        now_s = self._clock()
        self._tokens.inc(num_tokens)
        if self._last_s is None:
            self._first_token.observe(now_s - self._arrived_s)
        else:
            self._inter_token.observe((now_s - self._last_s) / num_tokens)
        self._last_s = now_s

    async def finish(self, end: Completed, placements: int, same_numerics: bool) -> None:
        """Write the text that was held back, then the last event."""
        rest = self._text.finish(end.stop_characters)
        if rest:
            await self._write(messages.delta(self._index, rest))
        end = replace(end, usage=end.usage.with_earlier(self._earlier))
        await self._write(messages.finished(self._index, end, placements, same_numerics))

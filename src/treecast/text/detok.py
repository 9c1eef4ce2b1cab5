"""Output tokens to text, piece by piece; a piece once given out never changes.

What has been given out depends on the tokens so far and on nothing else, not on how they were
grouped. So a stream can be continued elsewhere from its tokens alone, and a verifier, which looks
for stop strings, agrees on every character with a router, which cuts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of some token ids."""

REPLACEMENT = "�"
INLINE_TOKENS = 256
"""Of output taken up again whose text is made on an event loop; each costs some 10 us."""

MAX_OPEN = 3
"""A UTF-8 character that lacks bytes has at most three, in as many tokens; a decoder shows them as
one mark, or as one for each.
"""

# How much of a run of marks is decoded again with each token. Multiples of three, since a run may
# be of bytes that spell the mark itself.
_MOST_WAITING = 24
_RUN_BEGINNING = 6  # shows a decoder that looks at a run of bytes as a whole that it is broken
_RUN_END = 12  # has the marks that are held back, and before them the bytes of a character


class DetokStream:
    """Text of one output. Characters that lack bytes, and possible stop strings, are held back."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._pieces = _Pieces(decode)
        self._stops = [_StopString(one) for one in stop]
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that is final now."""
        return "".join([self._release(self._pieces.push(token)) for token in tokens])

    def finish(self, stop_characters: int = 0) -> str:
        """The rest of the text, without its last `stop_characters`."""
        rest = self._held + self._pieces.rest()
        self._held = ""
        return rest[: max(0, len(rest) - stop_characters)]

    @property
    def stop_characters(self) -> int | None:
        """Characters from the first stop string to the end of the text; None if there is none."""
        starts = [at for one in self._stops if (at := self._held.find(one.text)) >= 0]
        return len(self._held + self._pieces.rest()) - min(starts) if starts else None

    def _release(self, piece: str) -> str:
        text = self._held + piece
        begun = max((one.push(piece) for one in self._stops), default=0)
        starts = [at for one in self._stops if (at := text.find(one.text)) >= 0]
        safe = min([*starts, len(text) - begun])
        self._held = text[safe:]
        return text[:safe]


class _Pieces:
    """Decodes token by token through a window that starts where the text was last whole.

    A decoder may treat its first token in its own way, so new text is what the window's text has
    beyond that of its first part. The window is short whatever comes: tokens without text do not
    enter it, and of a long run of marks the middle is left out.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_first = 0  # tokens of the window whose text was whole and given out
        self._given = 0  # characters of the window's text that were given out

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        whole = len(text) - self._num_open(text)
        piece = text[self._given : whole]
        self._given = max(self._given, whole)
        if piece and whole == len(text):
            self._slide()
        elif not piece and self._is_silent(token):
            self._window.pop()
        elif self._num_waiting >= _MOST_WAITING:
            self._shorten(held=len(text) - self._given)
        return piece

    @property
    def _num_waiting(self) -> int:
        return len(self._window) - self._num_first

    def _is_silent(self, token: int) -> bool:
        """Whether it never has text; twice, as a decoder may drop the space of its first token."""
        return not self._decode([token, token])

    def _num_open(self, text: str) -> int:
        """Marks at the end that may yet turn into a character.

        A decoder that maps bytes one by one may show earlier characters as marks too while the
        last one is open. After more tokens than a character can have, marks are there to stay.
        """
        marks = len(text) - len(text.rstrip(REPLACEMENT))
        return marks if self._num_waiting <= MAX_OPEN else min(marks, MAX_OPEN)

    def rest(self) -> str:
        """What a character that never got all its bytes decodes to."""
        return self._decode(self._window)[self._given :]

    def _slide(self) -> None:
        self._window = self._window[self._num_first :]
        self._num_first = len(self._window)
        self._given = len(self._decode(self._window))

    def _shorten(self, held: int) -> None:
        """Leave out the middle of a run; its last `held` characters are not given out yet."""
        self._window[self._num_first + _RUN_BEGINNING : -_RUN_END] = []
        self._given = len(self._decode(self._window)) - held


class _StopString:
    """How much of a stop string ends the text so far; a character takes constant time on average.

    Source: Knuth, Morris and Pratt, Fast pattern matching in strings, SIAM J. Comput. 6 (1977).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._begun = 0
        self._shorter = [0, 0]  # by length of a beginning: of the next shorter one that ends it
        for character in text[1:]:
            self._shorter.append(self._longer(self._shorter[-1], character))

    def push(self, piece: str) -> int:
        """Add text; returns the length of the longest proper beginning that ends it now."""
        for character in piece:
            self._begun = self._longer(self._begun, character)
            if self._begun == len(self.text):
                self._begun = self._shorter[self._begun]
        return self._begun

    def _longer(self, begun: int, character: str) -> int:
        while begun and self.text[begun] != character:
            begun = self._shorter[begun]
        return begun + (self.text[begun] == character)

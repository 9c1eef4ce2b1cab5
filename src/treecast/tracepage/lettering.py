"""Token texts as they can be shown: short, visible, and harmless."""

from __future__ import annotations

import unicodedata

MAX_CHARACTERS = 18

_SHOWN = {" ": "·", "\n": "⏎", "\r": "␍", "\t": "⇥"}
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def label(text: str, token: int) -> str:
    """A token in a few visible characters; its id in brackets if it has no text."""
    if not text:
        return f"[{token}]"
    shown = "".join(_visible(character) for character in text)
    return shown if len(shown) <= MAX_CHARACTERS else shown[: MAX_CHARACTERS - 1] + "…"


def _visible(character: str) -> str:
    """Spaces get a sign; what has no shape, or turns the writing around, its code point."""
    if character in _SHOWN:
        return _SHOWN[character]
    if unicodedata.category(character) in _UNSEEN:
        return f"<{ord(character):x}>"
    return character


def percent(confidence: float) -> str:
    """A belief in whole percent, never as if it were none."""
    return f"{100 * confidence:.0f}%" if confidence >= 0.005 else "<1%"


def running_text(text: str) -> str:
    """Text to be read: line breaks and tabs stay, other signs without a shape get one."""
    return "".join(c if c in "\n\t " else _visible(c) for c in text)


def width_of(text: str) -> int:
    """In columns of a fixed-width face; combining marks take none."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )

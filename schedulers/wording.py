"""Phrases that error messages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)', or nothing when no known word is close."""
    close = get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(quote(name) for name in close)}?)" if close else ""


def first_few(names: Sequence[str], num: int = 8) -> str:
    """The names, shortened after `num` of them: 'a, b, … (12 in all)'."""
    text = ", ".join(names[:num])
    return text if len(names) <= num else f"{text}, … ({len(names)} in all)"


def quote(name: str) -> str:
    """The name in double quotes."""
    return f'"{name}"'


def shown(value: object) -> str:
    """A user's value as Python writes it, shortened: it may be of any size and depth."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of lists in one another
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= 200 else f"{text[:200]}…"


def lists(rows: Iterable[Iterable[int]]) -> str:
    """Rows of numbers as a plan file writes them: [[0, 1], [2]]."""
    return str([list(row) for row in rows])

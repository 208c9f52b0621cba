"""How many calls this process made to Ray, by name: the proof that Ray is outside the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

ray_calls: Counter[str] = Counter()
"""Calls so far. Those named "watch…" are made once a second while the workers run; all others once a run."""


def counted(name: str, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call into Ray and count it. Everything of this package that talks to Ray goes through here."""
    ray_calls[name] += 1
    return call(*args, **kwargs)

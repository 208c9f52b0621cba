"""A user's own code: found as `pkg.mod:name`, and blamed with its own traceback when it raises."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import dropwhile
from pathlib import Path
from typing import Any

from anabranch.runtime.errors import ConfigError

_OURS = str(Path(__file__).parents[1])
_IMPORTLIB = (importlib.__file__ or "importlib", "<frozen importlib")


def import_object(
    spec: str, what: str = "the object", error: type[ConfigError] = ConfigError
) -> Callable[..., Any]:
    """The callable that `pkg.mod:name` names; the working directory is importable, as with `python -m`.

    `what` says what the user meant it for (`data.name`). Raises `error`: the text is not `module:name`, there is no
    such module or name, it cannot be called, or the module raises while it is imported (then with its traceback).
    """
    module_name, _, name = spec.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise error(f'{what} = "{spec}": write it as package.module:name')
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        with user_code(f'{what} = "{spec}": importing {module_name}', error):
            module = importlib.import_module(module_name)
    except error as raised:
        missing = raised.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{module_name}.".startswith(f"{missing.name}."):
            raise error(
                f'{what} = "{spec}": there is no module {missing.name}, neither in the working directory {here} '
                "nor installed: correct the name, or start from the folder that holds it"
            ) from None
        raise
    if not hasattr(module, name):
        hint = did_you_mean(name, dir(module), "correct the name")
        raise error(f'{what} = "{spec}": {module.__file__ or module_name} defines no {name}: {hint}')
    found = getattr(module, name)
    if not callable(found):
        raise error(
            f'{what} = "{spec}": {name} is of type {type(found).__name__}: name a function or a class'
        )
    return found  # type: ignore[no-any-return]


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for a word that is not among the `known`: the closest of them, or `otherwise`."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else otherwise


@contextmanager
def user_code(what: str, error: type[ConfigError] = ConfigError) -> Iterator[None]:
    """Turn whatever the user's code raises within into one `error` that holds their traceback, without our frames."""
    try:
        yield
    except Exception as raised:
        raise error(f"{what} raised {type(raised).__name__}:\n{user_traceback(raised)}") from raised


def user_traceback(raised: BaseException) -> str:
    """The traceback from the first line that is not ours on, and without the import machinery."""
    report = traceback.TracebackException.from_exception(raised)
    part: traceback.TracebackException | None = report
    while part is not None:
        frames = [frame for frame in part.stack if not frame.filename.startswith(_IMPORTLIB)]
        theirs = list(dropwhile(lambda frame: frame.filename.startswith(_OURS), frames))
        part.stack = traceback.StackSummary.from_list(theirs)
        part = part.__cause__ or part.__context__
    return "".join(report.format()).rstrip()

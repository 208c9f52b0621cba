"""Reads plain data (TOML) into sections of typed fields, and says what is wrong in the user's own words."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from anabranch.runtime.errors import ConfigError


class FieldError(ConfigError):
    """A key of the configuration is unknown or has a wrong value. key: "section" or "section.field"."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


def shown(value: object) -> str:
    """A value as messages show it."""
    from anabranch.schedulers import (
        wording,  # only where something is wrong: --help need not load the schedulers
    )

    return wording.shown(value)


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean x?" for the nearest known word, nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check_keys(data: Mapping[str, Any], sections: Mapping[str, type[Any]]) -> None:
    """Raise FieldError for the first key of {section: {field: value}} that no section has."""
    known = [f"{section}.{field.name}" for section, kind in sections.items() for field in fields(kind)]
    for section, given in data.items():
        if section not in sections:
            elsewhere = (
                [key for key in known if key.endswith(f".{section}")]
                if not isinstance(given, Mapping)
                else []
            )
            hint = f"; did you mean {elsewhere[0]}?" if elsewhere else suggest(section, [*sections, *known])
            raise FieldError(f"unknown key {section}{hint}", section)
        if not isinstance(given, Mapping):
            raise FieldError(f"{section} is {shown(given)}: it must be a table, [{section}]", section)
        for name in given:
            key = f"{section}.{name}"
            if key not in known:
                elsewhere = [other for other in known if other.endswith(f".{name}")]
                hint = f"; did you mean {elsewhere[0]}?" if elsewhere else suggest(key, known)
                raise FieldError(f"unknown key {key}{hint}", key)


def typed(key: str, value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it (an int for a float, a list for a tuple); FieldError if it is none."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value in choices:
            return value
        names = ", ".join(choice or '""' for choice in choices)
        near = suggest(value, choices) if isinstance(value, str) else ""
        raise FieldError(f"{key} is {shown(value)}: it must be one of {names}{near}", key)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        args = get_args(hint)
        if args[-1] is ... or len(args) == len(value):
            return tuple(typed(key, item, args[0]) for item in value)
    elif get_origin(hint) is dict and isinstance(value, Mapping):
        return dict(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    elif (
        isinstance(hint, type)
        and type(value) is hint
        and not (isinstance(value, int) and abs(value) >= 2**63)
    ):
        return value
    raise FieldError(f"{key} is {shown(value)}: it must be {_description(hint)}", key)


def _description(hint: Any) -> str:
    if get_origin(hint) is tuple:
        first, *rest = get_args(hint)
        number = "whole numbers" if first is int else "numbers"
        return f"a list of {number}" if ... in rest else f"a list of {1 + len(rest)} {number}"
    words = {
        int: "a whole number of at most 63 bits",
        float: "a number",
        bool: "true or false",
        str: "text in quotes",
    }
    return words.get(hint, "a table")


def field_docs(*modules: ModuleType) -> dict[tuple[str, str], str]:
    """(Class, field) → the text that stands under the field in its module's source."""
    docs = {}
    for kind in [kind for module in modules for kind in ast.parse(inspect.getsource(module)).body]:
        if isinstance(kind, ast.ClassDef):
            for above, below in zip(kind.body, kind.body[1:], strict=False):
                match above, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                        value=ast.Constant(value=str(text))
                    ):
                        docs[kind.name, name] = " ".join(text.split())
    return docs

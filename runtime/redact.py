"""Secrets taken out of whatever is written or shown.

    text, plain data ──redacted──▶ files of a run, --json
    prints, tracebacks, warnings ──shielded──▶ standard output and error

A secret is: the user part of a URL, a secret parameter of its query, what follows "Bearer", and the value of an
environment variable whose name says so (RAY_AUTH_TOKEN, AWS_SECRET_ACCESS_KEY, DB_PASSWORD, …), wherever it turns up.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

_USER = re.compile(r"(\b[A-Za-z][\w+.-]*://)[^/\s@]*@(?=[^/\s])")
_QUERY = re.compile(
    r"([?&][^=&#\s]*(?:secret|token|password|signature|credential|key|sig)[^=&#\s]*=)[^&#\s\"']+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_VARIABLE = re.compile(
    r"(TOKEN|SECRET|SECRET_KEY|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY(_ID)?|ACCOUNT_KEY|STORAGE_KEY|"
    r"PRIVATE_KEY|CONNECTION_STRING)$",
    re.IGNORECASE,
)
_SHORTEST = 8  # a shorter value is no secret worth the name, and a word that turns up by itself


def redacted(value: Any) -> Any:
    """Text, or plain data of it, in which every secret is "***"."""
    return _redacted(value, _secrets())


def _redacted(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return _BEARER.sub(r"\1***", _QUERY.sub(r"\1***", _USER.sub(r"\1***@", value)))
    if isinstance(value, dict):
        return {_redacted(key, secrets): _redacted(item, secrets) for key, item in value.items()}
    return [_redacted(item, secrets) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def shielded() -> Iterator[None]:
    """Within it nothing that this process prints shows a secret."""
    out, err = cast(TextIO, _Shield(sys.stdout)), cast(TextIO, _Shield(sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


class _Shield:
    """A stream that redacts what passes; in all else the one behind it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets() -> list[str]:
    """The longest first: one may be a part of another."""
    found = [v for k, v in os.environ.items() if len(v) >= _SHORTEST and _VARIABLE.search(k)]
    return sorted(found, key=len, reverse=True)

"""Secrets in URLs, taken out of what is written or shown."""

from __future__ import annotations

import re
from typing import Any

_USER = re.compile(r"(\b[A-Za-z][\w+.-]*://)[^/\s@]*@(?=[^/\s])")
_QUERY = re.compile(
    r"([?&][^=&#\s]*(?:secret|token|password|signature|credential|key|sig)[^=&#\s]*=)[^&#\s]+", re.IGNORECASE
)


def redacted(value: Any) -> Any:
    """Text, or plain data of it, in which the user part of URLs and the secrets in their queries are "***"."""
    if isinstance(value, str):
        return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", value))
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value

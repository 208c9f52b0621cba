"""JSON of a run's numbers: a number that is not finite, which JSON has no word for, is null."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def plain_json(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Plain data without cycles as one line of JSON. default: of what is not plain data, as json.dumps."""
    # Without the look for cycles it is a tenth quicker: metrics.jsonl has a line a step.
    encode = json.JSONEncoder(allow_nan=False, check_circular=False, default=default).encode
    try:
        return encode(value)
    except ValueError:  # a run that diverged
        return encode(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value

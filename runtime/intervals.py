"""Medians with intervals: what timings are compared by."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence


def median_interval(
    values: Sequence[float], level: float = 0.95, rounds: int = 4000
) -> tuple[float, float, float]:
    """(median, low, high): the median and its bootstrap interval, from a fixed seed."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(rounds))
    tail = (1.0 - level) / 2
    return (
        statistics.median(values),
        medians[math.floor(tail * rounds)],
        medians[math.ceil((1 - tail) * rounds) - 1],
    )

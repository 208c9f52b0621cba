"""What benchmarks compute from their samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anabranch.benchmarks.gross_rank import spearman
from anabranch.benchmarks.record import write_record
from anabranch.runtime.intervals import median_interval


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 25, 90]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866025, abs=1e-6)  # ties share their mean rank
    assert spearman([1, 1, 1], [1, 2, 3]) == 0


def test_the_interval_holds_the_median() -> None:
    values = [1.0, 1.01, 0.99, 1.02, 0.98] * 8
    median, low, high = median_interval(values)
    assert low <= median == 1.0 <= high
    assert high - low < 0.03
    assert median_interval([2.0] * 9) == (2.0, 2.0, 2.0)


def test_a_record_says_where_it_was_measured(tmp_path: Path) -> None:
    path = write_record("case", {"samples_s": [0.1]}, tmp_path)
    record = json.loads(path.read_text())
    assert record["name"] == "case"
    assert record["samples_s"] == [0.1]
    assert record["environment"].keys() >= {
        "processor",
        "cores",
        "gpus",
        "torch",
        "commit",
        "command",
        "date",
    }

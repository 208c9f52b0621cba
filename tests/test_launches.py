"""`bench launches`: which operators count as kernels, the gaps between them, and a record of a small row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from anabranch.benchmarks import launches


def test_gaps_are_where_no_kernel_runs() -> None:
    found = launches.gaps([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (3.5, 4.0), (1.5, 2.5)])
    assert found["kernels"] == 5
    assert found["whole_s"] == pytest.approx(6.0)
    assert found["gap_s"] == pytest.approx(1.5)  # 3 to 3.5, 4 to 5; kernels that overlap leave none
    assert found["busy_s"] == pytest.approx(4.5)
    assert found["median_gap_s"] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="saw no kernel"):
        launches.gaps([])


def test_what_counts_on_a_cpu() -> None:
    x, weight = torch.randn(4, 3, 8, 8), torch.randn(5, 3, 3, 3)

    def side() -> None:
        torch.nn.functional.conv2d(x, weight)[1:].permute(1, 0, 2, 3).relu_()  # two, and two views
        x.view(-1).detach().add(1)  # one, and two views

    found = launches._profiled(side, torch.device("cpu"), 2)
    assert found["kernels"] == 3
    assert 0 < found["busy_s"] < found["whole_s"]


def test_a_record(tmp_path: Path) -> None:
    record = launches.run(batch=4, branches=3, fold=18, steps=1, rounds=2, folder=tmp_path)
    assert json.loads(Path(record["path"]).read_text())["rows"] == record["rows"]
    by_side = {row["side"]: row for row in record["rows"]}
    assert list(by_side) == ["deeper", "looped", "chosen"]
    assert by_side["chosen"]["kernels"] <= by_side["looped"]["kernels"]
    assert all(len(row["samples_s"]) == 2 and row["gap_s"] > 0 for row in record["rows"])
    assert by_side["looped"]["speed_up"] == 1.0

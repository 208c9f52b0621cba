"""What benchmarks compute from their samples."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from anabranch.benchmarks import plan_case, prediction, save_stall, scaling
from anabranch.benchmarks.gross_rank import spearman
from anabranch.benchmarks.plan_case import Case, measure_cases, multi
from anabranch.benchmarks.record import write_record
from anabranch.benchmarks.slow_worker import HalfSpeed
from anabranch.benchmarks.workers import interleaved
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


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_every_side_is_in_every_place(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what has not used a GPU, as ranks of gloo, does not begin to between two moments."""
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("a context on GPU 0"))
    ran: list[str] = []
    names = "abcd"[:num]
    samples = interleaved({name: partial(ran.append, name) for name in names}, 2 * num, warm_up=0)
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys(names, 2 * num)
    rounds = [ran[i : i + num] for i in range(0, len(ran), num)]
    assert [sorted(column) for column in zip(*rounds, strict=True)] == [sorted(2 * names)] * num


def test_efficiency_is_of_one_workers_step_in_the_same_round() -> None:
    """The machine is half as fast in the last round: for both."""
    together, alone = [0.5, 0.4, 1.0], [0.8, 0.8, 1.6]
    strong = scaling._rate("strong", 2, 32, together, alone)
    assert strong["efficiency"] == pytest.approx(0.8)
    assert strong["efficiency_interval_95"] == pytest.approx([0.8, 1.0])
    assert (strong["median_s"], strong["images_per_s"]) == (0.5, 64)
    assert scaling._rate("weak", 2, 64, together, alone)["efficiency"] == pytest.approx(1.6)


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


def test_errors_and_order_of_predictions() -> None:
    times = [(1.0, 1.0), (2.0, 1.5), (1.2, 2.1), (1.3, 2.11)]  # predicted, measured
    plans = [
        {
            "predicted_s": predicted,
            "measured_s": measured,
            "predictions_s": [predicted, 3 * predicted],
            "samples_s": [measured, 2 * measured, 3 * measured],
        }
        for predicted, measured in [*times, (1.1, 1.0)]
    ]
    found = prediction._figures([{"plans": plans[:4]}, {"plans": plans[4:]}])
    assert found["num_plans"] == 5
    assert found["mean_absolute_error"] == pytest.approx(
        (0 + 1 / 3 + (1 - 1.2 / 2.1) + (1 - 1.3 / 2.11) + 0.1) / 5
    )
    assert found["spread"] == pytest.approx([2.11, 1.0])
    assert found["pairs_apart"] == 5  # the last two are too near to each other
    assert found["pairs_in_order"] == pytest.approx(3 / 5)
    assert found["pairs_apart_and_in_order_by_medians"] == (5, 3)
    plans[1]["samples_s"] = [
        1.0,
        2.0,
        9.0,
    ]  # as fast as the first, but once: their medians are apart, their ratio not
    assert prediction._figures([{"plans": plans[:4]}])["pairs_apart"] == 4


def test_a_disturbed_case_is_measured_again_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [[1.0, 1.3], [1.0, 1.1], [2.0, 2.0], [2.0, 2.1]]
    ticks = [(0, 0), (100, 0), (100, 0), (200, 0), (200, 0), (300, 50), (300, 50), (400, 55)]

    def run(case: Case, *arguments: object) -> dict[str, object]:
        return {"reference": {"turns_s": turns.pop(0)}}

    monkeypatch.setattr(Case, "run", run)
    monkeypatch.setattr(plan_case, "_ticks", lambda: ticks.pop(0))
    cases = [multi(8, 2, 8), multi(8, 4, 8, mbit_per_s=100)]
    first, second = measure_cases("case", cases, 2, 4, tmp_path, False, lambda *_: {})
    disturbed = {"case": str(cases[0]), "reference": {"turns_s": [1.0, 1.3]}, "stolen_share": 0.0}
    assert first["disturbed"] == [disturbed]
    assert first["reference"]["turns_s"] == [1.0, 1.1]
    assert [row["stolen_share"] for row in second["disturbed"]] == [0.5]
    assert second["stolen_share"] == 0.05
    assert "two hosts at 100 Mbit/s" in second["case"]
    again = measure_cases("case", cases, 2, 4, tmp_path, True, lambda *_: {})  # nothing is left to do
    assert again == [first, second]


def test_a_wire_needs_two_equal_hosts(tmp_path: Path) -> None:
    cases = [multi(8, 2, 8), multi(8, 2, 8, mbit_per_s=100.0)]
    with pytest.raises(ValueError, match="3 workers are no two equal hosts"):  # before anything is measured
        measure_cases("none", cases, 3, 1, tmp_path, False, lambda *_: pytest.fail("measured"))


def test_the_stall_is_the_call_and_what_the_next_step_takes_longer() -> None:
    samples = {
        "step_s": [1.0, 2.0, 1.0],
        "save_s": [0.5, 0.7, 0.5],
        "step_beside_s": [1.25, 2.25, 1.25],
        "written_s": [3.0, 3.0, 3.0],
        "copy_s": [0.25, 0.45, 0.25],
        "parts_s": {"copy": [0.25, 0.5, 0.25], "agree": [0.1, 0.2, 0.1]},
    }
    found = save_stall._figures(samples)
    assert found["stall_median_s"] == 0.75
    assert found["stall_less_copy_median_s"] == 0.5
    assert found["stall_less_copy_interval_95_s"] == pytest.approx([0.5, 0.5])
    assert (found["call_less_copy_median_s"], found["beside_median_s"]) == (0.25, 0.25)
    assert found["parts_median_s"] == {"copy": 0.25, "agree": 0.1}


@pytest.mark.optin
def test_what_a_save_costs_a_step(tmp_path: Path) -> None:
    record = save_stall.run(rounds=2, width=1024, folder=tmp_path)
    assert [row["workers"] for row in record["rows"]] == [1, 2]
    for row in record["rows"]:
        assert row["num_bytes"] == 2 * 4 * (12 * (1024 + 1) * 1024 + (1024 + 1) * 10)
        assert {len(row[key]) for key in ("step_s", "save_s", "copy_s", "step_beside_s", "written_s")} == {2}
        for index, call in enumerate(row["save_s"]):
            parts = {name: samples[index] for name, samples in row["parts_s"].items()}
            assert sum(parts.values()) == pytest.approx(call)
            assert min(parts.values()) >= 0
            assert parts["copy"] > parts["prepare"]
    assert (tmp_path / "save_stall.json").is_file()


def test_half_speed_is_half_the_speed() -> None:
    x = torch.randn(256, 256)

    def seconds() -> float:
        begun = time.thread_time()
        for _ in range(20):
            x @ x
        return time.thread_time() - begun

    ratios = []
    for _ in range(9):
        plain = seconds()
        with HalfSpeed():
            ratios.append(seconds() / plain)
    assert median_interval(ratios)[0] == pytest.approx(2, rel=0.3)

"""Faults planted in real runs of the command line: some of the matrix in one run; all of it by `-m optin`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import train
from privileges import may_mount
from ranks import run_ranks

from anabranch.benchmarks import fault_judge, fault_runs
from anabranch.benchmarks.fault_cells import Cell, cells
from anabranch.benchmarks.fault_judge import Outcome, difference, judge, weights
from anabranch.benchmarks.fault_runs import Ended, Fault, prepare
from anabranch.benchmarks.faults import Bench
from anabranch.benchmarks.injector import MOMENTS, set_off
from anabranch.benchmarks.random_faults import run_random
from anabranch.runtime.config_file import load_config

# Several in one run, at their own steps: each must be survived for the next to go off.
# Ranks 0 and 2, 1 and 3 hold the same branches. The kill at a save may come late: it is written beside the steps.
IN_CI = (
    Fault("kill", 3, "forward", 3),
    Fault("memory", 1, "branch_all_reduce", 7),
    Fault("kill", 0, "checkpoint", 10),
    Fault("exception", 3, "reduction", 13),
    Fault("kill", 1, "reduction", 16),
    Fault("kill", 0, "optimizer", 19),
)


def undisturbed(rank: int, world_size: int, place: str) -> None:
    """The run without faults, in processes that are there already; the injector was imported elsewhere, so it rests."""
    os.chdir(place)
    config = load_config("run.toml", {"launch": {"run_dir": str(Path(place, "run"))}})
    train(rank, world_size, {"": (config, "")}, (2, 2))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", fault_runs.python_path())  # `Bench` sets it
        bench = Bench(tmp_path_factory.mktemp("faults"), stack)
        plain = bench.root / "undisturbed-2x2-fp32"
        prepare(plain, ())
        run_ranks(4, undisturbed, str(plain))
        bench._undisturbed[plain.name] = weights(plain / "run")[1]
        yield bench


def test_every_cell_is_named_once_and_run_or_void() -> None:
    names = [cell.name for cell in cells()]
    assert len(names) == len(set(names))
    assert all(bool(cell.faults) != bool(cell.void) for cell in cells() if cell.name != "two-hosts")
    for kind in ("kill", "stop", "exception", "memory", "raylet", "driver", "disk", "network"):
        for where in ("rank0", "another"):
            assert {f"{kind}-{where}-{moment}" for moment in MOMENTS} <= set(names)


@pytest.fixture(scope="module")
def plain(bench: Bench) -> Path:
    """The undisturbed run's folder."""
    return bench.root / "undisturbed-2x2-fp32"


def test_what_is_compared(bench: Bench, plain: Path) -> None:
    """Parameters, running statistics and the optimizer's state, at the last step."""
    wanted = bench.undisturbed("2x2")
    assert {key.partition("/")[0] for key in wanted} == {"network", "optimizer.momentum_buffer"}
    assert any("running_var" in key for key in wanted)
    step, found = weights(plain / "run")
    assert (step, found.keys()) == (fault_runs.STEPS, wanted.keys())


@pytest.fixture(scope="module")
def survived(bench: Bench) -> Outcome:
    return bench.run(Cell("six", IN_CI, flags=("--launch.max-failures", "12")))


@pytest.mark.parametrize("index", range(len(IN_CI)), ids=[f"{f.kind}-{f.rank}-{f.moment}" for f in IN_CI])
def test_a_fault_is_survived(index: int, survived: Outcome) -> None:
    """Going on by itself, without a finished step run again; the weights at the end are the undisturbed run's."""
    assert (survived.outcome, survived.redone) == ("recovered", 0), survived.said
    assert survived.recovery_s[index] is not None


@pytest.mark.optin
@pytest.mark.parametrize("cell", [cell for cell in cells() if not cell.void], ids=lambda cell: cell.name)
def test_cell(cell: Cell, bench: Bench) -> None:
    if (cell.hosts or any(fault.kind == "disk" for fault in cell.faults)) and not may_mount():
        pytest.skip("namespaces and mounts need root")
    outcome = bench.run(cell)
    assert outcome.outcome in cell.promise, outcome.said


@pytest.mark.optin
def test_kills_at_random_moments(tmp_path: Path) -> None:
    record = run_random(kills=4, mean_gap_s=4.0, steps=400, folder=tmp_path)
    assert (record["outcome"], len(record["kills"])) == ("recovered", 4), record["said"]
    assert 0 < record["steps_per_s_kept"] < 1


# --- the judge itself


def ended_run(
    folder: Path, *, code: int = 0, stderr: str = "", result: dict[str, Any] | None = None
) -> Ended:
    prepare(folder, ())
    return Ended(code, result or {}, stderr, 1.0)


def test_another_bit_is_seen(bench: Bench, plain: Path) -> None:
    wanted = bench.undisturbed("2x2")
    assert judge(plain, (), ended_run(plain), wanted, 1, ()).outcome == "recovered"
    key, value = max(wanted.items(), key=lambda item: item[1].numel())
    bit = value.clone()
    bit.view(-1).view(torch.int32)[-1] ^= 1
    outcome = judge(plain, (), ended_run(plain), {**wanted, key: bit}, 1, ())
    assert outcome.outcome == "DIFFERENT"
    assert f"1 of {len(wanted)} tensors" in outcome.said
    assert judge(plain, (), ended_run(plain), {**wanted, key: bit}, 1, (), 1e-5).outcome == "recovered"
    more = {**wanted, "network/other": value}
    assert judge(plain, (), ended_run(plain), more, 1, (), 1e-5).outcome == "DIFFERENT"


def test_differences() -> None:
    a = {"x": torch.tensor([1.0, -4.0]), "y": torch.tensor([0.0])}
    assert difference(a, a) == (0.0, [])
    assert difference(a, {**a, "y": torch.tensor([-0.0])}) == (0.0, ["y"])  # equal numbers, other bits
    assert difference(a, {**a, "x": torch.tensor([1.5, -4.0])}) == (0.125, ["x"])
    for other in (torch.tensor([float("nan"), -4.0]), torch.tensor([[1.0, -4.0]]), torch.tensor([1, -4])):
        assert difference(a, {**a, "x": other}) == (float("inf"), ["x"])


def test_a_fault_that_did_not_go_off_is_no_success(bench: Bench, plain: Path) -> None:
    faults = (Fault("kill", 9, "forward"),)
    assert judge(plain, faults, ended_run(plain), bench.undisturbed("2x2"), 1, ()).outcome == "MISSED"


def test_how_a_run_ended(tmp_path: Path) -> None:
    trace = "Traceback (most recent call last):\n  …\nerror: KeyError: 'x'"
    for name, ended, wanted in (
        ("hang", Ended(None, {}, "", 9.0), "HANG"),
        ("traceback", Ended(1, {"error": "KeyError: 'x'"}, trace, 9.0), "UNNAMED"),
        ("silent", Ended(1, {}, "", 9.0), "UNNAMED"),
    ):
        prepare(tmp_path / name, ())
        assert judge(tmp_path / name, (), ended, {}, 9, ()).outcome == wanted, name


def test_a_process_that_stays_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_judge, "LEFT_S", 0.2)
    prepare(tmp_path, ())
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    trace = {"time": time.time(), "pid": process.pid, "started": started}
    (tmp_path / f"trace-{process.pid}.jsonl").write_text(json.dumps(trace) + "\n")
    outcome = judge(tmp_path, (), Ended(0, {}, "", 1.0), {}, 1, ())
    assert outcome.outcome == "LEFT"
    assert outcome.said.startswith("1 workers")
    assert process.wait(10) == -9


def test_seconds_and_steps_are_the_traces(tmp_path: Path) -> None:
    """Rank 1 dies at second 10, of a fault beside its step 6; rank 0 had finished 5, rank 1 comes back with step 4."""
    prepare(tmp_path, ())
    (tmp_path / "fired-0.json").write_text(json.dumps({"time": 10.0, "pid": 2, "rank": 1, "step": 5}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failures.jsonl").write_text('{"at": 9.5}\n{"at": 10.25}\n{"at": 11.0}\n')

    def told(pid: int, rank: int, *steps: tuple[float, int]) -> None:
        lines = [{"time": at, "rank": rank, "step": step, "phase": "training"} for at, step in steps]
        (tmp_path / f"trace-{pid}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    told(1, 0, (8.0, 4), (9.0, 5), (12.0, 4), (12.5, 5), (13.0, 6))
    told(2, 1, (8.0, 4), (9.0, 5), (10.1, 6))
    told(3, 1, (12.0, 4), (12.5, 5), (13.5, 6))
    outcome = judge(tmp_path, (Fault("kill", 1, "forward", 5),), Ended(0, {}, "", 1.0), {}, 1, ())
    assert (outcome.seen_s, outcome.recovery_s, outcome.redone) == ((0.25,), (3.5,), 3)


def test_a_full_disk_is_full(tmp_path: Path) -> None:
    if not may_mount():
        pytest.skip("mounting a small file system needs root")
    from anabranch.benchmarks.faults import small_disk
    from anabranch.benchmarks.injector import empty

    with small_disk(tmp_path / "small") as folder:
        set_off("disk", str(folder), tmp_path)
        with pytest.raises(OSError, match="No space left"):
            (folder / "file").write_bytes(bytes(2**16))
        empty(folder)
        (folder / "file").write_bytes(bytes(2**16))

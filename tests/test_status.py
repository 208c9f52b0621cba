"""A run seen and stopped from another process, through its folder."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anabranch.runtime.cli import main
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.run_record import RunRecord, request_stop, run_status

STATUSES = [
    {
        "rank": 0,
        "host": "a",
        "pid": 7,
        "phase": "training",
        "step": 3,
        "num_steps": 10,
        "step_time_s": 0.5,
        "loss": 1.5,
    }
]


def test_what_is_noted_is_read(tmp_path: Path) -> None:
    record = RunRecord(str(tmp_path), "training")
    assert record.watch(STATUSES) is None
    status = run_status(tmp_path)
    assert (status["state"], status["alive"], status["phase"], status["step"]) == (
        "running",
        True,
        "training",
        3,
    )
    assert (status["left_s"], status["metrics"]["loss"], status["pid"]) == (3.5, 1.5, os.getpid())
    assert status["workers"] == [{"rank": 0, "host": "a", "pid": 7, "phase": "training", "step": 3}]
    request_stop(tmp_path, wait=False)
    assert [record.watch(STATUSES) for _ in range(2)] == ["stop", "stop"]
    assert not (tmp_path / "stop").exists()
    record.close(RuntimeError("boom"))
    assert (run_status(tmp_path)["state"], run_status(tmp_path)["error"]) == ("failed", "boom")


def test_a_run_that_diverged_has_a_record_that_is_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunRecord(str(tmp_path), "training").watch([{**STATUSES[0], "loss": math.inf}])
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"]["loss"] is None
    assert main(["status", str(tmp_path), "--json"]) == 0
    out, shown = capsys.readouterr()
    assert "loss not finite" in shown
    assert json.loads(out, parse_constant=pytest.fail)["metrics"]["loss"] is None


def test_an_old_wish_stops_no_new_run(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    record = RunRecord(str(tmp_path), "training")
    assert record.watch(STATUSES) is None
    (tmp_path / "stop").touch()
    assert RunRecord(str(tmp_path), "training").watch(STATUSES) == "stop", "the same driver, planning anew"


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, "running"),
        ({"start": "1"}, "dead"),  # the process ID was given to another one
        ({"machine": "elsewhere"}, "running"),
        ({"machine": "elsewhere", "heard_at": 0.0}, "dead"),
        ({"state": "finished", "heard_at": 0.0}, "finished"),
    ],
)
def test_who_is_alive(tmp_path: Path, change: dict[str, Any], state: str) -> None:
    RunRecord(str(tmp_path), "training")
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | change))
    assert run_status(tmp_path)["state"] == state
    if state != "running":
        with pytest.raises(ConfigError, match=f"no run going on: it is {state}"):
            request_stop(tmp_path, wait=True)


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path: Path) -> None:
    """Not of the last name by letters."""
    RunRecord(str(tmp_path), "training")
    for name in ("step-000900", "step-999999", "step-1000000"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    assert run_status(tmp_path)["checkpoint"] == "step-1000000"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": 1}', "\0"])
def test_what_is_no_record_is_named(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "has no run.json" in capsys.readouterr().err
    (tmp_path / "run.json").write_text(content)
    assert main(["status", str(tmp_path)]) == 2
    assert str(tmp_path / "run.json") in capsys.readouterr().err


# A step is soon there: small, and nothing is tried out before it.
QUICK = ["--model.options.depth", "8", "--mesh.execution", "fused", "--mesh.memory-format", "contiguous"]


def start(folder: Path) -> subprocess.Popen[str]:
    """One worker in the driver's process, that goes on for long; once it has made a step."""
    command = ["train", "--launcher", "none", "--run-dir", str(folder), "--epochs", "1000", "--quiet", *QUICK]
    process = subprocess.Popen(
        [sys.executable, "-m", "anabranch.runtime", *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        if (folder / "run.json").exists() and run_status(folder).get("step"):
            return process
        time.sleep(0.05)


def test_a_run_is_stopped_from_another_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(tmp_path)
    try:
        assert main(["status", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert f"training: running (process {process.pid} on " in out
        assert "s left" in out
        assert main(["stop", str(tmp_path), "--wait", "--json"]) == 0
        status = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (status["state"], status["alive"]) == ("stopped", False)
        assert status["checkpoint"]
        _, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "checkpoint saved; go on with: anabranch train --resume" in err


def test_a_killed_run_is_dead(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record says that it runs, and always will."""
    code = (
        "import sys, time; from anabranch.runtime.run_record import RunRecord;"
        "RunRecord(sys.argv[1], 'training'); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert main(["status", str(tmp_path)]) == 0
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert main(["status", str(tmp_path)]) == 1
    assert "training: dead" in capsys.readouterr().out

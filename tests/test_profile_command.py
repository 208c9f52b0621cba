"""`anabranch profile` as a command: what it refuses before anything starts, what it leaves, that it can be stopped."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_report import metrics

from anabranch.runtime.cli import main
from anabranch.runtime.config import Config
from anabranch.runtime.profile_file import read_profile
from anabranch.runtime.run_record import run_status

ALONE = ["profile", "--launcher", "none"]


def test_more_steps_than_the_run_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before a worker or a folder is there."""
    folder = tmp_path / "run"
    assert main([*ALONE, "--steps", "9", "--train.max-steps", "8", "--run-dir", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "--steps is 9, the run has 8 steps: ask for 1 to 8, or give the run more" in said
    assert not folder.exists()


@pytest.mark.parametrize("trained", [True, pytest.param(False, marks=pytest.mark.optin)])
def test_a_profile_is_written_told_and_printed(
    tmp_path: Path, trained: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder; in that of a run, whose own files stay, with its curves in the report."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # others may compute beside it
    folder, own = (
        tmp_path,
        {"plan.toml": "[mesh]\ndata = 2\nbranch = 1\n", "config.toml": '[model]\nname = "other"\n'},
    )
    notes = ["no metrics: there are no curves"]
    if trained:
        folder, notes = metrics(tmp_path, 5) / "profile", [
            "the profile is of another plan than the run's: see profile/plan.toml",
            "the profile has another [model], [data], [train] than the run: see profile/config.toml",
        ]  # fmt: skip
        for name, text in own.items():
            (tmp_path / name).write_text(text)
    command = [*ALONE, "--steps", "3", "--train.batch-size", "8", "--run-dir", str(tmp_path)]
    options = ["--model.options.depth", "8", "--model.options.num-branches", "2"]
    assert main([*command, *options, "--json"]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()  # and nothing else
    told, printed = json.loads(line), captured.err.splitlines()
    assert {*told} == {
        "step_s", "stragglers", "suggestion", "unattributed", "overhead", "run_dir", "profile", "trace", "report",
        "notes",
    }  # fmt: skip
    files = {
        "run_dir": folder, "profile": folder / "profile.json", "trace": folder / "trace.json.gz",
        "report": tmp_path / "report.html",
    }  # fmt: skip
    assert {what: told[what] for what in files} == {what: str(path) for what, path in files.items()}
    profile = read_profile(folder / "profile.json")
    assert profile["steps"]["measured"] == 3
    assert told["step_s"] == pytest.approx(profile["steps"]["step_s"], rel=1e-5)
    assert 0 < told["step_s"]["p50"] <= told["step_s"]["p95"]
    assert json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    text = (tmp_path / "report.html").read_text()
    assert "95 % of 3 steps" in text
    assert ("Loss, in numbers" in text) == trained
    assert told["notes"] == notes
    blocks = [element["name"] for element in profile["elements"]]
    assert [blocks[0], blocks[-1]] == ["stem", "head"]
    for name in blocks:  # in the three tables and the page
        assert sum(line.startswith(f"{name} ") for line in printed) >= 3
        assert name in text
    assert f"profile: {folder / 'profile.json'}" in printed
    if trained:
        assert {name: (tmp_path / name).read_text() for name in own} == own
        assert 'name = "multi_resnet"' in (folder / "config.toml").read_text()
        assert not (tmp_path / "run.json").exists()


def test_a_runs_configuration_is_profiled_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder stays as it is, and is not locked."""
    options = {"depth": 8, "num_branches": 2}
    config = Config.from_dict({"model": {"options": options}, "train": {"batch_size": 8}})
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/config.toml").write_text(config.to_toml())
    monkeypatch.chdir(tmp_path)
    assert main([*ALONE, "--steps", "2", "--resume", "trained"]) == 0
    assert [path.name for path in (tmp_path / "trained").iterdir()] == ["config.toml"]
    (profiled,) = (tmp_path / "runs").iterdir()
    assert len(read_profile(profiled / "profile.json")["elements"]) == 5  # of depth 8


@pytest.mark.parametrize(
    ("how", "code"), [("interrupt", 130), pytest.param("stop", 143, marks=pytest.mark.optin)]
)
def test_a_profile_is_stopped(
    tmp_path: Path, how: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """By Ctrl-C, or from another terminal: after the step that runs, with nothing written."""
    command = [*ALONE, "--steps", "4000", "--train.epochs", "1000", "--run-dir", str(tmp_path), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "anabranch.runtime", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 280
        while not (tmp_path / "run.json").exists() or not run_status(tmp_path).get("step"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if how == "stop":
            assert main(["stop", str(tmp_path)]) == 0
        else:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "stopped before all 4000 steps were measured, no profile was written" in err
    assert json.loads(out.splitlines()[-1])["run_dir"] == str(tmp_path)
    assert not (tmp_path / "profile.json").exists()
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    assert "profiling: stopped" in capsys.readouterr().out

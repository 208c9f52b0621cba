"""`anabranch profile` as a command: what it refuses before anything starts, and that it can be stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anabranch.runtime.cli import main
from anabranch.runtime.run_record import run_status

ALONE = ["profile", "--launcher", "none"]


def test_more_steps_than_the_run_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told before a worker or a folder is there."""
    folder = tmp_path / "run"
    assert main([*ALONE, "--steps", "9", "--train.max-steps", "8", "--run-dir", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "--steps is 9, the run has 8 steps: ask for 1 to 8, or give the run more" in said
    assert not folder.exists()


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
        deadline = time.monotonic() + 120
        while not (tmp_path / "run.json").exists() or not run_status(tmp_path).get("step"):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if how == "stop":
            assert main(["stop", str(tmp_path)]) == 0
        else:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "stopped before all 4000 steps were measured, no profile was written" in err
    assert json.loads(out.splitlines()[-1])["run_dir"] == str(tmp_path)
    assert not (tmp_path / "profile.json").exists()
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    assert "profiling: stopped" in capsys.readouterr().out

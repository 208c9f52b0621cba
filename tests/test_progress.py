"""Progress: a bar on a terminal, else plain lines, with the time left; nothing with --quiet."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from anabranch.cluster import WorkerContext
from anabranch.runtime import progress
from anabranch.runtime.cli import main
from anabranch.runtime.gross_stages import Stages
from anabranch.runtime.progress import RunProgress


def test_plain_lines_say_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a phase that tells no step time too: as fast as since it began."""
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    with RunProgress(Console(file=out, width=30), "searching") as shown:
        for step in (1, 3):
            shown.watch([{"phase": "tuning", "step": step, "num_steps": 10}])
            now[0] += 4.0
        shown.watch([{"phase": "tuning", "step": 4, "num_steps": 10, "step_time_s": 0.5}])
    first, second, third = (
        line for line in out.getvalue().splitlines() if line.startswith("searching: tuning")
    )
    assert "left" not in first
    assert second.endswith(", 14 s left")
    assert third.endswith(", 3 s left")


def test_the_line_says_how_fast_and_what_communication_takes() -> None:
    """Of the slowest rank: a quarter of the step is exchange and waiting for gradients. And what else takes long."""
    out = io.StringIO()
    times = {
        "step": [0.1, 0.08], "exchange": [0.02, 0.01], "reduction": [0.005, 0.005], "data": [0.004, 0.012],
        "optimizer": [0.01, 0.01], "idle": [0.0, 0.0], "forward": [0.03, 0.03],
    }  # fmt: skip
    status = {
        "phase": "training", "step": 3, "num_steps": 10, "images_per_s": 320.4, "step_time_s": 0.1, "times_s": times,
        "memory_bytes": [2**30, 3 * 2**30],
    }  # fmt: skip
    with RunProgress(Console(file=out, width=200), "training") as shown:
        shown.watch([status])
    line = "training: training step 3/10, 320 images/s, 100 ms/step, 25 % communication, 12 % data, 3.0 GiB, 1 s left"
    assert line in out.getvalue()
    with RunProgress(Console(file=out, width=200), "training") as shown:
        shown.watch([{**status, "times_s": {**times, "data": [0.004, 0.004], "optimizer": [0.004, 0.004]}}])
    assert "25 % communication, 3.0 GiB" in out.getvalue(), "four per cent are not told"


def test_a_phase_without_steps_foretells_nothing_from_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """GroSS fits block terms after it trained: its hours would come from a step's milliseconds."""
    context = WorkerContext(0, 1, 0, "here", "cpu", 1, "", "gloo")
    context.publish(phase="training", step=10, num_steps=1000, step_time_s=0.1, loss=0.5, images_per_s=320.0)
    out = io.StringIO()
    with RunProgress(Console(file=out, width=200), "searching") as shown:
        shown.watch([context.status()])
    assert "training step 10/1000, loss 0.500, 320 images/s, 100 ms/step, 99 s left" in out.getvalue()
    monkeypatch.setattr("anabranch.runtime.gross_stages.make_mesh", lambda *shape: None)
    Stages(Path(), context).tell("block terms 1/7")
    assert {"step_time_s", "loss", "images_per_s"}.isdisjoint(context.status())
    with RunProgress(Console(file=out, width=200), "searching") as shown:
        shown.watch([context.status()])
    assert out.getvalue().splitlines()[-1] == "searching: block terms 1/7 step 10/1000"


def test_a_terminal_has_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    now = [100.0]
    with RunProgress(Console(file=out, width=120, force_terminal=True), "searching") as shown:
        shown._bar.get_time = lambda: now[0]
        shown._bar.tasks[0]._get_time = lambda: now[0]
        for step in (1, 3, 5):
            shown.watch([{"phase": "tuning", "step": step, "num_steps": 10}])
            now[0] += 4.0
        shown._bar.refresh()
    assert "searching: tuning" in out.getvalue()
    assert "step 5/10" in out.getvalue()
    assert "0:00:10" in out.getvalue(), "two seconds a step, five left"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=terminal, quiet=True)
    with RunProgress(console, "searching") as shown:
        shown.watch([{"phase": "tuning", "step": 1, "num_steps": 10, "warning": "slow"}])
    assert out.getvalue() == ""


COMMANDS = {
    "verifying: comparing step 1/2": [
        "verify",
        "--steps",
        "2",
        "--launcher",
        "none",
        "--train.batch-size",
        "16",
        "--float64",  # fp32 rounds as the forms chosen on this machine do
    ],
    "doctor: asking every host": ["doctor", "--address", "localhost:1"],
    "planning: searching step 0/": [
        "plan",
        "--devices",
        "2x2xL4",
        "--interconnect",
        "10Gbit/s",
        "--output",
        "plan.toml",
    ],
}


@pytest.mark.parametrize("line", COMMANDS)
def test_what_takes_long_says_how_far_it_is(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Comparing, planning, asking hosts; what measuring tells is in test_measure.py, GroSS's phases in
    test_gross_run.py."""
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    monkeypatch.setattr("anabranch.runtime.launch.WATCH_S", 0.02)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # one thread: others may compute beside it
    monkeypatch.chdir(tmp_path)
    failed = int("doctor" in line)  # it finds no cluster
    assert main(COMMANDS[line]) == failed
    out = capsys.readouterr().out
    assert line in out
    assert ("starting: torch" in out) == ("verify" in line)
    assert main([*COMMANDS[line], "--quiet"]) == failed
    assert capsys.readouterr() == ("", "")

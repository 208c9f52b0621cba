"""Progress where the output is no terminal: plain lines, with the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from anabranch.runtime import progress
from anabranch.runtime.progress import RunProgress


def test_plain_lines_say_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a phase that tells no step time too: as fast as since it began."""
    monkeypatch.setattr(progress, "_LINE_S", 0.0)
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out = io.StringIO()
    with RunProgress(Console(file=out, width=200), "searching") as shown:
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

"""How far a part of the start is, for whoever waits."""

from __future__ import annotations

import time

import pytest

from anabranch.runtime.countdown import countdown


def test_a_phase_tells_what_is_done_and_the_seconds_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, phases = [10.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tell = countdown(lambda **fields: phases.append(fields), "timing blocks")
    for done in range(4):
        tell(done, 4)
        now[0] += 2.5
    assert phases == [
        {"phase": "timing blocks 0/4"},
        {"phase": "timing blocks 1/4, 8 s left"},
        {"phase": "timing blocks 2/4, 5 s left"},
        {"phase": "timing blocks 3/4, 2 s left"},
    ]

"""What is told when steps become slower."""

from __future__ import annotations

from anabranch.runtime.drift import DriftWatch

NAMES = ["a:0", "b:0"]


def step(
    compute: tuple[float, float] = (0.1, 0.1), wire: float = 0.02, idle: float = 0.0
) -> dict[str, list[float]]:
    """Two ranks: the faster one waits for the slower."""
    longest = max(compute)
    return {
        "data": [0.0, 0.0],
        "forward": [0.4 * c for c in compute],
        "backward": [0.6 * c for c in compute],
        "exchange": [wire + longest - c for c in compute],
        "reduction": [0.0, 0.0],
        "optimizer": [0.001, 0.001],
        "idle": [idle, idle],
        "step": [longest + wire + idle + 0.001] * 2,
    }


def told(*phases: dict[str, list[float]]) -> list[str]:
    watch = DriftWatch(NAMES)
    said = [watch.observe(step()) for _ in range(40)]
    said += [watch.observe(phase) for phase in phases for _ in range(40)]
    return [text for text in said if text]


def test_steady_steps_say_nothing() -> None:
    assert told(step(), step((0.11, 0.1))) == []


def test_a_slow_rank_is_named_once() -> None:
    (text,) = told(step((0.1, 0.2)), step((0.1, 0.2)))
    assert "steps take 221 ms, 1.8 times as long as at first" in text
    assert "rank 1 (b:0) computes 100 ms longer" in text
    assert len(told(step((0.1, 0.2)), step(), step((0.1, 0.2)))) == 2


def test_a_slow_link_is_not_blamed_on_a_rank() -> None:
    (text,) = told(step(wire=0.1))
    assert "communication takes 80 ms longer on every rank" in text


def test_slow_data() -> None:
    (text,) = told(step(idle=0.2))
    assert "between steps take 200 ms longer" in text

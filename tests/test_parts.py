"""The parts of a run's steps: that what is not training is told apart, and that nothing is given to a part unseen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import pytest

from anabranch.blocks import build
from anabranch.runtime import Config, Trainer, trainer
from anabranch.runtime.callbacks import Callback
from anabranch.runtime.data.load import load_data
from anabranch.runtime.lr_schedule import learning_rate


class Sleeper(Callback):
    """Sleeps 30 ms after every third step, 10 ms before its update; keeps what is told."""

    def __init__(self) -> None:
        self.told: list[Mapping[str, Any]] = []

    def on_gradients(self, step: int, network: object) -> None:
        if step % 3 == 0:
            time.sleep(0.010)

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.told.append(metrics["times_s"] | {"of": metrics["step"] - 2})  # times are of the step before
        if metrics["step"] % 3 == 0:  # steps are counted from 0: it falls into the one of that number
            time.sleep(0.030)


def test_callbacks_are_idle_time_and_what_nothing_measures_is_unattributed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the number of the step: 0, 3, … callbacks sleep; 1, 4, … the trainer does, outside of all parts."""

    def slow(schedule: Any, lr: float, step: int, *more: int) -> float:
        if step % 3 == 1:
            time.sleep(0.010)
        return learning_rate(schedule, lr, step, *more)

    monkeypatch.setattr(trainer, "learning_rate", slow)
    config = Config.from_dict({"train": {"batch_size": 32, "bn_batch_size": 16, "max_steps": 26}})
    sleeper = Sleeper()
    network = build("multi_resnet", depth=8, num_branches=2, in_channels=1)
    Trainer(network, load_data("digits"), config, callbacks=[sleeper]).fit()

    def middle(part: str, turn: int) -> float:
        return median(
            float(told[part][0]) for told in sleeper.told if told["of"] >= 2 and told["of"] % 3 == turn
        )

    assert middle("idle", 0) >= 0.040
    assert max(middle("idle", 1), middle("idle", 2)) < 0.010
    assert abs(middle("forward", 0) - middle("forward", 2)) < 0.020
    assert middle("unattributed", 1) >= 0.010
    for turn in (0, 2):  # the steps are short, and another process may come between
        assert abs(middle("unattributed", turn)) <= max(0.02 * middle("step", turn), 0.003)

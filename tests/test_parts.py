"""The parts of a run's steps: that what is not training is told apart, and that nothing is given to a part unseen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

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


class SlowSamples:
    """Each sample takes 10 ms to be read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.010)
        return torch.full((1, 8, 8), float(index)), index % 2


class Watcher(Callback):
    """Keeps what is told of the steps."""

    def __init__(self) -> None:
        self.told: list[Mapping[str, Any]] = []

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.told.append(metrics)


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


def test_the_wait_for_samples_is_a_part_of_a_step() -> None:
    """Of the step's time and images/s, as they are told of, and of the median that a run ends with."""
    mesh = {"execution": "fused", "memory_format": "contiguous"}
    config = Config.from_dict({"train": {"batch_size": 3, "epochs": 2, "eval_every_epochs": 0}, "mesh": mesh})
    watcher = Watcher()
    network = build("multi_resnet", depth=8, num_branches=2, in_channels=1)
    result = Trainer(network, (SlowSamples(), SlowSamples()), config, callbacks=[watcher]).fit()
    assert len(watcher.told) == 4
    for metrics in watcher.told:
        assert metrics["step_time_s"] >= 3 * 0.010
        assert metrics["images_per_s"] == pytest.approx(3 / metrics["step_time_s"])
    assert result["median_step_s"] >= 3 * 0.010

"""The learning rate of every step: a function of the step alone, so a resumed run goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anabranch.runtime.config import LrScheduleConfig, TrainConfig


class Plateau:
    """What lr is multiplied by under the schedule "plateau": × factor after `patience` tests without a better one.

    follows: whether the schedule is "plateau"; else `scale` stays 1. All ranks see the same tests, and the state
    goes into checkpoints, so that any mesh and any resume follow the same rates. A test that is not a number is no
    better one.
    """

    def __init__(self, schedule: LrScheduleConfig) -> None:
        self.schedule, self.follows = schedule, schedule.name == "plateau"
        self.scale, self.waited = 1.0, 0
        self.best: float | None = None  # accuracy, or minus the loss; None before the first test

    def observe(self, test_accuracy: float, test_loss: float) -> None:
        """After a test."""
        if not self.follows:
            return
        score = test_accuracy if self.schedule.plateau_of == "accuracy" else -test_loss
        if math.isfinite(score) and (self.best is None or score > self.best):
            self.best, self.waited = score, 0
            return
        self.waited += 1
        if self.waited >= self.schedule.patience:
            self.scale = max(self.scale * self.schedule.factor, self.schedule.min_factor)
            self.waited = 0

    def state(self) -> dict[str, float | None]:
        """Plain data for `load`, as JSON has it."""
        return {"scale": self.scale, "best": self.best, "waited": self.waited}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; an empty one starts anew."""
        if state:
            self.scale, self.best, self.waited = state["scale"], state["best"], int(state["waited"])


def last_step(train: TrainConfig, num_train: int) -> int:
    """How many steps a run over `num_train` samples has: its epochs' steps, at most `max_steps`."""
    num_steps = train.epochs * -(-num_train // train.batch_size)
    return min(train.max_steps or num_steps, num_steps)


def learning_rate(
    schedule: LrScheduleConfig, peak: float, step: int, steps_per_epoch: int, num_steps: int
) -> float:
    """The rate of step `step` (from 0) of `num_steps`.

    Warm-up rises linearly to the schedule's value over `warmup_epochs`; "step" counts its milestones in
    epochs; "cosine" falls from the end of the warm-up to the last step.
    """
    epoch = step / steps_per_epoch
    warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    if schedule.name == "step":
        rate = peak * schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    elif schedule.name == "cosine":
        passed = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
        cosine = 0.5 * (1.0 + math.cos(math.pi * min(max(passed, 0.0), 1.0)))
        rate = peak * (schedule.final_factor + (1.0 - schedule.final_factor) * cosine)
    else:
        rate = peak
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate

"""The learning rate of every step: a function of the step alone, so a resumed run goes on where it was."""

from __future__ import annotations

import math

from anabranch.runtime.config import LrScheduleConfig


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

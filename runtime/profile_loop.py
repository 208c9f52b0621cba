"""The steps that `anabranch profile` runs: a run's own, without evaluation and checkpoints; what recording costs."""

from __future__ import annotations

import itertools
import os
import time
import weakref
from collections import defaultdict
from pathlib import Path

import torch

from anabranch.runtime.callbacks import MetricsFile
from anabranch.runtime.drift import DriftWatch
from anabranch.runtime.lr_schedule import learning_rate
from anabranch.runtime.recorder import Recorder, by_part
from anabranch.runtime.step import StepResult
from anabranch.runtime.trainer import Trainer


class StopProfile(Exception):
    """A rank was told to stop: every rank leaves after the same step."""


class StepLoop:
    """The trainer's steps, endless, without evaluation and checkpoints."""

    def __init__(self, trainer: Trainer, total: int) -> None:
        self.trainer, self.total, self.done = trainer, total, 0
        self._steps = itertools.chain.from_iterable(
            trainer.feed.steps(0, trainer.last_step) for _ in itertools.count()
        )
        self._ended = time.perf_counter()
        self.outcome: StepResult | None = None
        self._drift = DriftWatch([f"rank {rank}" for rank in range(trainer.plan.world_size)])
        self._file = MetricsFile(Path(os.devnull)) if trainer.context.rank == 0 else None
        if self._file:
            weakref.finalize(self, self._file.close)

    def tell(self, outcome: StepResult) -> None:
        """What a run does with a step's times."""
        times = by_part(outcome.times)
        if self._file:
            self._file.on_step(
                {
                    "step": self.done, "epoch": 0, "loss": outcome.loss, "accuracy": outcome.num_correct, "lr": 0.1,
                    "step_time_s": times["step"][0], "images_per_s": 1 / 3, "times_s": times,
                    "memory_bytes": outcome.memory_bytes,
                }
            )  # fmt: skip
        self._drift.observe(times)

    def tell_seconds(self, num: int = 40) -> float:
        """What a step's times cost besides the records: put together, reduced, read, written. The quickest of five."""
        assert self.outcome is not None, "after a step"
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            for _ in range(num):
                self.trainer.step.tell_times(self.trainer.device)
                self.tell(self.outcome)
            best = min(best, (time.perf_counter() - begun) / num)
        return best

    def __call__(self) -> float:
        """Seconds of one step. Raises StopProfile, on all ranks after the same step, where one is told to stop."""
        trainer, begun = self.trainer, time.perf_counter()
        recorder, config = trainer.network.recorder, trainer.config
        with recorder.span("idle"):
            took = {"step_time_s": begun - self._ended} if self.done else {}
            trainer.context.publish(phase="profiling", step=self.done, num_steps=self.total, **took)
            if self.outcome and recorder.enabled:
                self.tell(self.outcome)
        self._ended = begun
        with recorder.span("data"):
            step, _, batches = next(self._steps)
        outcome = trainer.step.gradients(batches, stop=trainer.context.stop_requested is not None)
        self.outcome = outcome
        lr = learning_rate(
            config.lr_schedule, config.optimizer.lr, step, trainer.steps_per_epoch, trainer.num_steps
        )
        trainer.step.apply(lr)
        if outcome.stop:
            raise StopProfile
        self.done += 1
        if trainer.device.type == "cuda" and recorder._kept is None:  # timed from outside
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter() - begun


def overhead_seconds(run: StepLoop, recorder: Recorder, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps with nothing recorded, with what is always on, and detailed, in turn."""
    seconds: dict[str, list[float]] = defaultdict(list)
    modes = {"off": (False, False), "light": (True, False), "detailed": (True, True)}
    for turn in range(rounds):
        names = list(modes)
        for name in names[turn % 3 :] + names[: turn % 3]:
            recorder.enabled, recorder.detailed = modes[name]
            seconds[name].append(run())
    recorder.enabled = True
    return dict(seconds)


def record_seconds(device: torch.device, num: int = 2000) -> float:
    """What one record costs: the quickest of five measurements' means."""
    recorder, best = Recorder(device), float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(num):
            recorder.exchanged("", 0, recorder.now())
        best = min(best, (time.perf_counter() - begun) / num)
        recorder.end_step()
    return best

"""A user's model whose module kills, stops, hangs, cuts off or breaks a rank at an exact moment of training, once.

What and when is in FAULTS, a JSON file in the working directory: [{"rank", "step", "moment", "how"}, …]. Each fires
once: its marker file says that it has. "after_save": not before that step's checkpoint is whole.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from anabranch.blocks import build
from anabranch.runtime.manifest import MANIFEST
from anabranch.runtime.reducer import GradientReducer
from anabranch.runtime.step import TrainStep
from anabranch.runtime.trainer import Trainer

FOLDER = Path.cwd()


def make(**options: Any) -> nn.Module:
    """The Multi-ResNet, in a process in which faults may happen."""
    return build("multi_resnet", in_channels=1, num_classes=10, **options)


def fire(trainer: Trainer, moment: str) -> None:
    """Lets happen what is due at this moment of this rank."""
    step = trainer.position.done if trainer.position else -1
    for number, fault in enumerate(json.loads((FOLDER / "FAULTS").read_text())):
        marker = FOLDER / f"fired-{number}"
        here = (fault["moment"], fault["rank"]) == (moment, trainer.context.rank)
        if not here or step != fault["step"] or marker.exists():
            continue
        marker.write_text(str(time.time()))
        how = fault["how"]
        if "after_save" in fault:  # which is written behind the training, as slowly as the disk is
            wait_for_checkpoint(trainer, fault["after_save"])
        if how == "raise":
            raise ValueError("a user's bug")
        if how == "hang":
            time.sleep(1000)
        if (
            how == "hold"
        ):  # until the controller gives up the groups: what the test does meanwhile is in this step
            until = time.monotonic() + 120
            while not trainer.context.aborted and time.monotonic() < until:
                time.sleep(0.05)
            continue
        if how == "cut":  # the network breaks, nobody dies
            trainer.context.abort()
            continue
        if how == "exit":
            os._exit(137)
        os.kill(os.getpid(), signal.Signals[how])


def wait_for_checkpoint(trainer: Trainer, step: int) -> None:
    assert trainer.run_dir is not None, "of a run"
    manifest = Path(trainer.run_dir, "checkpoints", f"step-{step:06d}", MANIFEST)
    until = time.monotonic() + 120
    while not manifest.exists() and time.monotonic() < until:
        time.sleep(0.05)


def around(owner: type, name: str, before: str = "", after: str = "") -> None:
    """Wraps a method of the trainer, or of its parts, whose trainer is the last one made."""
    plain: Callable[..., Any] = getattr(owner, name)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self if isinstance(self, Trainer) else _trainers[-1]
        if before:
            fire(trainer, before)
        result = plain(self, *args, **kwargs)
        if after:
            fire(trainer, after)
        return result

    setattr(owner, name, wrapped)


_trainers: list[Trainer] = []
_init = Trainer.__init__


def _noted(self: Trainer, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    _trainers.append(self)


if "anabranch.runtime.worker" in sys.modules:  # in a worker, not in the driver
    Trainer.__init__ = _noted  # type: ignore[method-assign]
    around(TrainStep, "gradients", before="forward")
    around(GradientReducer, "finish", before="reduction")
    around(Trainer, "_vote", before="vote", after="voted")
    around(TrainStep, "apply", before="apply")
    around(Trainer, "_save", before="save", after="saved")
    around(Trainer, "_join", before="join")
    around(Trainer, "_evaluate", before="evaluate", after="evaluated")

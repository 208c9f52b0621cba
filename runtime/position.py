"""Where a run stands besides its tensors, as plain data: what a newcomer is told by a survivor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from anabranch.runtime.errors import ConfigError


@dataclass
class Position:
    """done: steps applied. tended: the step whose evaluation and checkpoint are done, less where it was stopped.

    tested_at, saved_at: steps of the last evaluation and checkpoint, -1: none yet. result: the last evaluation's.
    plateau: its state. slower: whether steps have become slower. stopped: whether a rank asked to stop. elapsed_s:
    seconds of training so far. first_step_at: when the first step ended (time.time()). metrics: of the last step.
    replicas: with which it has trained last, 0: none yet.
    """

    done: int = 0
    tended: int = 0
    tested_at: int = -1
    saved_at: int = -1
    result: dict[str, Any] = field(default_factory=dict)
    plateau: dict[str, Any] = field(default_factory=dict)
    slower: bool = False
    stopped: bool = False
    replan: bool = False
    elapsed_s: float = 0.0
    first_step_at: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    replicas: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data; Position(**it) reads it back."""
        return asdict(self)


def check_steps(stored: Mapping[str, Any], batch_size: int, num_train: int) -> None:
    """Raises ConfigError unless the steps of a checkpoint's position are this run's: epochs and learning rates are
    counted in them."""
    then = stored.get("batch_size", batch_size), stored.get("num_train", num_train)
    if then != (batch_size, num_train):
        raise ConfigError(
            f"the checkpoint at step {stored['step']} was trained by {then[0]} of {then[1]} samples a step, here "
            f"train.batch_size is {batch_size}, and the training data have {num_train}: make them the same, or start "
            "anew"
        )


def falls_due(done: int, every: float) -> bool:
    """Whether what is done every so many steps (parts of one too; 0: never) is due after `done` of them: at the step
    nearest to each multiple, so that a part of an epoch that divides it meets every epoch's end."""
    if not every:
        return False
    every = max(every, 1.0)
    turn = round(done / every)
    return turn > 0 and round(turn * every) == done

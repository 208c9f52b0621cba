"""Losses: a function gives one value a sample; a rank adds their sum ÷ the step's samples to the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from anabranch.runtime.errors import ConfigError

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(output (n, …), target (n, …)) → (n,), one loss a sample; or their mean, a scalar."""


def cross_entropy(label_smoothing: float = 0.0) -> LossFunction:
    """Cross entropy from logits (n, classes) and class indices (n,)."""
    return partial(F.cross_entropy, reduction="none", label_smoothing=label_smoothing)


def step_share(loss: LossFunction, output: Tensor, target: Tensor, num_samples: int) -> Tensor:
    """These samples' share of the step's loss: Σ loss ÷ num_samples, a scalar.

    Raises ConfigError if the loss function returned neither one value a sample nor a scalar.
    """
    rows = output.shape[0]
    if rows == 0:
        return output.sum() * 0.0  # nothing to learn from, but every rank takes part in the backward pass
    values = loss(output, target)
    if values.dim() == 0:
        return values * (rows / num_samples)
    if values.shape[0] != rows:
        raise ConfigError(
            f"the loss returned a tensor of shape {tuple(values.shape)} for {rows} samples: return one value "
            "a sample, or their mean"
        )
    return values.sum() / num_samples

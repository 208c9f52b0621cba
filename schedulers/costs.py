"""What a step costs, as measured: plain data that schedulers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockCost:
    """One block on one device for `ModelCosts.num_samples` samples; seconds are of forward and backward.

    replicated_s: `enter` and `join`. branches_s[j]: j of the branches together, for j = 0 … num_branches.
    sum_bytes: one partial sum as it travels. parameter_bytes: all branches and what is replicated.
    """

    replicated_s: float
    branches_s: tuple[float, ...]
    sum_bytes: int
    parameter_bytes: int


@dataclass(frozen=True)
class ModelCosts:
    """The costs of a whole network on one kind of device (`Device.kind`) for a number of samples."""

    kind: str
    num_samples: int
    blocks: Mapping[str, BlockCost]
    stem_s: float
    head_s: float

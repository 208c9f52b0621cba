"""Groups of neighbouring channels, taken out of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor


def take_groups(x: Tensor, groups: Sequence[int], size: int) -> Tensor:
    """The channels of some groups of `size`, ascending: (N, C, *) → (N, len(groups)·size, *).

    A view where the groups are neighbours. Made of slices: a GPU would be waited for at every list of indices.
    """
    parts = []
    for _, run in groupby(enumerate(groups), key=lambda item: item[1] - item[0]):
        neighbours = [group for _, group in run]
        parts.append(x[:, neighbours[0] * size : (neighbours[-1] + 1) * size])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

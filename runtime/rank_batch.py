"""A (micro-)batch as one rank sees it: its own rows, and those of its branch group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from anabranch.blocks.batch import BatchLayout

Rows = Literal["own", "group"]


@dataclass(frozen=True)
class RankBatch:
    """A (micro-)batch as one rank sees it.

    own, group: layouts of the rank's own rows and of its replica's. own_range, group_range: those rows'
    positions in the step's batch. sizes: own rows of each rank of the branch group.
    """

    own: BatchLayout
    group: BatchLayout
    own_range: range
    group_range: range
    sizes: tuple[int, ...]

    def range_of(self, rows: Rows) -> range:
        return self.own_range if rows == "own" else self.group_range

    def layout_of(self, rows: Rows) -> BatchLayout:
        return self.own if rows == "own" else self.group

    def with_samples(self, own_ids: Tensor, group_ids: Tensor, random_key: int) -> RankBatch:
        """The same with the rows' sample indices and the step's random key."""
        own = replace(self.own, sample_ids=own_ids, random_key=random_key)
        group = replace(self.group, sample_ids=group_ids, random_key=random_key)
        return replace(self, own=own, group=group)

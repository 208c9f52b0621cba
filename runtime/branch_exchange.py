"""Runs a BranchSum whose other branches are on the other ranks of the branch group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from anabranch.blocks.batch import is_running_again
from anabranch.blocks.branch_sum import BranchSum, Hidden
from anabranch.blocks.convolution import WeightGradients, exchanging
from anabranch.blocks.errors import ModelError
from anabranch.runtime.collectives import copy_to_branches, reduce_from_branches, reduce_to_samples
from anabranch.runtime.wire import SumInParts, Wire


class BranchExchange:
    """Runs a BranchSum whose other branches are on the other ranks of the branch group.

    row: the block's name where this is one of its several sums.
    """

    def __init__(self, wire: Wire, row: str = "") -> None:
        self.wire, self.row = wire, row

    def __call__(self, partial_sum: Callable[[Hidden], Tensor], h: Hidden) -> Tensor:
        s, copied, sums = self._partial(partial_sum, h)
        return reduce_from_branches(s, copied, self.wire, sums)

    @contextmanager
    def to_samples(self, block_sum: BranchSum, sizes: Sequence[int]) -> Iterator[None]:
        """Inside, the sum hands over each rank's own rows of its output."""

        def edge(partial_sum: Callable[[Hidden], Tensor], h: Hidden, skip: Callable[[], Tensor]) -> Tensor:
            s, copied, sums = self._partial(partial_sum, h, sizes)
            return reduce_to_samples(s, skip().expand_as(s), copied, sizes, self.wire, sums)

        block_sum.edge = edge
        try:
            yield
        finally:
            block_sum.edge = None

    def _partial(
        self, partial_sum: Callable[[Hidden], Tensor], h: Hidden, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, Hidden, SumInParts | None]:
        queue = None
        if self.wire.overlap and torch.is_grad_enabled() and isinstance(h, Tensor) and h.requires_grad:
            queue = WeightGradients(self.wire.report, self.wire.shared)
        copied = copy_to_branches(h, self.wire, queue)
        # Run again for what backward needs, a rank stops once it has all that: some before anything is to be sent.
        sums = SumInParts(self.wire, sizes) if self.wire.chunks > 1 and not is_running_again() else None
        with exchanging(queue, sums):
            s = partial_sum(copied)
        if self.row and is_running_again() and not self.wire.is_repeating:
            raise ModelError(
                f"a checkpoint of your own runs sums of {self.row} again, of which a rank without branches needs none: "
                "checkpoint each sum alone, or leave it out and set mesh.recompute"
            )
        return s, copied, sums

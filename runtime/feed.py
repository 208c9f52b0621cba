"""What one rank computes of each step: its rows of the dealt batch, augmented and prepared ahead."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor

from anabranch.blocks.random import fold
from anabranch.runtime.config import Config
from anabranch.runtime.data.augment import augment_keys, augmented, normalise
from anabranch.runtime.data.batches import batches, epoch_order
from anabranch.runtime.data.sources import BatchSource, DataBundle
from anabranch.runtime.deal import Deal, deal_step
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.rank_batch import RankBatch
from anabranch.runtime.step import MicroBatch
from anabranch.schedulers import Plan


class Feed:
    """The steps of a run as a rank's network takes them.

    plan: the one in use, for unequal shares. accumulation: micro-batches a step.
    """

    def __init__(
        self, network: ParallelNetwork, data: DataBundle, config: Config, plan: Plan, accumulation: int
    ) -> None:
        self.network, self.data, self.config = network, data, config
        self.plan, self.accumulation = plan, accumulation
        first = next(network.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.num_train = len(data.train)
        self.steps_per_epoch = -(-self.num_train // config.train.batch_size)

    def steps(self, done: int, last: int) -> Generator[tuple[int, Tensor, list[MicroBatch]], None, None]:
        """(step, the step's sample indices, this rank's micro-batches) of the steps [done, last), prepared ahead."""
        train, per_epoch = self.config.train, self.steps_per_epoch
        for epoch in range(done // per_epoch, -(-last // per_epoch)):
            order = epoch_order(self.num_train, train.seed, epoch)
            first = done % per_epoch if epoch == done // per_epoch else 0
            end = min(per_epoch, last - epoch * per_epoch)
            steps = [order[i * train.batch_size : (i + 1) * train.batch_size] for i in range(first, end)]
            rows = [self.rows(len(ids), train.bn_batch_size, self.accumulation) for ids in steps]
            fetched = self.fetch(self.data.train, steps, rows, epoch)
            for index, (ids, parts) in enumerate(zip(steps, rows, strict=True)):
                step = epoch * per_epoch + first + index
                key = fold(train.seed, step)
                yield step, ids, [self._micro_batch(*next(fetched), ids, part, key, epoch) for part in parts]

    def rows(self, num_samples: int, bn_batch_size: int, accumulation: int = 1) -> list[RankBatch]:
        """This rank's rows of each micro-batch of a step."""
        mesh = self.network.mesh
        deals: list[Deal] = deal_step(
            num_samples, bn_batch_size=min(bn_batch_size, num_samples), data=mesh.data, branch=mesh.branch,
            samples=self.plan.samples, accumulation=accumulation,
        )  # fmt: skip
        return [self.network.rank_batch(deal, num_samples) for deal in deals]

    def fetch(
        self, source: BatchSource, steps: Sequence[Tensor], rows: Sequence[Sequence[RankBatch]], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, target) of the rows that the stem takes, one pair a micro-batch."""
        taken = self.network.input_rows
        wanted = [
            ids[part.range_of(taken).start : part.range_of(taken).stop]
            for ids, parts in zip(steps, rows, strict=True)
            for part in parts
        ]
        for batch in batches(source, wanted, epoch, self.device):
            yield batch.x_NCHW, batch.labels

    def normalised(self, x: Tensor) -> Tensor:
        """Images as the network takes them."""
        return normalise(x, self.data.normalisation, self.dtype)

    def _micro_batch(
        self, x: Tensor, target: Tensor, ids: Tensor, rows: RankBatch, key: int, epoch: int
    ) -> MicroBatch:
        own, group = (ids[r.start : r.stop].to(self.device) for r in (rows.own_range, rows.group_range))
        x = self.normalised(x)
        if self.config.data.augment in ("crop", "flip_crop", "affine"):
            mine = own if self.network.input_rows == "own" else group
            keys = augment_keys(self.config.train.seed, epoch, mine)
            x = augmented(x, keys, self.config.data)
        return MicroBatch(x, target, rows.with_samples(own, group, key))


def batches_of(num: int, size: int) -> list[Tensor]:
    """The indices of `num` samples in order, `size` at a time."""
    return [torch.arange(i, min(i + size, num)) for i in range(0, num, size)]

"""What one rank computes of each step: its rows of the dealt batch, augmented and prepared ahead."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from itertools import tee

import torch
from torch import Tensor

from anabranch.blocks.random import fold
from anabranch.runtime.config import Config
from anabranch.runtime.data.augment import augment_keys, augmented, normalise
from anabranch.runtime.data.batches import Batch, Wanted, batches, epoch_order, to_device
from anabranch.runtime.data.sources import BatchSource, DataBundle
from anabranch.runtime.deal import Deal, deal_step
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.rank_batch import RankBatch, Rows
from anabranch.runtime.step import MicroBatch
from anabranch.schedulers import Plan

DealtStep = tuple[int, Tensor, list[RankBatch]]
"""A step's epoch, its sample indices, and this rank's rows of each of its micro-batches."""


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
        """(step, the step's sample indices, this rank's micro-batches) of the steps [done, last), prepared ahead, an
        epoch's first one too."""
        steps, ahead = tee(self._dealt(done, last))
        fetched = self.fetch(self.data.train, ahead, is_training=True)
        for step, (_, ids, parts) in enumerate(steps, done):
            key = fold(self.config.train.seed, step)
            yield step, ids, [self._micro_batch(next(fetched), part, key) for part in parts]

    def _dealt(self, done: int, last: int) -> Iterator[DealtStep]:
        train = self.config.train
        for step in range(done, last):
            epoch, index = divmod(step, self.steps_per_epoch)
            if step == done or not index:
                order = epoch_order(self.num_train, train.seed, epoch)
            ids = order[index * train.batch_size : (index + 1) * train.batch_size]
            yield epoch, ids, self.rows(len(ids), train.bn_batch_size, self.accumulation)

    def rows(self, num_samples: int, bn_batch_size: int, accumulation: int = 1) -> list[RankBatch]:
        """This rank's rows of each micro-batch of a step."""
        mesh = self.network.mesh
        deals: list[Deal] = deal_step(
            num_samples, bn_batch_size=min(bn_batch_size, num_samples), data=mesh.data, branch=mesh.branch,
            samples=self.plan.samples, accumulation=accumulation,
        )  # fmt: skip
        return [self.network.rank_batch(deal, num_samples) for deal in deals]

    def fetch(
        self, source: BatchSource, steps: Iterable[DealtStep], *, is_training: bool = False
    ) -> Iterator[Batch]:
        """Images and labels of the rows that the stem takes, indices of the group's, one batch a micro-batch.

        Images come as the network takes them, in training augmented.
        """
        taken, device = self.network.input_rows, self.device
        plan = (
            Wanted(_at(ids, part, taken), epoch, _at(ids, part, "group"))
            for epoch, ids, parts in steps
            for part in parts
        )

        def prepare(wanted: Wanted, batch: Batch) -> Batch:
            x = normalise(batch.x_NCHW, self.data.normalisation, self.dtype)
            if is_training and self.config.data.augment in ("crop", "flip_crop", "affine"):
                keys = augment_keys(self.config.train.seed, wanted.epoch, batch.sample_ids)
                x = augmented(x, keys, self.config.data)
            assert wanted.group_ids is not None, "planned so"
            group = batch.sample_ids if taken == "group" else to_device(wanted.group_ids, device)
            return Batch(group, x, batch.labels)

        return batches(source, plan, device, prepare, depth=self.accumulation if is_training else 1)

    def _micro_batch(self, batch: Batch, rows: RankBatch, key: int) -> MicroBatch:
        first = rows.own_range.start - rows.group_range.start
        own = batch.sample_ids[first : first + len(rows.own_range)]
        return MicroBatch(batch.x_NCHW, batch.labels, rows.with_samples(own, batch.sample_ids, key))


def _at(ids: Tensor, rows: RankBatch, which: Rows) -> Tensor:
    """The sample indices of these rows, among a step's."""
    found = rows.range_of(which)
    return ids[found.start : found.stop]


def batches_of(num: int, size: int) -> list[Tensor]:
    """The indices of `num` samples in order, `size` at a time."""
    return [torch.arange(i, min(i + size, num)) for i in range(0, num, size)]

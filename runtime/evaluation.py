"""Accuracy and loss on the test samples, each counted once."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.runtime.data.augment import ten_crops
from anabranch.runtime.exchange import wait_for
from anabranch.runtime.feed import Feed, batches_of
from anabranch.runtime.loss import LossFunction, step_share
from anabranch.runtime.rank_batch import RankBatch
from anabranch.runtime.step import autocast, num_correct


@torch.no_grad()
def evaluate(feed: Feed, loss: LossFunction, output_share: float) -> dict[str, float]:
    """test_loss and test_accuracy of the feed's network, which is left in eval mode. Collective.

    output_share: what this rank's outputs count in a sum over all ranks.
    """
    network, train, source = feed.network, feed.config.train, feed.data.test
    network.eval()
    num = len(source)
    steps = [(0, ids, feed.rows(len(ids), 1)) for ids in batches_of(num, train.eval_batch_size)]
    sums = torch.zeros(2, dtype=torch.float64, device=feed.device)
    for (_, x, target), (_, _, (part,)) in zip(feed.fetch(source, steps), steps, strict=True):
        with autocast(train.precision, feed.device):
            output = _predicted(feed, x, part)
            target = network.to_output_rows(target, part)
            sums[0] += step_share(loss, output, target, num)
        sums[1] += num_correct(output, target)
    sums *= output_share
    dist.all_reduce(sums)
    wait_for(sums.device)
    test_loss, hits = sums.tolist()
    return {"test_loss": test_loss, "test_accuracy": hits / num}


def _predicted(feed: Feed, x: Tensor, rows: RankBatch) -> Tensor:
    """The network's outputs; of several crops the logarithm of their classes' mean probabilities."""
    data, network = feed.config.data, feed.network
    if data.eval_crops == 1:
        return network(x, rows)  # type: ignore[no-any-return]
    crops = ten_crops(x, feed.data.image_size, data.crop_padding)
    logits = [network(crop, rows) for crop in crops]
    exact = torch.promote_types(logits[0].dtype, torch.float32)  # half precisions would lose the mean
    logs = torch.stack([y.to(exact).log_softmax(1) for y in logits])
    return logs.logsumexp(0) - math.log(len(crops))

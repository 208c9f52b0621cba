"""The order of samples, and their way to the device.

consumer   | step 0         | step 1         | step 2
background | fetch 0, 1     | fetch 2        | fetch 3          (one batch ahead of the step)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from anabranch.blocks.random import fold
from anabranch.runtime.data.sources import BatchSource


class Batch(NamedTuple):
    """One rank's samples of a step, on its device: indices (n,) int64, images (n, C, H, W), labels (n,) int64."""

    sample_ids: Tensor
    x_NCHW: Tensor
    labels: Tensor


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """All sample indices (num_samples,) int64 in the order of this epoch: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(fold(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)


def batches(
    source: BatchSource, plan: Iterable[Tensor], epoch: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """The batches whose sample indices `plan` lists, in its order, the next one being made during the current step.

    What `source` raises is raised here, at its batch. Closing the iterator (or leaving it to be collected) ends the
    thread. Without a thread, and between the steps, where `source.in_background` is false.
    """
    device = torch.device(device)

    def make(indices: Tensor) -> Batch:
        batch = Batch(indices, *source.fetch(indices, epoch))
        return Batch(*(part.pin_memory() for part in batch)) if device.type == "cuda" else batch

    def move(batch: Batch) -> Batch:  # in the consumer's thread, hence on its stream
        return Batch(*(part.to(device, non_blocking=True) for part in batch))

    if not source.in_background:
        for indices in plan:
            yield move(make(indices))
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="anabranch-batches")
    ahead: deque[Future[Batch]] = deque()
    try:
        for indices in plan:
            ahead.append(pool.submit(make, indices))
            if len(ahead) > 1:
                yield move(ahead.popleft().result())
        while ahead:
            yield move(ahead.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)

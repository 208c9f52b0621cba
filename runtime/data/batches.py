"""The order of samples, and their way to the device, where they are prepared ahead of the step.

consumer   | step 0         | step 1         | step 2
background | make 0, 1      | make 2         | make 3           (ahead of the step by what one step takes)

To make a batch is to fetch its samples, bring them to the device and prepare them. On CUDA the last two run in a stream
of their own beside the step's: the host only launches them, and the step's stream waits for the batch it takes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
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


class Wanted(NamedTuple):
    """A batch to be made: indices of its samples (n,) int64, the epoch they belong to. group_ids: for `prepare`, those
    of the branch group's."""

    sample_ids: Tensor
    epoch: int = 0
    group_ids: Tensor | None = None


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """All sample indices (num_samples,) int64 in the order of this epoch: a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(fold(seed, "order", epoch))
    return torch.randperm(num_samples, generator=generator)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One a device: memory that was freed is used again on its own stream only."""
    return torch.cuda.Stream(device)


def batches(
    source: BatchSource,
    plan: Iterable[Wanted],
    device: torch.device | str = "cpu",
    prepare: Callable[[Wanted, Batch], Batch] = lambda wanted, batch: batch,
    depth: int = 1,
) -> Iterator[Batch]:
    """The batches that `plan` lists, in its order, the next `depth` being made during the current step.

    prepare: what becomes of a batch on the device; it may run in another thread. `plan` is gone through in this one.

    What `source` or `prepare` raises is raised here, at its batch. Closing the iterator (or leaving it to be collected)
    ends the thread. Without a thread, and between the steps, where `source.in_background` is false.
    """
    device = torch.device(device)
    side = _side_stream(device) if device.type == "cuda" else None

    def make(wanted: Wanted) -> _Made:
        batch = Batch(wanted.sample_ids, *source.fetch(wanted.sample_ids, wanted.epoch))
        if side is None:
            return _Made(prepare(wanted, batch))
        with torch.cuda.stream(side):
            moved = Batch(*(to_device(part, device) for part in batch))
            return _Made(prepare(wanted, moved), side.record_event())

    if not source.in_background:
        for wanted in plan:
            yield make(wanted).taken()
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="anabranch-batches")
    ahead: deque[Future[_Made]] = deque()
    try:
        for wanted in plan:
            ahead.append(pool.submit(make, wanted))
            if len(ahead) > depth:
                yield ahead.popleft().result().taken()
        while ahead:
            yield ahead.popleft().result().taken()
    finally:
        pool.shutdown(cancel_futures=True)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; of a GPU the host does not wait for them."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class _Made(NamedTuple):
    batch: Batch
    ready: torch.cuda.Event | None = None  # in the stream that made it

    def taken(self) -> Batch:
        """The batch, for the stream of whoever calls: it waits, and the memory stays the batch's until it is done."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.batch.x_NCHW.device)
            stream.wait_event(self.ready)
            for part in self.batch:
                part.record_stream(stream)
        return self.batch

"""A user's own map-style dataset as a source of batches, in this process or in worker processes."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pickle import PicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.blocks.random import fold
from anabranch.runtime.data.user import user_code
from anabranch.runtime.errors import DataError


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Give the global generators of random, numpy and torch (CPU) back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_all(key: int) -> None:
    """Seed the global generators of random, numpy and torch (CPU)."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)


@dataclass(frozen=True)
class Samples:
    """What makes the samples, here or in a worker process. `title` is for messages: `my.data:make_dataset, train`.

    Each sample is made with the global generators seeded by (seed, epoch, index).
    """

    dataset: Any
    title: str
    seed: int
    num_classes: int | None

    def make(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Image (C, H, W), float or uint8, and label () int64; `DataError` where they are not or the dataset raises."""
        where = f"{self.title}[{index}]"
        seed_all(fold(self.seed, "sample", epoch, index))
        with user_code(where, DataError):
            item = self.dataset[index]
        try:
            image, label = item
            image, label = torch.as_tensor(image), torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{where} is of type {type(item).__name__}: return (image tensor, label)"
            ) from error
        if image.ndim != 3 or not (image.is_floating_point() or image.dtype == torch.uint8):
            raise DataError(
                f"{where}: its image has shape {tuple(image.shape)} and type {image.dtype}: return (channels, height, "
                "width), floating-point or uint8"
            )
        if label.ndim or label.is_floating_point() or label.is_complex():
            raise DataError(f"{where}: its label {label!r} is no class: return an integer")
        if label < 0 or (self.num_classes is not None and label >= self.num_classes):
            rule = "not below 0" if self.num_classes is None else f"0 to {self.num_classes - 1}"
            raise DataError(f"{where}: its label is {int(label)}: classes are {rule}")
        return image, label.long()

    def make_batch(
        self, indices: list[int], epoch: int, like: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, str]]:
        """Images (n, C, H, W) of the shape and type of `like` (C, H, W), labels (n,), and what could not be read: why.

        n may be 0.
        """
        images = like.new_empty(len(indices), *like.shape)
        labels = torch.empty(len(indices), dtype=torch.int64)
        with kept_randomness():
            for place, index in enumerate(indices):
                image, labels[place] = self.make(index, epoch)
                if (image.shape, image.dtype) != (like.shape, like.dtype):
                    raise DataError(
                        f"{self.title}[{index}] has shape {tuple(image.shape)} and type {image.dtype}, "
                        f"the first sample {tuple(like.shape)} and {like.dtype}: make all alike"
                    )
                images[place] = image
        take = getattr(self.dataset, "take_unreadable", dict)
        return images, labels, take()


class UserSet:
    """A map-style dataset; `num_workers` processes make its samples, or this one between the steps where it is 0.

    unreadable: the files that the dataset could not read so far, and why.
    """

    def __init__(self, samples: Samples, num_workers: int = 0) -> None:
        self.samples = samples
        self.num_workers = num_workers
        self.unreadable: dict[str, str] = {}
        self._pool: ProcessPoolExecutor | None = None
        with user_code(f"len({samples.title})", DataError):
            self._len = len(samples.dataset)
        if not self._len:
            raise DataError(f"{samples.title} is empty: give it at least one sample")
        with kept_randomness():
            self.like = samples.make(0, 0)[0]

    @property
    def in_background(self) -> bool:
        return self.num_workers > 0  # in this process the samples draw from generators that the step uses too

    def __len__(self) -> int:
        return self._len

    def fetch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        wanted = indices.tolist()
        if not self.num_workers or not wanted:
            images, labels, unreadable = self.samples.make_batch(wanted, epoch, self.like)
            self._found(unreadable)
            return images, labels
        step = -(-len(wanted) // self.num_workers)
        shares = [wanted[start : start + step] for start in range(0, len(wanted), step)]
        title = self.samples.title
        try:
            parts = list(self._workers().map(_make_in_worker, shares, repeat(epoch), repeat(self.like)))
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{title}: a loader worker died (out of memory?): lower data.loader_workers, now {self.num_workers}"
            ) from error
        except (PicklingError, AttributeError, TypeError) as error:  # raised here, before a worker started
            raise DataError(
                f"{title} cannot be sent to loader workers: {error}: define its classes and functions at the top of a "
                "module, or set data.loader_workers = 0"
            ) from error
        for _, _, unreadable in parts:
            self._found(unreadable)
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _found(self, unreadable: dict[str, str]) -> None:
        for file, why in unreadable.items():
            if file not in self.unreadable:
                self.unreadable[file] = why
                print(
                    f"warning: {file} cannot be read ({why}): skipped, as {len(self.unreadable)} of {len(self)} so far",
                    file=sys.stderr,
                )

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:  # spawned: a fork would copy the locks that gloo's and CUDA's threads hold
            context = mp.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, context, _start_worker, (self.samples,))
        return self._pool


_worker_samples: Samples


def _start_worker(samples: Samples) -> None:
    global _worker_samples
    _worker_samples = samples
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()  # a trainer that is killed cannot close its pool
    os._exit(1)


def _make_in_worker(indices: list[int], epoch: int, like: Tensor) -> tuple[Tensor, Tensor, dict[str, str]]:
    return _worker_samples.make_batch(indices, epoch, like)

"""Where samples come from. Shapes: N samples, C channels, H height, W width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from anabranch.runtime.data.augment import Normalisation


class BatchSource(Protocol):
    """`len()` samples, fetched by their index."""

    @property
    def in_background(self) -> bool:
        """Whether `fetch` may run in a thread beside the step: it then touches no global random state here."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) and labels (n,) int64 of `indices` (n,) int64, on the CPU, in their order; n may be 0."""

    def close(self) -> None:
        """End the worker processes, if there are any."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A dataset held in memory: `images_NCHW` uint8 and `labels` (N,) int64."""

    images_NCHW: Tensor
    labels: Tensor

    @property
    def in_background(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return self.images_NCHW.index_select(0, indices), self.labels.index_select(0, indices)

    def close(self) -> None:
        pass


@dataclass(frozen=True, eq=False)
class DataBundle:
    """A dataset's two parts and what a network must know of them; `print` it to say what is trained on.

    `num_classes` is None where a user's factory did not tell; `image_size` is (height, width) in pixels;
    `normalisation` is None where images come as floats, ready for the network; `synthetic` data are made up.
    """

    name: str
    train: BatchSource
    test: BatchSource
    num_classes: int | None
    in_channels: int
    image_size: tuple[int, int]
    normalisation: Normalisation | None
    synthetic: bool = False

    def __str__(self) -> str:
        made_up = " (SYNTHETIC: made-up patterns, no real data)" if self.synthetic else ""
        shape = "x".join(map(str, (self.in_channels, *self.image_size)))
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        return f"{self.name}{made_up}: {len(self.train):,} + {len(self.test):,} images {shape}{classes}"

    def unreadable(self) -> dict[str, str]:
        """The files that could not be read so far, on this rank, and why."""
        found: dict[str, str] = {}
        for source in (self.train, self.test):
            found |= getattr(source, "unreadable", {})
        return found

    def close(self) -> None:
        """End the worker processes of both parts."""
        self.train.close()
        self.test.close()

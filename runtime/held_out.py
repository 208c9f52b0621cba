"""Training samples kept out of training, to choose by: the test samples stay unseen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anabranch.blocks.random import fold
from anabranch.runtime.data.sources import BatchSource, DataBundle
from anabranch.runtime.errors import ConfigError


@dataclass(frozen=True, eq=False)
class _Part:
    """Some of a source's samples."""

    source: BatchSource
    ids: Tensor

    @property
    def in_background(self) -> bool:
        return self.source.in_background

    @property
    def unreadable(self) -> dict[str, str]:
        """The source's files that could not be read, and why."""
        return getattr(self.source, "unreadable", {})

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return self.source.fetch(self.ids[indices], epoch)

    def close(self) -> None:
        self.source.close()


def keep_out(data: DataBundle, fraction: float, seed: int) -> tuple[DataBundle, DataBundle]:
    """(the data without some of its training samples, the same with these for its test samples).

    Which ones depends on the seed alone. Raises ConfigError if the fraction keeps out none, or all.
    """
    generator = torch.Generator().manual_seed(fold(seed, "validation"))
    order = torch.randperm(len(data.train), generator=generator)
    num = round(fraction * len(order))
    if not 0 < num < len(order):
        raise ConfigError(
            f"gross.validation_fraction {fraction} of {len(order)} samples is {num}: keep some out, and some in"
        )
    kept_out, rest = (_Part(data.train, ids.sort().values) for ids in (order[:num], order[num:]))
    return replace(data, train=rest), replace(data, train=rest, test=kept_out)

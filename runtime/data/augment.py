"""What happens to a batch on the device before the network sees it. Shapes: N samples, C channels, H, W pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.blocks.random import fold, sample_keys, uniform


@dataclass(frozen=True)
class Normalisation:
    """(x / scale - mean) / std, mean and std by channel: `scale` is the largest value a stored pixel can have."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def normalise(
    x_NCHW: Tensor, normalisation: Normalisation | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Images as the network takes them, in `dtype`: normalised by channel; None only changes the dtype."""
    x_NCHW = x_NCHW.to(dtype)
    if normalisation is None:
        return x_NCHW
    mean_C11, std_C11 = _on_device(normalisation, dtype, x_NCHW.device)
    return (x_NCHW / normalisation.scale - mean_C11) / std_C11


@cache  # a copy to the device at every step would wait for the step before
def _on_device(
    normalisation: Normalisation, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor((normalisation.mean, normalisation.std), dtype=dtype, device=device)
    return mean[:, None, None], std[:, None, None]


def augment_keys(seed: int, epoch: int, sample_ids: Tensor) -> Tensor:
    """The keys (n,) int64 of `flip_crop` for samples (n,) int64 of the dataset in this epoch."""
    return sample_keys(fold(seed, "augment", epoch), sample_ids)


def flip_crop(x_NCHW: Tensor, keys: Tensor, padding: int = 4, *, flip: bool = True) -> Tensor:
    """Flip left-right with probability 1/2 (if `flip`), then crop to the same size from the zero-padded image.

    The paper's augmentation (the multi-residual nets follow fb.resnet.torch: He et al. 2016): pixels are padded with
    zeros *after* `normalise`, so that the border is the mean colour. A sample's pixels depend on its own key (N,)
    alone: a batch can be split over ranks in any way. Works on no samples too.
    """
    num, channels, height, width = x_NCHW.shape
    u = uniform(keys, 3)
    # u < 1, but u * (2 * padding + 1) may round up to the next integer
    shift = (u[:, :2] * (2 * padding + 1)).long().clamp_(max=2 * padding)
    column = torch.arange(width, device=x_NCHW.device)
    columns = shift[:, 1:] + column
    if flip:
        columns = torch.where(u[:, 2:] < 0.5, width + 2 * padding - 1 - columns, columns)
    rows = shift[:, :1] + torch.arange(height, device=x_NCHW.device)
    sample = torch.arange(num, device=x_NCHW.device)[:, None, None, None]
    channel = torch.arange(channels, device=x_NCHW.device)[:, None, None]
    padded = F.pad(x_NCHW, (padding, padding, padding, padding))
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]

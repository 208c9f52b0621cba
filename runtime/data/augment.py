"""What happens to a batch on the device before the network sees it. Shapes: N samples, C channels, H, W pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from anabranch.blocks.random import fold, sample_keys, uniform
from anabranch.runtime.config import DataConfig


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


def augmented(x_NCHW: Tensor, keys: Tensor, data: DataConfig) -> Tensor:
    """The batch as `[data]` says, in the same shape; keys (N,) int64 decide, sample by sample."""
    if data.augment == "affine":
        return affine(
            x_NCHW, keys, degrees=data.affine_degrees, scale=data.affine_scale, shear=data.affine_shear,
            shift=data.crop_padding,
        )  # fmt: skip
    return flip_crop(x_NCHW, keys, data.crop_padding, flip=data.augment == "flip_crop")


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


def ten_crops(x_NCHW: Tensor, size: tuple[int, int], padding: int) -> list[Tensor]:
    """Four corners and the centre of each image, size (height, width), and their mirror images: 10 × (N, C, H, W).

    Images without a margin are padded by `padding` zeros first.
    """
    height, width = size
    if tuple(x_NCHW.shape[2:]) == size:
        x_NCHW = F.pad(x_NCHW, (padding,) * 4)
    down, right = x_NCHW.shape[2] - height, x_NCHW.shape[3] - width
    corners = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
    crops = [x_NCHW[:, :, top : top + height, left : left + width] for top, left in corners]
    return [*crops, *(crop.flip(3) for crop in crops)]


def affine(
    x_NCHW: Tensor, keys: Tensor, *, degrees: float, scale: float, shear: float, shift: float
) -> Tensor:
    """Each image turned, scaled, sheared and shifted at random, bilinearly, the outside filled with its darkest value.

    degrees: largest rotation to either side. scale: largest natural logarithm of the scale, to either side. shear:
    largest tangent of the horizontal shear. shift: largest shift, in pixels. A sample's distortion depends on its own
    key (N,) int64 alone: a batch can be split over ranks in any way. Works on no samples too.
    """
    if x_NCHW.shape[0] == 0:
        return x_NCHW
    height, width = x_NCHW.shape[2:]
    u = uniform(keys, 5) * 2 - 1
    angle, grow = u[:, 0] * math.radians(degrees), torch.exp(u[:, 1] * scale)
    cos, sin = torch.cos(angle) * grow, torch.sin(angle) * grow
    right, down = u[:, 3] * shift * 2 / width, u[:, 4] * shift * 2 / height
    rows = [torch.stack([cos, u[:, 2] * shear - sin, right], 1), torch.stack([sin, cos, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(x_NCHW.dtype), list(x_NCHW.shape), align_corners=False)
    darkest = x_NCHW.amin((2, 3), keepdim=True)  # grid_sample fills with zeros
    return F.grid_sample(x_NCHW - darkest, grid, align_corners=False) + darkest

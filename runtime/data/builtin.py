"""The data that need no download: `digits`, real, and `synthetic`, made up."""

from __future__ import annotations

import gzip
from importlib import resources

import torch
from torch import Tensor

from anabranch.blocks.random import fold
from anabranch.runtime.data.augment import Normalisation
from anabranch.runtime.data.sources import DataBundle, ImageSet

_NUM_DIGITS, _NUM_TEST_DIGITS = 1797, 360
# mean and (biased) standard deviation of the 1,437 training images
_DIGITS_NORMALISATION = Normalisation(16.0, (0.305386,), (0.375507,))


def read_records(raw: bytes, num_labels: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) uint8 and labels (n,) int64 of records: `num_labels` bytes (the last counts), then pixels."""
    records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(
        -1, num_labels + shape[0] * shape[1] * shape[2]
    )
    return records[:, num_labels:].reshape(-1, *shape), records[:, num_labels - 1].long()


def digits() -> DataBundle:
    """1,797 handwritten digits 1x8x8, values 0 to 16 (files/optdigits.txt); the last 360 are the test set."""
    file = resources.files("anabranch.runtime.data") / "files" / "optdigits.bin.gz"
    images, labels = read_records(gzip.decompress(file.read_bytes()), 1, (1, 8, 8))
    cut = _NUM_DIGITS - _NUM_TEST_DIGITS
    train, test = ImageSet(images[:cut], labels[:cut]), ImageSet(images[cut:], labels[cut:])
    return DataBundle("digits", train, test, 10, 1, (8, 8), _DIGITS_NORMALISATION)


def synthetic(
    seed: int, num_classes: int = 10, num_samples: int = 2000, image_size: int = 32, in_channels: int = 3
) -> DataBundle:
    """Made-up images, a function of the arguments alone: a pattern of 4x4 patches by class, and noise.

    `num_samples` training images and a fifth as many for testing, of `image_size` pixels a side.
    """
    generator = torch.Generator().manual_seed(fold(seed, "synthetic"))
    patch = torch.arange(image_size) * 4 // image_size
    patterns = torch.randint(0, 128, (num_classes, in_channels, 4, 4), dtype=torch.uint8, generator=generator)
    patterns = patterns[:, :, patch[:, None], patch]

    def draw(num: int) -> ImageSet:
        labels = torch.arange(num) % num_classes
        noise = torch.randint(0, 128, (num, *patterns.shape[1:]), dtype=torch.uint8, generator=generator)
        return ImageSet(patterns[labels] + noise, labels)

    normalisation = Normalisation(255.0, (0.5,) * in_channels, (0.2,) * in_channels)
    train, test = draw(num_samples), draw(-(-num_samples // 5))
    size = (image_size, image_size)
    return DataBundle("synthetic", train, test, num_classes, in_channels, size, normalisation, synthetic=True)

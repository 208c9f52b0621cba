"""What a batch goes through on the device: each sample on its own, wherever the batch is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from anabranch.runtime.data.augment import Normalisation, affine, augment_keys, flip_crop, normalise
from anabranch.runtime.data.batches import Wanted, batches
from anabranch.runtime.data.load import load_data


def images(num: int, height: int = 8, width: int = 8) -> Tensor:
    """No two pixels alike, none zero."""
    return torch.arange(1.0, num * 2 * height * width + 1).view(num, 2, height, width)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), epoch=st.integers(0, 300), seed=st.integers(0, 2**63))
def test_any_split_of_the_batch_gives_the_same_pixels(cuts: list[int], epoch: int, seed: int) -> None:
    """Ranks may be dealt any part of a batch, none too."""
    x, ids = images(12), torch.randperm(10**6, generator=torch.Generator().manual_seed(0))[:12]
    whole = flip_crop(x, augment_keys(seed, epoch, ids))
    parts = [
        flip_crop(x[start:end], augment_keys(seed, epoch, ids[start:end]))
        for start, end in pairwise([0, *sorted(cuts), 12])
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_the_choice_follows_the_sample_and_the_epoch() -> None:
    """A sample has its own pixels wherever it stands in the batch, and others in another epoch or run."""
    x, ids = images(64), torch.arange(64)
    first = flip_crop(x, augment_keys(0, 0, ids))
    assert torch.equal(flip_crop(x.flip(0), augment_keys(0, 0, ids.flip(0))), first.flip(0))
    assert not torch.equal(flip_crop(x, augment_keys(0, 1, ids)), first)
    assert not torch.equal(flip_crop(x, augment_keys(1, 0, ids)), first)


@pytest.mark.parametrize(("height", "width", "padding"), [(8, 8, 4), (5, 7, 2), (4, 4, 0)])
def test_every_image_is_a_crop_of_the_padded_image_flipped_or_not(
    height: int, width: int, padding: int
) -> None:
    """Each result is one of the (2p+1)² crops, or its mirror image; over many samples each of them occurs."""
    num = 200 * (2 * padding + 1) ** 2
    x = images(1, height, width).expand(num, -1, -1, -1)
    augmented = flip_crop(x, augment_keys(0, 0, torch.arange(num)), padding)
    padded = F.pad(x[0], (padding,) * 4)
    shifts = range(2 * padding + 1)
    crops = [padded[:, top : top + height, left : left + width] for top in shifts for left in shifts]
    crops += [crop.flip(-1) for crop in crops]
    found = torch.stack([(augmented == crop).all((1, 2, 3)) for crop in crops])
    assert found.any(0).all()
    counts = found.sum(1).double()
    assert (counts - num / len(crops)).abs().max() < 6 * (num / len(crops)) ** 0.5
    assert abs(counts[: len(crops) // 2].sum() - num / 2) < 6 * (num / 4) ** 0.5


DISTORTION = {"degrees": 20.0, "scale": 0.2, "shear": 0.2, "shift": 2.0}


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 12), max_size=4))
def test_any_split_of_the_batch_gives_the_same_distortion(cuts: list[int]) -> None:
    x, keys = images(12).double(), augment_keys(0, 0, torch.arange(12))
    parts = [affine(x[a:b], keys[a:b], **DISTORTION) for a, b in pairwise([0, *sorted(cuts), 12])]
    torch.testing.assert_close(torch.cat(parts), affine(x, keys, **DISTORTION), rtol=0, atol=1e-12)


def test_distortions_are_as_large_as_said() -> None:
    """Nothing asked for changes nothing; a shift alone moves whole pixels' worth; the outside is the darkest value."""
    still = dict.fromkeys(DISTORTION, 0.0)
    x, keys = images(200, 9, 9).double(), augment_keys(0, 0, torch.arange(200))
    torch.testing.assert_close(affine(x, keys, **still), x, rtol=0, atol=1e-9)
    point = torch.full((200, 1, 9, 9), -1.0, dtype=torch.float64)
    point[:, :, 4, 4] = 1.0
    where = torch.arange(9.0, dtype=torch.float64)
    for name, largest in (("shift", 2.0), ("degrees", 20.0)):
        moved = affine(point, keys, **{**still, name: largest})
        assert moved.min() == -1.0
        mass = (moved + 1).flatten(2) / 2
        column = (mass.view(200, 9, 9).sum(1) * where).sum(1) / mass.sum((1, 2)).clamp(min=1e-9) - 4
        if name == "degrees":  # the middle stays where it is
            assert column.abs().max() < 1e-9
        else:
            assert column.abs().max() <= 2.0
            assert column.abs().max() > 1.8
            assert abs(float(column.mean())) < 0.4


def test_no_samples() -> None:
    """A rank that is dealt none goes through the same calls."""
    none = torch.empty(0, dtype=torch.int64)
    x = normalise(torch.empty(0, 3, 32, 32, dtype=torch.uint8), Normalisation(255.0, (0.5,) * 3, (0.2,) * 3))
    assert flip_crop(x, augment_keys(0, 0, none)).shape == (0, 3, 32, 32)
    assert affine(x, augment_keys(0, 0, none), **DISTORTION).shape == (0, 3, 32, 32)


def test_normalise_by_channel_in_the_wanted_type() -> None:
    """(x / scale - mean) / std; floats of a user's own stay as they are but for the type."""
    x = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    done = normalise(x, Normalisation(255.0, (0.5, 0.25), (0.5, 0.25)), torch.float64)
    assert done.dtype == torch.float64
    assert done.flatten().tolist() == [-1.0, 3.0]
    plain = torch.rand(2, 1, 3, 3)
    assert torch.equal(normalise(plain, None), plain)
    assert normalise(plain, None, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.optin
def test_the_gpu_sees_the_same_pixels() -> None:
    """Batches made in the background reach the GPU, an empty one too, and are augmented there as on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    source, plan = load_data("digits").train, [Wanted(torch.arange(num)) for num in (64, 0, 7)]
    for here, there in zip(batches(source, plan), batches(source, plan, "cuda"), strict=True):
        assert there.x_NCHW.is_cuda
        expected = flip_crop(here.x_NCHW.double(), augment_keys(0, 0, here.sample_ids))
        found = flip_crop(there.x_NCHW.double(), augment_keys(0, 0, there.sample_ids))
        assert torch.equal(found.cpu(), expected)
        assert torch.equal(there.labels.cpu(), here.labels)

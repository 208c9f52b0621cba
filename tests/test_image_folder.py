"""Image folders: what training and evaluation see, what is said of broken ones."""

from __future__ import annotations

import colorsys
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from anabranch.runtime import commands
from anabranch.runtime.config import Config
from anabranch.runtime.data.augment import ten_crops
from anabranch.runtime.data.image_folder import AreaCrop, CentreCrop, hsl_shifted, load_image_folder
from anabranch.runtime.errors import DataError

SIZES: dict[str, Any] = {"image_size": 24, "resize": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, dark and bright, in JPEG and PNG, of different sizes."""
    generator = np.random.default_rng(0)
    for part, num in (("train", 12), ("val", 5)):
        for label, name in enumerate(("bright", "dark")):
            place = tmp_path / "set" / part / name
            place.mkdir(parents=True)
            for index in range(num):
                shape = (40 + index, 60 - index, 3)
                pixels = generator.integers(0, 200, shape) + (0 if label else 40)
                suffix = "jpg" if index % 2 else "png"
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index:02}.{suffix}")
    return tmp_path / "set"


def load(folder: Path, **given: Any) -> Any:
    return load_image_folder("image_folder", str(folder), SIZES, **given)


def test_both_parts_are_decoded(folder: Path) -> None:
    data = load(folder, augment="area_crop")
    assert (len(data.train), len(data.test), data.num_classes, data.image_size) == (24, 10, 2, (24, 24))
    x, labels = data.test.fetch(torch.arange(10), 0)
    assert x.shape == (10, 3, 24, 24)
    assert x.dtype == torch.uint8
    assert labels.tolist() == [0] * 5 + [1] * 5
    assert x[:5].float().mean() > 130 > 110 > x[5:].float().mean()


def test_crops_follow_seed_epoch_and_sample_alone(folder: Path) -> None:
    data, ids = load(folder, augment="area_crop_hsl"), torch.tensor([3, 20, 7])
    first = data.train.fetch(ids, 1)[0]
    assert torch.equal(data.train.fetch(ids.flip(0), 1)[0].flip(0), first)
    assert not torch.equal(data.train.fetch(ids, 2)[0], first)
    assert not torch.equal(load(folder, augment="area_crop_hsl", seed=1).train.fetch(ids, 1)[0], first)
    assert torch.equal(data.test.fetch(ids, 0)[0], data.test.fetch(ids, 5)[0])


def test_a_crop_has_the_area_and_aspect_it_should() -> None:
    crop = AreaCrop(24, 0.08)
    areas, aspects = [], []
    random.seed(0)
    for _ in range(2000):
        left, top, right, bottom = crop._box(240, 200)
        assert 0 <= left < right <= 240
        assert 0 <= top < bottom <= 200
        areas.append((right - left) * (bottom - top) / 48_000)
        aspects.append((right - left) / (bottom - top))
    assert 0.079 < min(areas) < 0.1
    assert 0.95 < max(areas) <= 1
    assert 0.74 < min(aspects) < 0.76
    assert 1.30 < max(aspects) < 1.35


def test_the_centre_is_the_centre() -> None:
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[:, 32:96] = 200
    seen = np.asarray(CentreCrop(32, 24)(Image.fromarray(pixels)))
    assert seen.shape == (24, 24, 3)
    assert (seen[:, 2:-2] > 190).all()


@pytest.mark.parametrize("shift", [(0.0, 0.0, 0.0), (20.0, 0.0, 0.0), (-15.0, 30.0, 0.0), (5.0, -40.0, 25.0)])
def test_hsl_noise_is_pythons_own_conversion(shift: tuple[float, float, float]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3)).astype(np.uint8)
    pixels[0, 0] = 0, 0, 0
    pixels[0, 1] = 120, 120, 120
    done = hsl_shifted(pixels, *shift)
    for before, after in zip(pixels.reshape(-1, 3), done.reshape(-1, 3), strict=True):
        h, light, s = colorsys.rgb_to_hls(*(before / 255.0))
        h, s, light = (
            (h + shift[0] / 180) % 1,
            np.clip(s + shift[1] / 255, 0, 1),
            np.clip(light + shift[2] / 255, 0, 1),
        )
        assert np.abs(after - np.array(colorsys.hls_to_rgb(h, light, s)) * 255).max() <= 1.0


def test_ten_crops() -> None:
    x = torch.arange(6.0 * 6).view(1, 1, 6, 6)
    crops = ten_crops(x, (4, 4), 0)
    assert len(crops) == 10
    assert crops[0][0, 0, 0, 0] == 0
    assert crops[3][0, 0, -1, -1] == 35
    assert torch.equal(crops[4], x[:, :, 1:5, 1:5])
    assert torch.equal(crops[9], crops[4].flip(3))
    padded = ten_crops(x, (6, 6), 1)  # no margin of its own
    assert padded[0][0, 0, 0].tolist() == [0] * 6
    assert torch.equal(padded[4], x)


def test_a_run_on_a_folder_with_an_unreadable_file(folder: Path, tmp_path: Path, capfd: Any) -> None:
    """It stops with the file's name, or goes on and names it once; ten crops average predictions."""
    broken = folder / "train" / "dark" / "04.png"
    broken.write_bytes(broken.read_bytes()[:60])
    layers: dict[str, Any] = {
        "model": {"name": "multi_resnet", "options": {"depth": 8, "num_branches": 2}},
        "data": {"name": "image_folder", "path": str(folder), "augment": "area_crop", "options": SIZES},
        "train": {"epochs": 2, "batch_size": 8},
        "launch": {"launcher": "none", "run_dir": str(tmp_path / "run")},
    }
    with pytest.raises(Exception, match=r"04\.png cannot be read as an image .* data\.on_bad_image to skip"):
        commands.train(Config.from_dict(layers), Console(quiet=True))
    layers["data"]["on_bad_image"] = "skip"
    layers["launch"]["run_dir"] = str(tmp_path / "second")
    result = commands.train(Config.from_dict(layers), Console(quiet=True))
    assert result is not None
    assert result["test_accuracy"] >= 0.5
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot be read as an image" in line]
    assert len(said) == 1
    assert "unreadable so far: 1 of 24" in said[0]
    single = commands.evaluate(tmp_path / "second", "", 1, Console(quiet=True))
    ten = commands.evaluate(tmp_path / "second", "", 10, Console(quiet=True))
    assert single is not None
    assert ten is not None
    assert single["test_loss"] != ten["test_loss"]
    assert (single["crops"], ten["crops"]) == (1, 10)
    json.dumps(ten)


def test_what_is_said_of_wrong_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder: give the folder that has train/ and val/"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match="2 class folders, imagenet has 1000: take image_folder"):
        load_image_folder("imagenet", str(folder), {})
    with pytest.raises(DataError, match="image_size 64, resize 32"):
        load_image_folder("image_folder", str(folder), {"image_size": 64, "resize": 32})
    with pytest.raises(DataError, match="has no option size"):
        load_image_folder("image_folder", str(folder), {"size": 64})
    (folder / "train" / "green").mkdir()
    with pytest.raises(DataError, match="train has 3 classes, val 2; only one of them has green"):
        load(folder)
    (folder / "val" / "green").mkdir()
    with pytest.raises(DataError, match=r"1 of 3 classes have no image \(green\)"):
        load(folder)

"""Image folders: what training and evaluation see, what is said of broken ones."""

from __future__ import annotations

import colorsys
import io
import json
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from rich.console import Console
from torch.nn import functional as F

from anabranch.blocks import build
from anabranch.runtime import Trainer, commands
from anabranch.runtime.assemble import make_data
from anabranch.runtime.config import Config
from anabranch.runtime.data.augment import normalise, ten_crops
from anabranch.runtime.data.image_folder import (
    _IMAGENET,
    AreaCrop,
    CentreCrop,
    hsl_shifted,
    load_image_folder,
)
from anabranch.runtime.errors import DataError
from anabranch.runtime.launch import alone

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
        "mesh": {"execution": "fused", "memory_format": "contiguous"},
    }
    with pytest.raises(Exception, match=r"04\.png cannot be read as an image .* data\.on_bad_image to skip"):
        commands.train(Config.from_dict(layers), Console(quiet=True))
    layers["data"]["on_bad_image"] = "skip"
    layers["launch"]["run_dir"] = str(tmp_path / "second")
    result = commands.train(Config.from_dict(layers), Console(quiet=True))
    assert result is not None
    assert [*result["unreadable"]] == [str(broken)]
    said = [line for line in capfd.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(said) == 1
    assert "skipped, as 1 of 24 so far" in said[0]
    single = commands.evaluate(tmp_path / "second", "", Console(quiet=True), crops=1)
    ten = commands.evaluate(tmp_path / "second", "", Console(quiet=True), crops=10)
    assert single is not None
    assert ten is not None
    assert single["test_loss"] != ten["test_loss"]
    assert (single["crops"], ten["crops"]) == (1, 10)
    json.dumps(ten)


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_each_unreadable_file_counts_once(folder: Path, loader_workers: int) -> None:
    """Wherever it was decoded. In training the next takes its place; a test sample's is grey, of its own class."""
    bad = [folder / "train" / "bright" / "11.jpg"]
    if not loader_workers:  # starting more of them is slow
        bad += [folder / "val" / "bright" / "04.png", folder / "val" / "dark" / "00.png"]
    for path in bad:
        path.write_bytes(b"no image")
    data = load(folder, on_bad="skip", loader_workers=loader_workers)
    try:
        for epoch in range(2):
            x, labels = data.train.fetch(torch.tensor([11, 12, 3, 11]), epoch)
            assert labels.tolist() == [1, 1, 0, 1]
            assert torch.equal(x[0], x[1])
        if not loader_workers:
            x, labels = data.test.fetch(torch.arange(10), 0)
            assert labels.tolist() == [0] * 5 + [1] * 5
            assert x[4].flatten(1).unique(dim=1).flatten().tolist() == [124, 116, 104]
        assert sorted(data.unreadable()) == sorted(map(str, bad))
    finally:
        data.close()


def test_whatever_breaks_a_file_is_said_with_its_name(folder: Path) -> None:
    """A size beyond Pillow's limit, pixels of 16 bits (which it would cut off), a file of another kind."""
    path = folder / "train" / "bright" / "00.png"
    huge = bytearray(path.read_bytes())
    huge[16:24] = (40_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    deep = io.BytesIO()
    Image.fromarray(np.full((40, 40), 4000, np.uint16)).save(deep, "PNG")
    for content, why in (
        (bytes(huge), "exceeds limit"),
        (deep.getvalue(), "not 8 bits"),
        (b"", "cannot identify"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"00\.png cannot be read as an image \(.*{why}"):
            load(folder)
        assert [
            why in said
            for said in load(folder, on_bad="skip").train.samples.dataset.take_unreadable().values()
        ] == [True]


def test_ten_crops_are_the_same_on_any_mesh(folder: Path) -> None:
    """Each sample once, over ranks that share samples or branches; the number divides neither."""
    (folder / "val" / "dark" / "04.png").unlink()
    one = run_ranks(1, evaluated, str(folder), "1x1")[0]
    x, labels = load(folder, margin=True).test.fetch(torch.arange(9), 0)
    network, x = untrained().double().eval(), normalise(x, _IMAGENET, torch.float64)
    mean = torch.stack([network(crop).detach().softmax(1) for crop in ten_crops(x, (24, 24), 4)]).mean(0)
    assert one["test_loss"] == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-9)
    for shape in ("1x2", "2x1"):
        for result in run_ranks(2, evaluated, str(folder), shape):
            assert result == pytest.approx(one, rel=1e-9)


def untrained() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("multi_resnet", depth=8, num_branches=2, num_classes=2)


def evaluated(rank: int, world_size: int, folder: str, shape: str) -> dict[str, float]:
    config = Config.from_dict(
        {
            "data": {"name": "image_folder", "path": folder, "options": SIZES, "eval_crops": 10},
            "train": {"precision": "fp64", "batch_size": 8, "eval_batch_size": 4},
            "mesh": {"shape": shape, "plan": "even", "execution": "fused", "memory_format": "contiguous"},
        }
    )
    context = replace(alone(), rank=rank, world_size=world_size)
    trainer = Trainer(untrained(), make_data(config), config, context=context)
    trainer._set_up()
    return trainer._evaluate()


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

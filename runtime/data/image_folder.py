"""ImageNet, Places365 and any folder of class folders: `PATH/train/CLASS/*.jpg`, `PATH/val/CLASS/*.jpg`.

Decoded by Pillow when a sample is asked for. Training: a random crop by area and aspect, mirrored half of the time,
CRU-Net's HSL noise; evaluation: the shorter side to `resize` pixels, then the centre. Randomness comes from Python's
generator, which every sample finds seeded by (seed, epoch, index).
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from anabranch.runtime.data.augment import Normalisation
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.data.user_set import Samples, UserSet
from anabranch.runtime.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_CLASSES = {"imagenet": 1000, "places365": 365, "image_folder": None}
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
_IMAGENET = Normalisation(255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = (124, 116, 104)  # the mean, of 255
_HSL = (20, 40, 50)  # CRU-Net: the largest noise of hue (of 180), saturation and lightness (of 255)


@dataclass(frozen=True)
class ImageOptions:
    """image_size: pixels of a training crop, and of the centre in evaluation. resize: shorter side in evaluation.

    min_area: smallest part of the image that a training crop has. Raises DataError for sizes that do not fit.
    """

    image_size: int = 224
    resize: int = 256
    min_area: float = 0.08

    def __post_init__(self) -> None:
        if not 0 < self.image_size <= self.resize or not 0 < self.min_area <= 1:
            raise DataError(
                f"data.options: image_size {self.image_size}, resize {self.resize}, min_area {self.min_area}: "
                "give 0 < image_size <= resize and 0 < min_area <= 1"
            )


@dataclass
class ImageFolder:
    """Map-style: (image uint8 (3, H, W), class). Classes are the folders' names in order.

    on_bad, for a file that cannot be decoded: "stop" raises DataError; "skip" keeps it for `take_unreadable`, and the
    next file takes its place, with its own class. Where `is_test`, a grey image takes it instead, of the bad file's
    class: so that every other sample counts once.
    """

    root: Path
    classes: list[str]
    transform: Callable[[Image], Image]
    on_bad: Literal["stop", "skip"] = "stop"
    is_test: bool = False
    files: list[tuple[str, int]] = field(
        init=False
    )  # text: a million Paths are slow to send to loader workers
    _unreadable: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.files = [
            (path, label) for label, name in enumerate(self.classes) for path in _images(self.root / name)
        ]
        empty = sorted({*range(len(self.classes))} - {label for _, label in self.files})
        if empty:
            names = ", ".join(self.classes[label] for label in empty[:3])
            raise DataError(
                f"{self.root}: {len(empty)} of {len(self.classes)} classes have no image ({names}): "
                f"images end in {', '.join(_SUFFIXES)}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for offset in range(len(self.files)):
            path, label = self.files[(index + offset) % len(self.files)]
            image = self._decoded(path)
            if image is not None:
                return torch.from_numpy(np.asarray(self.transform(image)).transpose(2, 0, 1).copy()), label
        raise DataError(f"{self.root}: none of {len(self.files)} images can be read")

    def take_unreadable(self) -> dict[str, str]:
        """Files that could not be decoded, and why, since last asked."""
        taken, self._unreadable = self._unreadable, {}
        return taken

    def _decoded(self, path: str) -> Image | None:
        from PIL import Image as pil

        try:
            with pil.open(path) as image:
                if image.mode[0] in "IF":  # 16 or 32 bits, which Pillow would cut off at 255
                    raise ValueError(f"pixels are of mode {image.mode}, not 8 bits a channel")
                return image.convert("RGB")
        except Exception as error:  # Pillow's readers raise many kinds on broken files
            if self.on_bad == "stop":
                raise DataError(
                    f"{path} cannot be read as an image ({error}): replace it, or set data.on_bad_image to skip"
                ) from error
            self._unreadable[path] = str(error)
            return pil.new("RGB", (256, 256), _GREY) if self.is_test else None


@dataclass(frozen=True)
class AreaCrop:
    """A part of `min_area` to all of the image, of an aspect from 3/4 to 4/3, as size × size pixels, mirrored or not.

    hsl: CRU-Net's noise on hue, saturation and lightness; the same for all of an image's pixels, hence after the
    crop, where they are fewer.
    """

    size: int
    min_area: float
    hsl: bool = False

    def __call__(self, image: Image) -> Image:
        from PIL import Image as pil

        box = self._box(*image.size)
        crop = image.resize((self.size, self.size), pil.Resampling.BILINEAR, box=box)
        if random.random() < 0.5:
            crop = crop.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
        if not self.hsl:
            return crop
        noise = [random.uniform(-most, most) for most in _HSL]
        return pil.fromarray(hsl_shifted(np.asarray(crop), *noise))

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(self.min_area, 1.0)
            aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        side = min(width, height)  # an image too narrow for any such part
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side to `resize` pixels, then size × size pixels of the middle."""

    resize: int
    size: int

    def __call__(self, image: Image) -> Image:
        from PIL import Image as pil

        width, height = image.size
        scale = self.resize / min(width, height)
        width, height = (max(round(side * scale), self.resize) for side in (width, height))
        left, top = (width - self.size) // 2, (height - self.size) // 2
        whole = image.resize((width, height), pil.Resampling.BILINEAR)
        return whole.crop((left, top, left + self.size, top + self.size))


def load_image_folder(
    name: str,
    path: str,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    loader_workers: int = 0,
    augment: str = "none",
    on_bad: Literal["stop", "skip"] = "stop",
    margin: bool = False,
) -> DataBundle:
    """The images under PATH/train and PATH/val. margin: test images keep `resize` pixels, for crops of them.

    augment: area_crop, area_crop_hsl, or anything else for the centre. Raises DataError, naming the folder or class.
    """
    if find_spec("PIL") is None:
        raise DataError(
            f"data.name = {name} needs Pillow: install it with the extra images, pip install 'anabranch[images]'"
        )
    known = ImageOptions.__dataclass_fields__
    if unknown := [key for key in options if key not in known]:
        raise DataError(f"{name} has no option {unknown[0]} (data.options): it takes {', '.join(known)}")
    sizes = ImageOptions(**options)
    root = Path(path).expanduser()
    if not path or not root.is_dir():
        where = f"data.path {root} is no folder" if path else "data.path is empty"
        raise DataError(
            f"{name}: {where}: give the folder that has train/ and val/, each with a folder a class"
        )
    classes = {part: _classes(root / part) for part in ("train", "val")}
    if classes["train"] != classes["val"]:
        odd = sorted(set(classes["train"]) ^ set(classes["val"]))
        raise DataError(
            f"{root}: train has {len(classes['train'])} classes, val {len(classes['val'])}; only one of them has "
            f"{', '.join(odd[:3])}: both need the same folders"
        )
    wanted = NUM_CLASSES[name]
    if wanted is not None and len(classes["train"]) != wanted:
        raise DataError(
            f"{root}: {len(classes['train'])} class folders, {name} has {wanted}: take image_folder for a part of it"
        )
    centre = CentreCrop(sizes.resize, sizes.image_size)
    cropped = AreaCrop(sizes.image_size, sizes.min_area, augment == "area_crop_hsl")
    transforms = {
        "train": cropped if augment.startswith("area_crop") else centre,
        "val": CentreCrop(sizes.resize, sizes.resize) if margin else centre,
    }
    train, test = (
        UserSet(
            Samples(
                ImageFolder(root / part, classes[part], transforms[part], on_bad, is_test=part == "val"),
                f"{name}, {part}",
                seed,
                len(classes[part]),
            ),
            loader_workers,
        )
        for part in ("train", "val")
    )
    size = (sizes.image_size, sizes.image_size)
    return DataBundle(name, train, test, len(classes["train"]), 3, size, _IMAGENET)


def hsl_shifted(pixels_HWC: np.ndarray, hue: float, saturation: float, lightness: float) -> np.ndarray:
    """uint8 RGB (H, W, 3) with hue shifted by `hue` of 180 (half degrees), saturation and lightness by parts of 255."""
    rgb = pixels_HWC.astype(np.float32) / 255.0
    high, low = rgb.max(-1), rgb.min(-1)
    chroma, light = high - low, (high + low) / 2
    safe = np.where(chroma > 0, chroma, 1.0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sixth = np.where(
        high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )
    sixth = np.where(chroma > 0, sixth, 0.0)
    bound = 1.0 - np.abs(2 * light - 1)
    saturated = np.where(bound > 1e-6, chroma / np.maximum(bound, 1e-6), 0.0)
    sixth = (sixth + hue / 30.0) % 6
    saturated = np.clip(saturated + saturation / 255.0, 0.0, 1.0)
    light = np.clip(light + lightness / 255.0, 0.0, 1.0)
    chroma = saturated * (1.0 - np.abs(2 * light - 1))
    shifted = []
    for place in (0.0, 8.0, 4.0):  # red, green, blue: f(n) = l - a·max(-1, min(k - 3, 9 - k, 1))
        k = (place + 2 * sixth) % 12
        shifted.append(light - chroma / 2 * np.clip(np.minimum(k - 3, 9 - k), -1.0, 1.0))
    return np.clip(np.stack(shifted, -1) * 255.0 + 0.5, 0, 255).astype(np.uint8)


def _images(folder: Path) -> list[str]:
    return sorted(
        f"{place}{os.sep}{name}"
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(_SUFFIXES)
    )


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}: data.path needs train/ and val/, each with a folder a class"
        )
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not found:
        raise DataError(
            f"{folder} has no class folders: put the images of each class into a folder of its own"
        )
    return found

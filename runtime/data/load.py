"""A dataset by its name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from anabranch.blocks.random import fold
from anabranch.runtime.data.augment import Normalisation
from anabranch.runtime.data.builtin import digits, synthetic
from anabranch.runtime.data.cifar import CIFAR10, CIFAR100, load_cifar
from anabranch.runtime.data.sources import DataBundle
from anabranch.runtime.data.user import did_you_mean, import_object, user_code
from anabranch.runtime.data.user_set import Samples, UserSet, kept_randomness, seed_all
from anabranch.runtime.errors import DataError

DATASETS = ("digits", "cifar10", "cifar100", "synthetic")
_NO_CIFAR_PATH = "is for cifar10 and cifar100"


def load_data(
    name: str,
    path: str = "",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    loader_workers: int = 0,
) -> DataBundle:
    """The dataset `name`: one of `DATASETS`, or `package.module:factory` of the user's own.

    `path` is where CIFAR lies; `options` are for `synthetic` (see there) and for the factory, which is called with
    them and returns (train, test) or (train, test, num_classes), the two being map-style: `len(train)`, `train[i]` ->
    (image (C, H, W), integer label). Its uint8 images are scaled to [0, 1], floats stay as they are. The factory and
    every sample find the global generators of random, numpy and torch seeded, by `seed` and by (seed, epoch, index).
    Raises `DataError`, with the user's own traceback where their code raised.
    """
    options = dict(options or {})
    if ":" in name:
        if path:
            raise DataError(f'data.path = "{path}" {_NO_CIFAR_PATH}: give {name} its path in data.options')
        return _user_data(name, options, seed, loader_workers)
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS, f"use {', '.join(DATASETS)} or package.module:factory")
        raise DataError(f'data.name = "{name}" is no dataset: {hint}')
    known = list(inspect.signature(synthetic).parameters)[1:] if name == "synthetic" else []
    for key, value in options.items():
        if key not in known:
            hint = did_you_mean(key, known, f"it takes {', '.join(known) or 'none'}")
            raise DataError(f"{name} has no option {key} (data.options): {hint}")
        if type(value) is not int or value < 1:
            raise DataError(f"data.options: {key} = {value!r}: give a whole number above 0")
    if name.startswith("cifar"):
        return load_cifar(CIFAR10 if name == "cifar10" else CIFAR100, path)
    if path:
        raise DataError(
            f'data.path = "{path}" {_NO_CIFAR_PATH}, {name} reads no files of yours: leave it out'
        )
    return digits() if name == "digits" else synthetic(seed, **options)


def _user_data(name: str, options: dict[str, Any], seed: int, loader_workers: int) -> DataBundle:
    with kept_randomness():  # the same on every rank, whatever the factory draws
        seed_all(fold(seed, "factory"))
        factory = import_object(name, "data.name", DataError)
        with user_code(name, DataError):
            made = factory(**options)
    return bundle_of(made, name, seed, loader_workers)


def bundle_of(made: object, name: str = "data", seed: int = 0, loader_workers: int = 0) -> DataBundle:
    """A user's own (train, test) or (train, test, num_classes) as `load_data` gives datasets; see there."""
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise DataError(
            f"{name} returned {type(made).__name__}: return (train, test) or (train, test, num_classes)"
        )
    num_classes = made[2] if len(made) == 3 else None
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise DataError(f"{name} returned num_classes = {num_classes!r}: return a whole number above 0")
    for part, dataset in zip(("train", "test"), made, strict=False):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"{name}: {part} is a {type(dataset).__name__}: it needs __len__ and __getitem__ (map-style)"
            )
    train, test = (
        UserSet(Samples(dataset, f"{name}, {part}", seed, num_classes), loader_workers)
        for part, dataset in zip(("train", "test"), made, strict=False)
    )
    if (train.like.shape, train.like.dtype) != (test.like.shape, test.like.dtype):
        raise DataError(
            f"{name}: train has images {tuple(train.like.shape)} of {train.like.dtype}, test "
            f"{tuple(test.like.shape)} of {test.like.dtype}: make them alike"
        )
    channels, height, width = train.like.shape
    to_unit = Normalisation(255.0, (0.0,) * channels, (1.0,) * channels)
    normalisation = None if train.like.is_floating_point() else to_unit
    return DataBundle(name, train, test, num_classes, channels, (height, width), normalisation)

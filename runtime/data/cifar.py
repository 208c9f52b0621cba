"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from a local copy of the official archives, never from the network.

Either version will do, packed or unpacked:

    cifar-10-binary.tar.gz    cifar-10-batches-bin/   data_batch_1.bin … data_batch_5.bin, test_batch.bin
    cifar-10-python.tar.gz    cifar-10-batches-py/    data_batch_1 … data_batch_5, test_batch
    cifar-100-binary.tar.gz   cifar-100-binary/       train.bin, test.bin      (coarse, fine label, pixels)
    cifar-100-python.tar.gz   cifar-100-python/       train, test

Archives are read in memory and nothing of them is written to disk.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anabranch.runtime.data.augment import Normalisation
from anabranch.runtime.data.builtin import read_records
from anabranch.runtime.data.cifar_pickle import read_pickle
from anabranch.runtime.data.sources import DataBundle, ImageSet
from anabranch.runtime.errors import DataError


@dataclass(frozen=True)
class Member:
    """A file of an archive: how many images it holds, and its md5 where that is published ("" where it is not)."""

    name: str
    num_images: int
    md5: str = ""


@dataclass(frozen=True)
class Archive:
    """An official archive, its md5 and the folder it unpacks to."""

    file: str
    md5: str
    version: Literal["binary", "python"]
    folder: str
    train: tuple[Member, ...]
    test: Member

    @property
    def members(self) -> tuple[Member, ...]:
        return (*self.train, self.test)


@dataclass(frozen=True)
class Cifar:
    """One of the two datasets: its classes, label bytes a record, key of the labels, and official archives."""

    name: str
    num_classes: int
    num_labels: int
    label_key: str
    normalisation: Normalisation
    archives: tuple[Archive, ...]


CIFAR10 = Cifar(
    "cifar10",
    10,
    1,
    "labels",
    Normalisation(255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    (
        Archive(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "binary",
            "cifar-10-batches-bin",
            tuple(Member(f"data_batch_{i}.bin", 10_000) for i in range(1, 6)),
            Member("test_batch.bin", 10_000),
        ),
        Archive(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "python",
            "cifar-10-batches-py",
            (
                Member("data_batch_1", 10_000, "c99cafc152244af753f735de768cd75f"),
                Member("data_batch_2", 10_000, "d4bba439e000b95fd0a9bffe97cbabec"),
                Member("data_batch_3", 10_000, "54ebc095f3ab1f0389bbae665268c751"),
                Member("data_batch_4", 10_000, "634d18415352ddfa80567beed471001a"),
                Member("data_batch_5", 10_000, "482c414d41f54cd18b22e5b47cb7c3cb"),
            ),
            Member("test_batch", 10_000, "40351d587109b95175f43aff81a1287e"),
        ),
    ),
)

CIFAR100 = Cifar(
    "cifar100",
    100,
    2,
    "fine_labels",
    Normalisation(255.0, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    (
        Archive(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "binary",
            "cifar-100-binary",
            (Member("train.bin", 50_000),),
            Member("test.bin", 10_000),
        ),
        Archive(
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "python",
            "cifar-100-python",
            (Member("train", 50_000, "16019d7e3df5f24257cddd939b257f8d"),),
            Member("test", 10_000, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        ),
    ),
)


def load_cifar(cifar: Cifar, path: str) -> DataBundle:
    """Training and test set from `path`: an archive, the folder that holds one, or the unpacked folder.

    Raises `DataError`: nothing official is there, a checksum or a number of images is wrong, a file is missing.
    """
    try:
        archive, place = _locate(cifar, path)
        raw = _read_folder(archive, place) if place.is_dir() else _read_archive(archive, place)
    except OSError as error:
        raise DataError(
            f"{cifar.name}: cannot read {error.filename or path}: {error.strerror or error}: copy or unpack it again"
        ) from error
    parts = {member: _decode(cifar, archive, member, raw[member.name], place) for member in archive.members}
    images, labels = zip(*(parts[member] for member in archive.train), strict=True)
    train, test = ImageSet(torch.cat(images), torch.cat(labels)), ImageSet(*parts[archive.test])
    return DataBundle(cifar.name, train, test, cifar.num_classes, 3, (32, 32), cifar.normalisation)


def _locate(cifar: Cifar, path: str) -> tuple[Archive, Path]:
    """Which archive is at `path`, and its file (of the right md5) or unpacked folder."""
    official = " or ".join(f"{archive.file} (md5 {archive.md5})" for archive in cifar.archives)
    if not path:
        raise DataError(
            f"{cifar.name} needs data.path: a local copy of {official}, or the folder it unpacks to"
        )
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"{cifar.name}: data.path {place} does not exist: give a local copy of {official}")
    for archive in cifar.archives if place.is_dir() else ():
        for folder in (place, place / archive.folder):
            named = folder.name == archive.folder and folder.is_dir()
            if named or all((folder / member.name).is_file() for member in archive.members):
                return archive, folder
    if place.is_dir():
        files = [place / archive.file for archive in cifar.archives if (place / archive.file).is_file()]
        if not files:
            folders = " or ".join(archive.folder for archive in cifar.archives)
            raise DataError(
                f"{cifar.name}: data.path {place} holds neither {official} nor the folder {folders}"
            )
        place = files[0]
    with place.open("rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    for archive in cifar.archives:
        if archive.md5 == md5:
            return archive, place
    raise DataError(
        f"{cifar.name}: {place} has md5 {md5}, expected {official}: it is torn or another file; copy it again"
    )


def _read_archive(archive: Archive, file: Path) -> dict[str, bytes]:
    names = {f"{archive.folder}/{member.name}": member.name for member in archive.members}
    raw = {}
    with tarfile.open(file, "r|gz") as tar:
        for info in tar:
            if info.name in names and (content := tar.extractfile(info)):
                raw[names[info.name]] = content.read()
    return raw


def _read_folder(archive: Archive, folder: Path) -> dict[str, bytes]:
    raw = {member.name: (folder / member.name).read_bytes() for member in archive.members}
    for member in archive.members:
        md5 = hashlib.md5(raw[member.name], usedforsecurity=False).hexdigest()
        if member.md5 and md5 != member.md5:
            raise DataError(
                f"{folder / member.name} has md5 {md5}, expected {member.md5}: it is torn; unpack it again"
            )
    return raw


def _decode(cifar: Cifar, archive: Archive, member: Member, raw: bytes, place: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one file, or `DataError`."""
    where = f"{place}: {member.name}"
    num_bytes = cifar.num_labels + 3 * 32 * 32
    if archive.version == "python":
        images, labels = read_pickle(raw, cifar.label_key, where)
    elif len(raw) == member.num_images * num_bytes:
        images, labels = read_records(raw, cifar.num_labels, (3, 32, 32))
    else:
        expected = f"{member.num_images:,} images of {num_bytes} bytes are {member.num_images * num_bytes:,}"
        raise DataError(f"{where} has {len(raw):,} bytes, {expected}: it is torn; copy or unpack it again")
    if not len(images) == len(labels) == member.num_images:
        raise DataError(
            f"{where} has {len(images):,} images and {len(labels):,} labels, expected {member.num_images:,} of each"
        )
    if labels.min() < 0 or labels.max() >= cifar.num_classes:
        raise DataError(
            f"{where} has a label outside 0 to {cifar.num_classes - 1}: it is torn; copy or unpack it again"
        )
    return images, labels

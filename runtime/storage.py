"""Folders that checkpoints are written to and read from."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from anabranch.runtime.durable import sync, write_bytes, write_copies


class Folder(ABC):
    """One folder of a store; `str` is its path or URL. Every method may raise OSError.

    Nothing is assumed of it but this: what `write` and `write_tensors` return from is there for every reader, and a
    small file decides (a checkpoint's manifest, with its own hash) which of the others count.
    """

    name: str

    @abstractmethod
    def child(self, name: str) -> Folder:
        """A folder inside; it need not exist."""

    @abstractmethod
    def parent(self) -> Folder:
        """The folder that this one is in."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether files can be written into it."""

    @abstractmethod
    def names(self) -> list[str]:
        """Of the files and folders in it, in order; none where it does not exist."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Of a file, in bytes; None where there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A small file."""

    @abstractmethod
    def local(self, name: str) -> Path:
        """Where a file can be opened on this machine."""

    @abstractmethod
    def make(self) -> None:
        """Makes the folder, and those that it is in, where they are missing."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """A small file, in place of what was there."""

    @abstractmethod
    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        """A safetensors file of contiguous tensors on the CPU: its bytes, its sha256."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """A file, if it is there."""

    @abstractmethod
    def remove(self, first: str) -> None:
        """The whole folder; the file of that name before any other."""

    @abstractmethod
    def sync(self) -> None:
        """Returns when the folder itself would survive a power cut."""

    def __str__(self) -> str:
        return f"{self.parent()}/{self.name}"


class LocalFolder(Folder):
    """A path. Files are written aside, fsynced and renamed."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def parent(self) -> LocalFolder:
        return LocalFolder(self.path.parent)

    def exists(self) -> bool:
        return self.path.is_dir()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []

    def size(self, name: str) -> int | None:
        file = self.path / name
        return file.stat().st_size if file.is_file() else None

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def local(self, name: str) -> Path:
        return self.path / name

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        write_bytes(self.path / name, content)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
        return write_copies(self.path / name, tensors)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def remove(self, first: str) -> None:
        if self.path.is_symlink():  # whatever it leads to is not ours
            self.path.unlink()
            return
        if (self.path / first).exists():
            (self.path / first).unlink()
            sync(self.path)
        shutil.rmtree(self.path)

    def sync(self) -> None:
        sync(self.path)
        sync(self.path.parent)
        sync(self.path.parent.parent)


def open_folder(place: str | Path) -> Folder:
    """The folder at a path."""
    return LocalFolder(Path(place))

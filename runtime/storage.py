"""Folders that checkpoints are written to and read from."""

from __future__ import annotations

import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from torch import Tensor

from anabranch.cluster.errors import NoPeerLost
from anabranch.runtime.durable import sync, write_bytes, write_copies


class StorageError(NoPeerLost, OSError):
    """A store does not answer, or refuses."""


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
    def local(self, name: str) -> AbstractContextManager[Path]:
        """Where a file can be opened on this machine, within the context."""

    @abstractmethod
    def make(self) -> None:
        """Makes the folder, and those that it is in, where they are missing."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """A small file, in place of what was there."""

    @abstractmethod
    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], rest: Callable[[], object] = lambda: None
    ) -> tuple[int, str]:
        """A safetensors file of contiguous tensors on the CPU: its bytes, its sha256. rest: after every piece."""

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
        try:
            return sorted(path.name for path in self.path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int | None:
        try:
            found = (self.path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def local(self, name: str) -> AbstractContextManager[Path]:
        return nullcontext(self.path / name)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        write_bytes(self.path / name, content)

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], rest: Callable[[], object] = lambda: None
    ) -> tuple[int, str]:
        return write_copies(self.path / name, tensors, rest)

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


class UrlFolder(Folder):
    """A URL that fsspec knows. Files are written once, by their name: no renaming, no locks, no order is asked for.

    Tensors go through a temporary file of this machine, both ways.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self.url, self.name = url.rstrip("/"), url.rstrip("/").rpartition("/")[2]
        with _os_errors():
            self._fs, self._path = url_to_fs(self.url)

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> UrlFolder:
        return UrlFolder(f"{self.url}/{name}")

    def parent(self) -> UrlFolder:
        return UrlFolder(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        return True

    def names(self) -> list[str]:
        self._fs.invalidate_cache()  # others write too
        try:
            with _os_errors():
                return sorted(
                    str(p).rstrip("/").rpartition("/")[2] for p in self._fs.ls(self._path, detail=False)
                )
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        self._fs.invalidate_cache()
        try:
            with _os_errors():
                info = self._fs.info(self._at(name))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def read(self, name: str) -> bytes:
        with _os_errors():
            return bytes(self._fs.cat_file(self._at(name)))

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        # Gone as soon as it is read: processes that Ray ends clear nothing up.
        with tempfile.TemporaryDirectory(prefix="anabranch-") as copies:
            path = Path(copies, name)
            with _os_errors():
                self._fs.get_file(self._at(name), str(path))
            yield path

    def make(self) -> None:
        with _os_errors():
            self._fs.makedirs(self._path, exist_ok=True)

    def write(self, name: str, content: bytes) -> None:
        with _os_errors():
            self._fs.pipe_file(self._at(name), content)

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], rest: Callable[[], object] = lambda: None
    ) -> tuple[int, str]:
        with tempfile.TemporaryDirectory(prefix="anabranch-") as folder:
            path = Path(folder, name)
            written = write_copies(path, tensors, rest)
            with _os_errors():
                self._fs.put_file(str(path), self._at(name))
        return written

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError), _os_errors():
            self._fs.rm_file(self._at(name))

    def remove(self, first: str) -> None:
        self.delete(first)
        with suppress(FileNotFoundError), _os_errors():
            self._fs.rm(self._path, recursive=True)

    def sync(self) -> None:
        pass

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"


@contextmanager
def _os_errors() -> Iterator[None]:
    """Every service has errors of its own; what is not there is told apart."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        raise StorageError(f"{type(error).__name__}: {error}") from error


def open_folder(place: str | Path) -> Folder:
    """The folder at a path or a URL ("…://…")."""
    return UrlFolder(str(place)) if "://" in str(place) else LocalFolder(Path(place))

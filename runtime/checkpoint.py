"""One checkpoint, as it is read: what its manifest names is hashed before it is used. Nothing is unpickled."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from anabranch.runtime.durable import sha256
from anabranch.runtime.errors import CheckpointError, UnreadableError
from anabranch.runtime.keyed_state import StateError, load_network, load_optimizer
from anabranch.runtime.manifest import MANIFEST, Manifest, damaged, unreadable
from anabranch.runtime.storage import Folder, open_folder


class Checkpoint:
    """One finished checkpoint. Its files are hashed before they are read: each once, each new copy of one at a URL.

    folder: where it is. manifest: what it holds.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._verified: set[Path] = set()

    @classmethod
    def open(cls, place: str | Path | Folder) -> Checkpoint:
        """Raises CheckpointError, naming the file and the remedy, unless manifest and file sizes are right, and
        UnreadableError where that cannot be told now."""
        folder = place if isinstance(place, Folder) else open_folder(place)
        manifest = Manifest.read(folder)
        for name, record in manifest.files.items():
            try:
                size = folder.size(name)
            except OSError as error:
                raise unreadable(f"{folder}/{name}", error) from error
            if size is None:
                raise damaged(folder, name, f"is missing, the manifest names it with {record.bytes} bytes")
            if size != record.bytes:
                raise damaged(folder, name, f"has {size} bytes, the manifest says {record.bytes}")
        return cls(folder, manifest)

    @property
    def path(self) -> Path:
        """Its folder, where that is a local one."""
        return Path(str(self.folder))

    @property
    def position(self) -> dict[str, Any]:
        """Where the run stood: plain JSON, as given to `save`."""
        return self.manifest.position

    @property
    def config_toml(self) -> str:
        """The run's configuration."""
        return self.manifest.config_toml

    @property
    def plan_toml(self) -> str:
        """The plan it was trained under; it loads under any other."""
        return self.manifest.plan_toml

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Hashes the files named, or all. Raises CheckpointError if one is not what was written, UnreadableError where
        that cannot be told now."""
        for name in self.manifest.files if names is None else names:
            with self.opened(name):
                pass

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        """Where one of its files, whole, can be opened on this machine within the context. Raises as `verify`."""
        try:
            with self.folder.local(name) as path:
                wanted = self.manifest.files[name].sha256
                if path not in self._verified and (found := sha256(path)) != wanted:
                    problem = f"was altered: its sha256 is {found}, the manifest says {wanted}"
                    raise damaged(self.folder, name, problem)
                self._verified.add(path)
                yield path
        except FileNotFoundError as error:
            raise damaged(self.folder, name, "is missing, the manifest names it") from error
        except UnreadableError:
            raise
        except OSError as error:
            raise unreadable(f"{self.folder}/{name}", error) from error

    def copy_to(self, path: Path) -> None:
        """Copies it, wherever it is, into a new folder of this machine. Raises OSError."""
        path.mkdir(parents=True)
        for name in (*self.manifest.files, MANIFEST):
            with self.folder.local(name) as file:
                shutil.copyfile(file, path / name)

    def check(self, network: nn.Module) -> None:
        """Raises what `load_into` would for this network, without filling it: it may lie on the meta device."""
        try:
            load_network(_Stored(self), network)
        except StateError as error:
            raise CheckpointError(f"checkpoint {self.folder} cannot be used: {error}") from error

    def load_into(self, network: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Fills a one-device network, or this rank's part of one, and the optimizer of its parameters (None: no state).

        Reads only the tensors that are held here; nothing is changed if an error is found. Raises CheckpointError if a
        file is torn, or the checkpoint is of another network (naming keys and shapes), another precision or another
        optimizer.
        """
        stored = _Stored(self)
        try:
            fill = [load_network(stored, network)]
            if optimizer is not None:
                kind, wanted = type(optimizer).__name__, self.manifest.optimizer
                if kind != wanted:
                    raise StateError(f"its optimizer is {wanted}, this run's is {kind}: go on with {wanted}")
                fill.append(load_optimizer(stored, network, optimizer))
        except StateError as error:
            raise CheckpointError(f"checkpoint {self.folder} cannot be used: {error}") from error
        for each in fill:
            each()


class _Stored(Mapping[str, Tensor]):
    """A checkpoint's tensors, read when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._files = checkpoint, dict[str, Any]()

    def __getitem__(self, key: str) -> Tensor:
        name = self.checkpoint.manifest.tensors[key]
        folder = self.checkpoint.folder
        try:
            if name not in self._files:
                with self.checkpoint.opened(name) as path:
                    self._files[name] = safe_open(path, "pt")  # mapped: read on where the copy's name is gone
            tensor: Tensor = self._files[name].get_tensor(key)
        except SafetensorError as error:
            raise damaged(folder, name, f"cannot be read as safetensors ({error})") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.manifest.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.manifest.tensors)

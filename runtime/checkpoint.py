"""Checkpoints of a run: one safetensors file a writer and a manifest, which is written last.

                     every rank                               rank 0 alone
    prepare                                                   clear what killed runs left, make the folder
    write            own tensors → rank-NNNN.safetensors
    commit                                                    manifest, then older checkpoints go

Between the lines the ranks tell each other how it went, as JSON: a rank that cannot write ends the save on all. A kill
at any moment leaves the previous checkpoint or this one. RUN must be a folder that all ranks see. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.durable import sync, write_tensors
from anabranch.runtime.errors import CheckpointError
from anabranch.runtime.keyed_state import StateError, load_network, load_optimizer, written_by_this_rank
from anabranch.runtime.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    damaged,
    file_name,
    finished,
    folder_name,
    step_of,
    versions,
)
from anabranch.runtime.parallel_network import ParallelNetwork


class Checkpoint:
    """One finished checkpoint. Its files are hashed once, the first time each is read.

    path: its folder. manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Raises CheckpointError, naming the file and the remedy, unless manifest and file sizes are right."""
        manifest = Manifest.read(path)
        for name, record in manifest.files.items():
            file = path / name
            if not file.is_file():
                raise damaged(file, f"is missing, the manifest names it with {record.bytes} bytes")
            if (size := file.stat().st_size) != record.bytes:
                raise damaged(file, f"has {size} bytes, the manifest says {record.bytes}")
        return cls(path, manifest)

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
        """Hashes the files named, or all. Raises CheckpointError if one is not what was written."""
        for name in self.manifest.files if names is None else names:
            if name in self._verified:
                continue
            try:
                found = _sha256(self.path / name)
            except OSError as error:
                raise damaged(self.path / name, f"cannot be read ({error.strerror})") from error
            if found != (wanted := self.manifest.files[name].sha256):
                raise damaged(
                    self.path / name, f"was altered: its sha256 is {found}, the manifest says {wanted}"
                )
            self._verified.add(name)

    def check(self, network: nn.Module) -> None:
        """Raises what `load_into` would for this network, without filling it: it may lie on the meta device."""
        try:
            load_network(_Stored(self), network)
        except StateError as error:
            raise CheckpointError(f"checkpoint {self.path} cannot be used: {error}") from error

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
            raise CheckpointError(f"checkpoint {self.path} cannot be used: {error}") from error
        for each in fill:
            each()


class Checkpoints:
    """Those of one run, in RUN/checkpoints/step-NNNNNN. Every rank has one of these.

    num_to_keep: how many of the newest stay, at least 1.
    """

    def __init__(self, run_dir: Path, num_to_keep: int = 2) -> None:
        assert num_to_keep >= 1, "the configuration allows no less"
        self.folder, self.num_to_keep = run_dir / "checkpoints", num_to_keep

    def newest(self, on_bad: Callable[[str], object] = warnings.warn) -> Checkpoint | None:
        """The newest one whose every file is what was written; None if there is none. Not collective.

        on_bad: is told of each newer one that is torn, altered or of a newer schema.
        """
        for path in finished(self.folder):
            try:
                checkpoint = Checkpoint.open(path)
                checkpoint.verify()
            except CheckpointError as error:
                on_bad(str(error))
            else:
                return checkpoint
        return None

    def save(
        self,
        network: ParallelNetwork,
        optimizer: torch.optim.Optimizer,
        *,
        position: Mapping[str, Any],
        config_toml: str,
        plan_toml: str,
    ) -> Path:
        """Writes the checkpoint of position["step"] and returns its folder, the same on all ranks; each must call it.

        When it returns the checkpoint is on the disk. One of this step that is there and whole stays as it is. Raises
        OSError if this rank cannot write, RuntimeError naming another that cannot, CheckpointError if the optimizer's
        state cannot be kept by branch.
        """
        folder, is_first = self.folder / folder_name(position["step"]), network.mesh.rank == 0
        device = next(network.parameters()).device

        def together(work: Callable[[], Any]) -> list[Any]:
            return on_all_ranks(network.mesh, device, work, f"write {folder}")

        if not together(lambda: is_first and self._prepare(folder))[0]:
            return folder
        records = together(lambda: _write(folder, network, optimizer))

        def commit() -> None:
            files = {r["name"]: FileRecord(r["bytes"], r["sha256"]) for r in records if r}
            tensors = {key: r["name"] for r in records if r for key in r["keys"]}
            kind = type(optimizer).__name__
            Manifest(dict(position), config_toml, plan_toml, kind, files, tensors, versions()).write(folder)
            self._retire(folder)

        together(lambda: commit() if is_first else None)
        return folder

    def _prepare(self, folder: Path) -> bool:
        """Makes room for a new checkpoint; False if there is a whole one. Clears what killed runs left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if step_of(path) is not None and not (path / MANIFEST).exists():
                shutil.rmtree(path)
        if folder.exists():
            try:
                Checkpoint.open(folder).verify()
            except CheckpointError:
                _remove(folder)
            else:
                self._retire(folder)
                return False
        folder.mkdir()
        sync(self.folder)
        sync(self.folder.parent)
        return True

    def _retire(self, newest: Path) -> None:
        """Removes the oldest; a checkpoint that cannot be read is left for the user to see, and counts for nothing."""
        whole = []
        for path in finished(self.folder):
            try:
                whole.append(Checkpoint.open(path).path)
            except CheckpointError:
                continue
        whole.remove(newest)
        for path in whole[self.num_to_keep - 1 :]:
            _remove(path)


class _Stored(Mapping[str, Tensor]):
    """A checkpoint's tensors, read when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._files = checkpoint, dict[str, Any]()

    def __getitem__(self, key: str) -> Tensor:
        name = self.checkpoint.manifest.tensors[key]
        path = self.checkpoint.path / name
        try:
            if name not in self._files:
                self.checkpoint.verify([name])
                self._files[name] = safe_open(path, "pt")
            tensor: Tensor = self._files[name].get_tensor(key)
        except SafetensorError as error:
            raise damaged(path, f"cannot be read as safetensors ({error})") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.manifest.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.manifest.tensors)


def _remove(folder: Path) -> None:
    """Ends a checkpoint: the manifest first, so that a half-removed one does not exist."""
    (folder / MANIFEST).unlink()
    sync(folder)
    shutil.rmtree(folder)


def _write(folder: Path, network: ParallelNetwork, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Writes this rank's file, if it has anything to write, and says what is in it."""
    try:
        tensors = written_by_this_rank(network, optimizer)
    except StateError as error:
        raise CheckpointError(f"a checkpoint cannot be written: {error}") from error
    if not tensors:
        return None
    if not folder.is_dir():
        raise OSError(
            f"{folder} is not there, though rank 0 made it: the run's folder must be one that all ranks share"
        )
    path = folder / file_name(network.mesh.rank)
    write_tensors(path, tensors)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": _sha256(path), "keys": list(tensors)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

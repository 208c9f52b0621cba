"""Checkpoints of a run: one safetensors file a writer and a manifest, which is written last.

                     every rank                               rank 0 alone
    at the step                                               clear what killed runs left, make the folder
                     copy own tensors to the CPU's memory
    meanwhile        write them (`pending_save`)              manifest, then older checkpoints go
    finish           tell how it went

Between the first lines and at the end the ranks tell each other how it went, as JSON: a rank that cannot write ends
the save on all. A kill at any moment leaves the previous checkpoint or this one. Nothing is pickled.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.durable import sha256
from anabranch.runtime.errors import CheckpointError
from anabranch.runtime.keyed_state import StateError, load_network, load_optimizer, written_by_this_rank
from anabranch.runtime.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    damaged,
    finished,
    folder_name,
    step_of,
    versions,
)
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.pending_save import PendingSave, host_copies
from anabranch.runtime.storage import Folder, open_folder


class Checkpoint:
    """One finished checkpoint. Its files are hashed once, the first time each is read.

    folder: where it is. manifest: what it holds.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._verified: set[str] = set()

    @classmethod
    def open(cls, place: str | Path | Folder) -> Checkpoint:
        """Raises CheckpointError, naming the file and the remedy, unless manifest and file sizes are right."""
        folder = place if isinstance(place, Folder) else open_folder(place)
        manifest = Manifest.read(folder)
        for name, record in manifest.files.items():
            try:
                size = folder.size(name)
            except OSError as error:
                raise CheckpointError(f"{folder}/{name} cannot be read: {error}") from error
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
        """Hashes the files named, or all. Raises CheckpointError if one is not what was written."""
        for name in self.manifest.files if names is None else names:
            if name in self._verified:
                continue
            try:
                found = sha256(self.folder.local(name))
            except OSError as error:
                raise damaged(self.folder, name, f"cannot be read ({error.strerror or error})") from error
            if found != (wanted := self.manifest.files[name].sha256):
                problem = f"was altered: its sha256 is {found}, the manifest says {wanted}"
                raise damaged(self.folder, name, problem)
            self._verified.add(name)

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


class Checkpoints:
    """Those of one run, in RUN/checkpoints/step-NNNNNN or URL/step-NNNNNN. Every rank has one of these.

    num_to_keep: how many of the newest stay, at least 1. keep_best: besides, the newest of those with the highest
    position["test_accuracy"]. url: where they are, if not in RUN. on_failure: is told, from another thread, of a save
    that failed while the training went on; `finish` raises it.
    """

    def __init__(
        self,
        run_dir: Path,
        num_to_keep: int = 2,
        *,
        keep_best: bool = False,
        url: str = "",
        on_failure: Callable[[str], object] = lambda text: None,
    ) -> None:
        assert num_to_keep >= 1, "the configuration allows no less"
        self.folder, self.num_to_keep = open_folder(url or run_dir / "checkpoints"), num_to_keep
        self._keep_best, self._on_failure = keep_best, on_failure
        self._pending: PendingSave | None = None
        self._saved_step = -1  # of the last save that went well: then there is nothing to clear up

    def newest(self, on_bad: Callable[[str], object] = warnings.warn) -> Checkpoint | None:
        """The newest one whose every file is what was written; None if there is none. Not collective.

        on_bad: is told of each newer one that is torn, altered or of a newer schema.
        """
        try:
            candidates = finished(self.folder)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}") from error
        for folder in candidates:
            try:
                checkpoint = Checkpoint.open(folder)
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
    ) -> str:
        """Begins the checkpoint of position["step"]; each rank must call it. Returns when the state is copied.

        The save before is ended first (its failure was told): where its checkpoint is, "" if there is none. A
        checkpoint of this step that is there and whole stays as it is. Raises OSError if this rank cannot write,
        RuntimeError naming another that cannot, CheckpointError if the optimizer's state cannot be kept by branch.
        """
        before = ""
        with suppress(OSError, RuntimeError):
            before = self.finish(network)
        step, mesh = position["step"], network.mesh
        folder, is_first = self.folder.child(folder_name(step)), mesh.rank == 0
        device = next(network.parameters()).device

        def together(work: Callable[[], Any]) -> list[Any]:
            return on_all_ranks(mesh, device, work, f"write {folder}")

        attempt = together(lambda: self._prepare(folder, step) if is_first else "")[0]
        if not attempt:
            return before
        tensors: dict[str, Tensor] = {}
        writes = together(lambda: tensors.update(_copied(folder, network, optimizer)) or bool(tensors))

        def commit(records: list[dict[str, Any]]) -> None:
            folder.sync()
            files = {r["name"]: FileRecord(r["bytes"], r["sha256"]) for r in records}
            keys = {key: r["name"] for r in records for key in r["keys"]}
            kind = type(optimizer).__name__
            Manifest(dict(position), config_toml, plan_toml, kind, files, keys, versions()).write(folder)
            self._saved_step = step
            self._retire(folder)

        others = [rank for rank, does in enumerate(writes) if does and rank]
        self._pending = PendingSave(
            folder, mesh.rank, attempt, tensors, others, commit if is_first else None, self._on_failure
        )
        return before

    def finish(self, network: ParallelNetwork) -> str:
        """Waits for the save that was begun; each rank must call it. Where the checkpoint is, "" if none was begun.

        When it returns the checkpoint is on the disk. Raises as `save`, for what failed in between.
        """
        pending, self._pending = self._pending, None
        mesh, device = network.mesh, next(network.parameters()).device
        what = f"write {pending.folder if pending else self.folder}"

        def own_part() -> str:
            if pending is not None and mesh.rank:  # waits for no other rank
                pending.join()
            return pending.attempt if pending else ""

        def commit() -> str:
            if pending is None:
                return ""
            pending.join()
            return str(pending.folder)

        try:
            attempts = set(on_all_ranks(mesh, device, own_part, what))
            if len(attempts) > 1:
                raise RuntimeError(f"cannot {what}: a rank was replaced meanwhile")
        except (OSError, RuntimeError) as error:
            if pending is not None and mesh.rank == 0:
                pending.give_up(str(error))
                with suppress(OSError):
                    pending.join()
            raise
        if pending is not None:
            pending.others_are_done()
        saved: str = on_all_ranks(mesh, device, lambda: "" if mesh.rank else commit(), what)[0]
        return saved

    def _prepare(self, folder: Folder, step: int) -> str:
        """Makes room for a new checkpoint and names the attempt; "" if there is a whole one."""
        if not 0 <= self._saved_step < step:
            self._clear()
            if folder.size(MANIFEST) is not None:
                try:
                    Checkpoint.open(folder).verify()
                except CheckpointError:
                    folder.remove(MANIFEST)
                else:
                    self._retire(folder)
                    return ""
        self._saved_step = -1
        folder.make()
        return secrets.token_hex(8)

    def _clear(self) -> None:
        """Removes what killed runs left."""
        for name in self.folder.names():
            left = self.folder.child(name)
            if step_of(name) is not None and left.size(MANIFEST) is None:
                left.remove(MANIFEST)

    def _retire(self, newest: Folder) -> None:
        """Removes the oldest; a checkpoint that cannot be read is left for the user to see, and counts for nothing."""
        whole = []
        for folder in finished(self.folder):
            try:
                whole.append(Checkpoint.open(folder))
            except CheckpointError:
                continue
        old = [each for each in whole if each.folder.name != newest.name][self.num_to_keep - 1 :]
        best = max((_accuracy(each) for each in whole), default=-1.0) if self._keep_best else 2.0
        kept = next((each for each in whole if _accuracy(each) == best >= 0), None)
        for each in old:
            if each is not kept:
                each.folder.remove(MANIFEST)


class _Stored(Mapping[str, Tensor]):
    """A checkpoint's tensors, read when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._files = checkpoint, dict[str, Any]()

    def __getitem__(self, key: str) -> Tensor:
        name = self.checkpoint.manifest.tensors[key]
        folder = self.checkpoint.folder
        try:
            if name not in self._files:
                self.checkpoint.verify([name])
                self._files[name] = safe_open(folder.local(name), "pt")
            tensor: Tensor = self._files[name].get_tensor(key)
        except SafetensorError as error:
            raise damaged(folder, name, f"cannot be read as safetensors ({error})") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.manifest.tensors)

    def __len__(self) -> int:
        return len(self.checkpoint.manifest.tensors)


def _accuracy(checkpoint: Checkpoint) -> float:
    """The test accuracy that it was saved with; -1 if it was not tested."""
    found = checkpoint.position.get("test_accuracy")
    return float(found) if isinstance(found, int | float) else -1.0


def _copied(folder: Folder, network: ParallelNetwork, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """This rank's part, in memory that the next step does not change."""
    try:
        tensors = written_by_this_rank(network, optimizer)
    except StateError as error:
        raise CheckpointError(f"a checkpoint cannot be written: {error}") from error
    if tensors and not folder.exists():
        raise OSError(
            f"{folder} is not there, though rank 0 made it: the run's folder must be one that all ranks share"
        )
    return host_copies(tensors)

"""Checkpoints of a run: one safetensors file a writer and a manifest, which is written last.

                     every rank                               rank 0 alone
    at the step                                               clear what killed runs left, make the folder
                     copy own tensors to the CPU's memory
    meanwhile        write them (`pending_save`),             compare copies, manifest, then older checkpoints go
                     checksums of what others hold too
    finish           tell how it went

Between the first lines and at the end the ranks tell each other how it went, as JSON: a rank that cannot write ends
the save on all. A kill at any moment leaves the previous checkpoint or this one. Nothing is pickled.
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.checkpoint import Checkpoint
from anabranch.runtime.checksum import ReplicaError, check_replicas
from anabranch.runtime.errors import CheckpointError, UnreadableError
from anabranch.runtime.keyed_state import StateError, held_elsewhere_too, written_by_this_rank
from anabranch.runtime.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    finished,
    folder_name,
    step_of,
    versions,
)
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.pending_save import PendingSave, Record, host_copies
from anabranch.runtime.storage import Folder, open_folder
from anabranch.runtime.tensor_file import not_kept

_PAUSES_S = (1.0, 4.0)  # before the newest one is looked for again in a store that did not answer


class Checkpoints:
    """Those of one run, in RUN/checkpoints/step-NNNNNN or URL/step-NNNNNN. Every rank has one of these.

    num_to_keep: how many of the newest stay, at least 1. keep_best: besides, the newest of those with the highest
    position["test_accuracy"]. url: where they are, if not in RUN. on_failure: is told, from another thread, of a save
    that failed while the training went on (`finish` raises it), and of an old checkpoint that cannot be removed.
    on_wait: as for `PendingSave.join`, where the training waits for a save.
    """

    def __init__(
        self,
        run_dir: Path,
        num_to_keep: int = 2,
        *,
        keep_best: bool = False,
        url: str = "",
        on_failure: Callable[[str], object] = lambda text: None,
        on_wait: Callable[[float], object] = lambda waited_s: None,
    ) -> None:
        assert num_to_keep >= 1, "the configuration allows no less"
        self.folder, self.num_to_keep = open_folder(url or run_dir / "checkpoints"), num_to_keep
        self._keep_best, self._on_failure, self._on_wait = keep_best, on_failure, on_wait
        self._pending: PendingSave | None = None
        self._saved_step = -1  # of the last save that went well: then there is nothing to clear up
        self._failed: OSError | None = None  # on rank 0: why the save was not even begun

    def newest(self, on_bad: Callable[[str], object] = warnings.warn) -> Checkpoint | None:
        """The newest one whose every file is what was written; None if there is none. Not collective.

        on_bad: is told of each newer one that is torn, altered or of a newer schema. Raises UnreadableError where the
        store does not answer, again and again: an older one would then be gone on from for no reason.
        """
        for pause_s in (*_PAUSES_S, None):
            try:
                found, bad = self._newest()
                break
            except UnreadableError:
                if pause_s is None:
                    raise
                time.sleep(pause_s)
        for problem in bad:
            on_bad(problem)
        return found

    def _newest(self) -> tuple[Checkpoint | None, list[str]]:
        """And what is wrong with each newer one."""
        bad: list[str] = []
        for folder in finished(self.folder):
            try:
                checkpoint = Checkpoint.open(folder)
                checkpoint.verify()
            except UnreadableError:
                raise
            except CheckpointError as error:
                bad.append(str(error))
            else:
                return checkpoint, bad
        return None, bad

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
        checkpoint of this step that is there and whole stays as it is. Where rank 0 cannot make its folder, this save
        has failed as one that breaks off later. Raises OSError if this rank does not see the folder, ElsewhereError
        naming another that does not, CheckpointError if the state cannot be kept, or not by branch, ReplicaError (on
        all ranks) if at the save before ranks held different values of what they must hold alike.
        """
        before = ""
        try:
            before = self.finish(network)
        except ReplicaError:
            raise
        except (OSError, RuntimeError):
            pass
        step, mesh = position["step"], network.mesh
        folder, is_first = self.folder.child(folder_name(step)), mesh.rank == 0
        device = next(network.parameters()).device

        def together(work: Callable[[], Any]) -> list[Any]:
            return on_all_ranks(mesh, device, work, f"write {folder}")

        def prepare() -> str:
            try:
                return self._prepare(folder, step)
            except OSError as error:  # the store may answer again at the next save
                self._failed = error
                text = f"{type(error).__name__}: {error}"
                self._on_failure(f"{folder} is not saved, the checkpoint before it stays: {text}")
                return ""

        attempt = together(lambda: prepare() if is_first else "")[0]
        if not attempt:
            return before
        part = _Part({}, [], [])

        def copy() -> bool:
            nonlocal part
            part = _copied(folder, network, optimizer)
            return bool(part.copies)

        tells = together(copy)

        def commit(records: dict[int, Record]) -> None:
            check_replicas({rank: record["sums"] for rank, record in records.items()})
            folder.sync()
            written = [record["file"] for record in records.values() if record["file"]]
            files = {file["name"]: FileRecord(file["bytes"], file["sha256"]) for file in written}
            keys = {key: file["name"] for file in written for key in file["keys"]}
            kind = type(optimizer).__name__
            Manifest(dict(position), config_toml, plan_toml, kind, files, keys, versions()).write(folder)
            self._saved_step = step

        others = [rank for rank, does in enumerate(tells) if does and rank]
        self._pending = PendingSave(
            folder, mesh.rank, attempt, *part, others, commit if is_first else None, self._on_failure,
            lambda: self._retire(folder),
        )  # fmt: skip
        return before

    def finish(self, network: ParallelNetwork) -> str:
        """Waits for the save that was begun; each rank must call it. Where the checkpoint is, "" if none was begun.

        When it returns the checkpoint is on the disk. Raises as `save`, for what failed in between.
        """
        pending, failed = self._pending, self._failed
        if pending is not None:
            pending.hurry()
        try:
            return self._finish(network, pending, failed)
        except (OSError, RuntimeError) as error:
            if pending is not None:
                pending.give_up(str(error))
                with suppress(OSError, RuntimeError):  # its own error, or that the groups were given up
                    pending.join(self._on_wait)  # the next save removes what it is writing
            raise
        finally:  # not before: `settle` may come meanwhile
            self._pending = self._failed = None

    def _finish(self, network: ParallelNetwork, pending: PendingSave | None, failed: OSError | None) -> str:
        mesh, device = network.mesh, next(network.parameters()).device
        what = f"write {pending.folder if pending else self.folder}"

        def own_part() -> str:
            if failed is not None:
                raise failed
            if pending is not None and mesh.rank:  # waits for no other rank
                pending.join(self._on_wait)
            return pending.attempt if pending else ""

        attempts = set(on_all_ranks(mesh, device, own_part, what))
        if len(attempts) > 1:
            raise RuntimeError(f"cannot {what}: a rank was replaced meanwhile")
        if pending is None:
            return ""
        pending.others_are_done()

        def commit() -> dict[str, str]:
            try:
                pending.join(self._on_wait)
            except ReplicaError as error:  # for all ranks to raise
                return {"differ": str(error)}
            return {"saved": str(pending.folder)}

        told: dict[str, str] = on_all_ranks(mesh, device, lambda: {} if mesh.rank else commit(), what)[0]
        if "differ" in told:
            raise ReplicaError(told["differ"])
        return told["saved"]

    def cancel(self, reason: str) -> None:
        """Ends the save that was begun, whole or not at all, where `finish` cannot be called any more. Of this rank."""
        pending, self._pending, self._failed = self._pending, None, None
        if pending is not None:
            pending.give_up(reason)

    @property
    def is_saving(self) -> bool:
        """Whether this rank's part of the save that was begun is under way; on rank 0, whether the save is."""
        return self._pending is not None and self._pending.is_under_way

    def held(self) -> AbstractContextManager[None]:
        """Within the context the save that was begun removes no older checkpoint. Of this rank."""
        return self._pending.held() if self._pending else nullcontext()

    def settle(self, wait_s: float) -> None:
        """Lets the save that was begun end, for the process is about to. From any thread; of this rank."""
        if pending := self._pending:
            pending.settle(wait_s)

    def _prepare(self, folder: Folder, step: int) -> str:
        """Makes room for a new checkpoint and names the attempt; "" if there is a whole one."""
        if not 0 <= self._saved_step < step:
            self._clear()
            if folder.size(MANIFEST) is not None:
                try:
                    Checkpoint.open(folder).verify()
                except UnreadableError:  # it may be whole
                    raise
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
                self._remove(left)

    def _retire(self, newest: Folder) -> None:
        """Removes the oldest. Where the store does not answer they stay until the next save, which is no failure."""
        try:
            old = self._old(newest)
        except OSError as error:
            self._on_failure(f"old checkpoints stay until the next save: {error}")
            return
        for each in old:
            self._remove(each)

    def _old(self, newest: Folder) -> list[Folder]:
        """Those not to be kept; one that cannot be read is left for the user to see, and counts for nothing."""
        whole = []
        for folder in finished(self.folder):
            try:
                whole.append(Checkpoint.open(folder))
            except CheckpointError:
                continue
        old = [each for each in whole if each.folder.name != newest.name][self.num_to_keep - 1 :]
        best = max((_accuracy(each) for each in whole), default=-1.0) if self._keep_best else 2.0
        kept = next((each for each in whole if _accuracy(each) == best >= 0), None)
        return [each.folder for each in old if each is not kept]

    def _remove(self, folder: Folder) -> None:
        """One that stays is no failure of the save."""
        try:
            folder.remove(MANIFEST)
        except OSError as error:
            why = error.strerror or error
            self._on_failure(f"the old checkpoint {folder} cannot be removed ({why}): remove it by hand")


def _accuracy(checkpoint: Checkpoint) -> float:
    """The test accuracy that it was saved with; -1 if it was not tested."""
    found = checkpoint.position.get("test_accuracy")
    return float(found) if isinstance(found, int | float) else -1.0


class _Part(NamedTuple):
    """copies: by key, in memory that the next step does not change. written, summed: see PendingSave."""

    copies: dict[str, Tensor]
    written: list[str]
    summed: list[str]


def _copied(folder: Folder, network: ParallelNetwork, optimizer: torch.optim.Optimizer) -> _Part:
    """What this rank writes or compares."""
    try:
        written = written_by_this_rank(network, optimizer)
    except StateError as error:
        raise CheckpointError(f"a checkpoint cannot be written: {error}") from error
    summed = held_elsewhere_too(network)
    tensors = {**summed, **written}
    if problem := not_kept(tensors):
        raise CheckpointError(f"a checkpoint cannot be written: {problem}")
    if tensors and not folder.exists():
        raise OSError(
            f"{folder} is not there, though rank 0 made it: the run's folder must be one that all ranks share"
        )
    return _Part(host_copies(tensors), list(written), list(summed))

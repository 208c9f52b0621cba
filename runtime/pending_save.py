"""A checkpoint on its way to storage: a thread of each rank writes while the training goes on.

    every rank                               rank 0
    rank-NNNN-ATTEMPT.safetensors: its part  its own
    rank-NNNN-ATTEMPT.json: what it wrote,   waits for the other ranks' records, and takes them away
      checksums of what others hold too      compares the checksums
                                             manifest.json, then older checkpoints go

No collective runs here: the training's run meanwhile, and two threads must not mix theirs.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from anabranch.runtime.checksum import checksum
from anabranch.runtime.manifest import file_name
from anabranch.runtime.pace import Pace
from anabranch.runtime.storage import Folder, StorageError

_POLL_S = 0.05
_VISIBLE_S = 60.0  # for what another host has written to be seen here (NFS keeps names for up to a minute)
_EXIT_S = 5.0  # for the other ranks, once the program is ending
_LOOK_S = 0.1  # between a waiting rank's looks at its groups

Record = dict[str, Any]
Commit = Callable[[dict[int, Record]], object]  # by rank


class PendingSave:
    """One rank's part of one save, begun when it is made.

    attempt: the save's name, the same on all ranks; it is in the files' names. tensors: on the CPU, this save's own.
    written, summed: keys of those that this rank writes, and of those that other ranks hold too. others: the other
    ranks that have any. commit: on rank 0, ends the save, given every rank's record; after: then clears up. on_failure:
    is told, in the thread, what went wrong.

    A record is JSON: sums {key: checksum}, and file {name, bytes, sha256, keys} or null.
    """

    def __init__(
        self,
        folder: Folder,
        rank: int,
        attempt: str,
        tensors: Mapping[str, Tensor],
        written: Collection[str],
        summed: Collection[str],
        others: list[int],
        commit: Commit | None,
        on_failure: Callable[[str], object],
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.folder, self.attempt = folder, attempt
        self._rank, self._others, self._commit = rank, others, commit
        self._tensors, self._written, self._summed = tensors, written, summed
        self._on_failure, self._after, self._pace = on_failure, after, Pace()
        self._error: BaseException | None = None
        self._given_up = ""
        # held while rank 0 ends it: given up it is before, or not at all
        self._decides = threading.Condition()
        self._is_held = self._is_whole = self._ending = False
        self._deadline = float("inf")
        # Not a daemon: a program that ends (of an error, too) first finishes what it has begun to save.
        self._thread = threading.Thread(target=self._run, name=f"save {folder.name} on rank {rank}")
        self._thread.start()

    def join(self, on_wait: Callable[[float], object] = lambda waited_s: None) -> None:
        """Waits for the end; raises what this rank's part raised.

        on_wait: called again and again with the seconds so far; what it raises ends the waiting.
        """
        self.hurry()
        begun = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(_LOOK_S)
            on_wait(time.monotonic() - begun)
        if self._error is not None:
            raise self._error

    @property
    def is_under_way(self) -> bool:
        """Whether it may still come to something."""
        return self._thread.is_alive() and not self._given_up and not self._is_whole

    def hurry(self) -> None:
        """Somebody will wait for it: it leaves no time to the training any more."""
        self._pace.hurry()

    def others_are_done(self) -> None:
        """What they have written is there, or will not be: from now on rank 0 waits only until it is seen."""
        self._deadline = time.monotonic() + _VISIBLE_S

    def give_up(self, reason: str) -> None:
        """Ends it, whole or not at all: whole where rank 0 is at the manifest, whose end is waited for.

        What is being written or sent may end later: it is this attempt's alone.
        """
        with self._decides:
            self._given_up = reason
            self._decides.notify_all()
        self.hurry()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the context no older checkpoint goes for it, nor where it is then given up."""
        with self._decides:
            self._is_held = True
        try:
            yield
        finally:
            with self._decides:
                self._is_held = False
                self._decides.notify_all()

    def settle(self, wait_s: float) -> None:
        """Lets it end, as the process is about to: waits for its own part, and a little for the others'."""
        self.hurry()
        self._ending = True
        with self._decides:
            self._decides.notify_all()
        self._thread.join(wait_s)

    def _run(self) -> None:
        self._pace.start()
        try:
            record = self._work()
            self._tensors = {}
            if self._commit is not None:
                records = {self._rank: record, **{rank: self._record_of(rank) for rank in self._others}}
                with self._decides:
                    self._check()
                    for rank in self._others:
                        self.folder.delete(self._record_name(rank))
                    self._commit(records)
                    self._is_whole = True
                    self._decides.wait_for(lambda: not self._is_held or self._given_up or self._ending)
                if not self._given_up:
                    self._after()
            elif record["sums"] or record["file"]:
                self._tell(record)
        except Exception as error:
            self._error = error
            if self._given_up and self._commit is None:  # rank 0 tells it
                return
            text = f"rank {self._rank} on {socket.gethostname()}: {type(error).__name__}: {error}"
            with suppress(OSError):  # the disk may be full; the ranks tell each other besides
                if self._commit is None:
                    self._tell({"error": text})
            self._on_failure(f"{self.folder} is not saved, the checkpoint before it stays: {text}")
        except BaseException as error:
            self._error = error

    def _work(self) -> Record:
        """Writes this rank's part; its record."""
        sums = {}
        for key in self._summed:
            sums[key] = checksum(self._tensors[key])
            self._rest()
        if not self._written:
            return {"sums": sums, "file": None}
        name = file_name(self._rank, self.attempt)
        mine = {key: self._tensors[key] for key in self._written}
        size, sha256 = self.folder.write_tensors(name, mine, self._rest)
        return {
            "sums": sums,
            "file": {"name": name, "bytes": size, "sha256": sha256, "keys": list(self._written)},
        }

    def _rest(self) -> None:
        self._check()
        self._pace.rest()

    def _check(self) -> None:
        if self._given_up:
            raise OSError(self._given_up)

    def _tell(self, record: Record) -> None:
        self.folder.write(self._record_name(self._rank), json.dumps(record).encode())

    def _record_of(self, rank: int) -> Record:
        """What another rank says of its part. Raises OSError when it failed, or will not come."""
        while True:
            record: Record = {}
            with suppress(OSError, ValueError):  # not there yet, or half of it
                record = json.loads(self.folder.read(self._record_name(rank)))
            if record:
                break
            self._check()
            if time.monotonic() > self._deadline:
                raise OSError(
                    f"rank {rank} did not write its part before the run ended"
                    if self._ending
                    else f"rank {rank} has written its part, it is not to be seen here: all ranks must share the folder"
                )
            if self._ending or not threading.main_thread().is_alive():
                self._deadline = min(self._deadline, time.monotonic() + _EXIT_S)
            time.sleep(_POLL_S)
        if "error" in record:
            raise StorageError(record["error"])
        return record

    def _record_name(self, rank: int) -> str:
        return f"rank-{rank:04d}-{self.attempt}.json"


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values in contiguous memory of their own on the CPU; a GPU's through pinned memory, all at once."""
    copies = {}
    for key, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[key] = copy.copy_(tensor.detach(), non_blocking=True)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies

"""Runs a function on several real ranks: processes with a gloo process group, results by rank.

Processes come from a fork server that has imported torch already, so a group of four stands in a fraction of a second. The
function must be importable (defined in a module, not in a test body).
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "anabranch.runtime.verify"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 100.0) -> list[Any]:
    """[function(rank, world_size, *args) on each rank]; raises AssertionError with the first failed rank's traceback."""
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(world_size):
            mine, theirs = _context.Pipe()
            process = _context.Process(
                target=_run, args=(rank, world_size, os.path.join(folder, "store"), theirs, function, args), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        results: dict[int, Any] = {}
        failure = ""
        try:
            while len(results) < world_size and not failure:
                ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in results], timeout_s)
                assert ready, f"ranks {sorted(set(range(world_size)) - set(results))} gave no result in {timeout_s} s"
                for pipe in ready:
                    rank = pipes.index(pipe)  # type: ignore[arg-type]
                    try:
                        ok, value = pipe.recv()  # type: ignore[union-attr]
                    except EOFError:
                        ok, value = False, f"rank {rank} died"
                    results[rank] = value
                    failure = failure or ("" if ok else f"rank {rank}:\n{value}")
        finally:
            for process in processes:
                if failure:
                    process.kill()
                process.join(10)
                process.kill()
        assert not failure, failure
        return [results[rank] for rank in range(world_size)]


def _run(
    rank: int, world_size: int, store: str, pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
        )
        pipe.send((True, function(rank, world_size, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

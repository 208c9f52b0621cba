"""Runs a function on several real ranks: processes with a process group, results by rank.

Processes come from a fork server that has imported torch already, so a group of four stands in a fraction of a second.
The function must be importable (defined in a module, not in a test body).
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_context = mp.get_context("forkserver")
# torch._dynamo: seconds of imports that the first optimizer of every process would make
_context.set_forkserver_preload(["torch", "torch._dynamo", "anabranch.runtime.verify"])


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 280.0,
    backend: str = "gloo",
) -> list[Any]:
    """[function(rank, world_size, *args) on each rank]; raises AssertionError with a failed rank's traceback.

    timeout_s: just below pytest's own, which finds what hangs. backend: "nccl": all ranks on the first GPU.
    """
    pipes: list[Connection] = []
    processes = []
    results: dict[int, Any] = {}
    failure = ""
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            mine, theirs = _context.Pipe()
            started = (rank, world_size, str(Path(folder, "store")), backend, theirs, function, args)
            process = _context.Process(target=_run, args=started, daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            while len(results) < world_size and not failure:
                missing = [rank for rank in range(world_size) if rank not in results]
                ready = wait([pipes[rank] for rank in missing], timeout_s)
                if not ready:
                    failure = f"ranks {missing} gave no result in {timeout_s} s"
                for rank in missing:
                    if pipes[rank] in ready and not failure:
                        try:
                            ok, results[rank] = pickle.loads(pipes[rank].recv_bytes())
                        except EOFError:
                            ok, results[rank] = False, "died"
                        failure = "" if ok else f"rank {rank}: {results[rank]}"
        finally:
            for process in processes:
                if len(results) < world_size or failure:
                    process.kill()
                process.join()
    assert not failure, failure
    return [results[rank] for rank in range(world_size)]


def _run(
    rank: int,
    world_size: int,
    store: str,
    backend: str,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            os.environ["NCCL_HOSTID"] = f"rank-{rank}"  # it refuses two ranks of one host on one GPU
            torch.cuda.set_device(0)
        rendezvous = torch._C._distributed_c10d.FileStore(store, world_size)
        dist.init_process_group(backend, store=rendezvous, rank=rank, world_size=world_size)
        answer = (True, function(rank, world_size, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    finally:
        # plain pickle copies tensors; the pipe's own would share memory that dies with this process
        pipe.send_bytes(pickle.dumps(answer))
        if dist.is_initialized():
            dist.destroy_process_group()

"""Worker processes for benchmarks, and interleaved rounds of what they compare."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from anabranch.cluster.environment import thread_share


def run_workers(num_workers: int, function: Callable[..., Any], *arguments: Any, threads: int = 0) -> Any:
    """function(rank, *arguments) in as many processes with a gloo process group; rank 0's result.

    threads: of each; 0: its share of the cores. Raises RuntimeError when a worker fails (its traceback is printed).
    """
    spawn = multiprocessing.get_context("spawn")
    threads = threads or thread_share(len(os.sched_getaffinity(0)), num_workers)
    with spawn.Manager() as manager:
        result = manager.dict()
        shared = (num_workers, _free_port(), threads, result, function, arguments)
        workers = [spawn.Process(target=_worker, args=(rank, *shared)) for rank in range(num_workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            if worker.exitcode:
                for other in workers:
                    other.terminate()
        if "value" not in result:
            raise RuntimeError("a worker failed, its traceback is above: nothing was measured")
        return result["value"]


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, steps: int = 1, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds a step of each side, one figure a round; all sides run in every round, the order turning.

    Whatever drifts on the machine hits all of them. Every rank calls it; figures are this rank's.
    """
    for step in sides.values():
        for _ in range(warm_up):
            step()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for index in range(rounds):
        turned = names[index % len(names) :] + names[: index % len(names)]
        for name in turned if index % 2 == 0 else reversed(turned):
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(steps):
                sides[name]()
            samples[name].append((time.perf_counter() - begun) / steps)
    return samples


def _worker(
    rank: int, num_workers: int, port: int, threads: int, result: Any, function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=num_workers,
        timeout=timedelta(seconds=600),
    )
    value = function(rank, *arguments)
    if rank == 0:
        result["value"] = value
    dist.barrier()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

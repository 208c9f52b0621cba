"""Worker processes for benchmarks, and interleaved rounds of what they compare."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from anabranch.benchmarks.two_hosts import Host
from anabranch.cluster.environment import keep_freed_memory, thread_share
from anabranch.runtime.numerics import use_numerics

# A server that has imported torch and is forked: of many rows' workers each stands in a fraction of a second.
_context = multiprocessing.get_context("forkserver")
_PRELOADED = ["torch", "torch._dynamo", "anabranch.benchmarks.steps"]


def run_workers(
    num_workers: int,
    function: Callable[..., Any],
    *arguments: Any,
    threads: int = 0,
    hosts: Sequence[Host] = (),
    on_cpu: bool = False,
) -> Any:
    """function(rank, *arguments) in as many processes with a process group; rank 0's result.

    The group is NCCL's where there are as many GPUs, one each; else gloo's on the CPU (one worker: on a GPU if there is
    one). threads: of each; 0: its share of the cores. hosts: each worker's, of `two_hosts`. on_cpu: whatever GPUs there
    are. Raises RuntimeError when a worker fails (its traceback is printed).
    """
    backend = "gloo" if on_cpu or torch.cuda.device_count() < num_workers else "nccl"
    return _run(range(num_workers), num_workers, backend, threads, function, arguments, hosts)[0]


def run_alone(num_workers: int, function: Callable[..., Any], *arguments: Any, threads: int = 0) -> list[Any]:
    """function(rank, *arguments) for one rank after another, each alone on the machine; the results by rank.

    Each believes to be one of `num_workers`, on a wire on which nothing travels: collectives return at once and leave
    (all-reduce) or repeat (all-gather) what the rank itself gave. So its own compute can be timed where there are fewer
    devices than ranks. Raises as `run_workers`.
    """
    return [
        _run([rank], num_workers, "fake", threads, function, arguments)[rank] for rank in range(num_workers)
    ]


def device_of(rank: int) -> torch.device:
    """Where a rank that runs here computes: its own GPU where there are enough, the only one where it is alone."""
    if dist.get_backend() == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if dist.get_backend() == "fake" else rank)


def _run(
    ranks: Iterable[int], num_workers: int, backend: str, threads: int, function: Callable[..., Any],
    arguments: tuple[Any, ...], hosts: Sequence[Host] = (),
) -> dict[int, Any]:  # fmt: skip
    _context.set_forkserver_preload(_PRELOADED)
    threads = threads or thread_share(len(os.sched_getaffinity(0)), num_workers)
    address = f"{hosts[0].address if hosts else '127.0.0.1'}:{_free_port()}"
    shared = (num_workers, backend, address, threads, function, arguments)
    workers, pipes, results = [], dict[Connection, int](), dict[int, Any]()
    try:
        for rank in ranks:
            mine, theirs = _context.Pipe(duplex=False)
            workers.append(
                _context.Process(target=_worker, args=(rank, theirs, hosts[rank] if hosts else None, *shared))
            )
            workers[-1].start()
            theirs.close()  # so that the pipe ends with the worker
            pipes[mine] = rank
        while pipes:  # whichever speaks first: the others may wait for one that failed
            for pipe in wait(list(pipes)):
                assert isinstance(pipe, Connection), "of these"
                rank = pipes.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    raise RuntimeError(
                        f"worker {rank} failed, its traceback is above: nothing was measured"
                    ) from None
        for worker in workers:
            worker.join()
        return results
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    steps: int = 1,
    warm_up: int = 2,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds a step of each side, one figure a round; all sides run in every round, the order turning.

    Whatever drifts on the machine hits all of them. Every rank calls it; figures are this rank's. on_round: told how
    many rounds are done.
    """
    for step in sides.values():
        for _ in range(warm_up):
            step()
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds):
        for name in turned(list(sides), index):
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(steps):
                sides[name]()
            if torch.cuda.is_initialized():  # else it would be, on GPU 0, in the middle of a round
                torch.cuda.synchronize()
            samples[name].append((time.perf_counter() - begun) / steps)
        on_round(index + 1)
    return samples


def turned(names: Sequence[str], index: int) -> list[str]:
    """The order of round `index`: it begins with the next one every second round, and each is then run backwards.

    In 2 · len(names) rounds each name is twice in every place.
    """
    begin = index // 2 % len(names)
    order = [*names[begin:], *names[:begin]]
    return order[::-1] if index % 2 else order


def _worker(
    rank: int, pipe: Connection, host: Host | None, num_workers: int, backend: str, address: str, threads: int,
    function: Callable[..., Any], arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    if host:  # before any thread is started
        host.enter()
        os.environ["GLOO_SOCKET_IFNAME"] = host.device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    use_numerics("fp32")
    if backend == "gloo" or not torch.cuda.is_available():
        keep_freed_memory()  # as the runtime does, for all sides alike
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_workers)
    else:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=num_workers,
            timeout=timedelta(seconds=600),
        )
    value = function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    pipe.send(value)


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"
    wait([parent.sentinel])
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

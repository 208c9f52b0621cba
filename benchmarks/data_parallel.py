"""Our step with all blocks split by samples against torch DDP of the same network, two CPU workers.

Both run in the same processes, in turn, round by round: the machine's drift hits both. DDP is tuned
(`broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True`), BN groups, batches, optimizer, threads and
allocator are equal. Ours also reduces loss, hits and the running statistics, DDP's copies of those drift apart.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from anabranch.benchmarks.record import median_interval, write_record
from anabranch.blocks import build
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.deal import deal_step
from anabranch.runtime.loss import cross_entropy
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.step import MicroBatch, TrainStep
from anabranch.schedulers import Plan
from anabranch.schedulers.plan import SAMPLE

_NETWORK: dict[str, Any] = {"depth": 20, "num_branches": 4}
_WORKERS = 2


def run(
    *, rounds: int = 40, steps: int = 3, batch_size: int = 32, folder: Path | None = None
) -> dict[str, Any]:
    """Measures and writes the record: paired ratios ours ÷ DDP by round, their median with its 95 % interval."""
    spawn, port = multiprocessing.get_context("spawn"), _free_port()
    with spawn.Manager() as manager:
        samples = manager.dict()
        arguments = (port, rounds, steps, batch_size, samples)
        workers = [spawn.Process(target=_worker, args=(rank, *arguments)) for rank in range(_WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if "ours" not in samples:
            raise RuntimeError("a worker failed, its traceback is above: nothing was measured")
        ours, ddp = list(samples["ours"]), list(samples["ddp"])
    ratios = [a / b for a, b in zip(ours, ddp, strict=True)]
    median, low, high = median_interval(ratios)
    record = {
        "network": {"name": "multi_resnet", **_NETWORK},
        "batch_size": batch_size,
        "workers": _WORKERS,
        "threads_per_worker": 1,
        "steps_per_round": steps,
        "ours_s": ours,
        "ddp_s": ddp,
        "ours_median_s": statistics.median(ours),
        "ddp_median_s": statistics.median(ddp),
        "ratio_median": median,
        "ratio_interval_95": [low, high],
    }
    path = write_record("data_parallel", record, folder) if folder else write_record("data_parallel", record)
    return {**record, "path": str(path)}


def _worker(rank: int, port: int, rounds: int, steps: int, batch_size: int, samples: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=_WORKERS,
        timeout=timedelta(seconds=300),
    )
    torch.manual_seed(0)
    network = build("multi_resnet", **_NETWORK)
    x = torch.randn(batch_size, 3, 32, 32)
    target = torch.randint(10, (batch_size,))
    sides = {"ddp": _ddp_step(copy.deepcopy(network), x, target, rank), "ours": _our_step(network, x, target)}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():  # warm-up: allocator, kernels, DDP's static graph
        for _ in range(3):
            step()
    for index in range(rounds):
        for name in sorted(sides, reverse=bool(index % 2)):  # who is first alternates
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(steps):
                sides[name]()
            found[name].append((time.perf_counter() - begun) / steps)
    if rank == 0:
        samples.update(found)
    dist.barrier()
    dist.destroy_process_group()


def _ddp_step(
    network: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, rank: int
) -> Callable[[], None]:
    local = len(x) // _WORKERS
    x, target = x[rank * local : (rank + 1) * local], target[rank * local : (rank + 1) * local]
    ddp = DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
    )
    optimizer = make_optimizer(OptimizerConfig(), ddp.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(ddp(x), target)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def _our_step(network: torch.nn.Module, x: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    plan = Plan(_WORKERS, 1, {block.name: SAMPLE for block in spec_of(network).blocks}, "sample", "sample")
    parallel = parallelize(network, plan, make_mesh(_WORKERS, 1))
    train = TrainStep(parallel, make_optimizer(OptimizerConfig(), parallel.parameters()), cross_entropy())
    ids = torch.arange(len(x))
    (deal,) = deal_step(len(x), bn_batch_size=len(x) // _WORKERS, data=_WORKERS, branch=1)
    rows = parallel.rank_batch(deal, len(x))
    own = ids[rows.own_range.start : rows.own_range.stop]
    batch = MicroBatch(x[own], target[own], rows.with_samples(own, own, 0))

    def step() -> None:
        train.gradients([batch])
        train.apply(0.1)

    return step


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

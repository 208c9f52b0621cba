"""One training step of each kind, on the same samples: torch DDP's, and ours under a plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from anabranch.blocks.branch_sum import Execution
from anabranch.runtime import exchange
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.deal import deal_step
from anabranch.runtime.loss import cross_entropy
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.process_group import share_memory
from anabranch.runtime.step import MicroBatch, TrainStep, autocast
from anabranch.schedulers import Plan

Step = Callable[[], object]
TUNED: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True, "static_graph": True}
"""What torch DDP is tuned by wherever it is compared with."""
if "batched_grad_copy" in signature(DistributedDataParallel).parameters:  # newer than torch 2.11
    TUNED["batched_grad_copy"] = True


def images(batch_size: int, channels: int = 3, size: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    """The batch that every side trains on: noise (n, channels, size, size), labels (n,), the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, channels, size, size, generator=generator)
    return x, torch.randint(classes, (batch_size,), generator=generator)


def make_ddp(network: nn.Module, *, tuned: bool, shared: bool) -> DistributedDataParallel:
    """torch DDP of a network. tuned: `TUNED`, else torch's defaults. shared: see `_through_shared_memory`."""
    with warnings.catch_warnings():  # newer versions want another name for broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        ddp = DistributedDataParallel(network, **(TUNED if tuned else {}))
    if shared:
        _through_shared_memory(ddp)
    return ddp


def _through_shared_memory(ddp: DistributedDataParallel) -> None:
    """Let torch DDP reduce its gradients as ours are, where CPU ranks share a host; else nothing changes.

    A bucket's sum is begun when its gradients are there, and all are completed behind the last one, as ours: who waited
    for each in turn would wait for the slower rank's backward in the middle of its own.
    """
    group = dist.group.WORLD
    assert group is not None, "in a process group"
    share_memory(group)
    if not exchange.shares_memory(group):
        return

    begun: list[tuple[exchange.Work, Tensor, torch.futures.Future[Tensor]]] = []

    def hook(state: object, bucket: Any) -> torch.futures.Future[Tensor]:
        mean, done = bucket.buffer().div_(group.size()), torch.futures.Future[Tensor]()
        begun.append((exchange.all_reduce(mean, group), mean, done))
        if bucket.is_last():  # buckets come in one order, and DDP looks at their futures behind the last
            for work, sum_of_all, of_it in begun:
                work.wait()
                of_it.set_result(sum_of_all)
            begun.clear()
        return done

    hook.__annotations__.clear()  # torch compares them with its classes: here they are their names
    ddp.register_comm_hook(None, hook)


def ddp_step(
    network: nn.Module, x: Tensor, target: Tensor, *,
    tuned: bool = True, shared: bool = False, precision: str = "fp32",
) -> Step:  # fmt: skip
    """A step of torch DDP (see `make_ddp`) on this rank's share of the batch; Nesterov SGD, loss read every step, as
    ours.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    x, target = x.chunk(num_ranks)[rank], target.chunk(num_ranks)[rank]
    ddp = make_ddp(network, tuned=tuned, shared=shared)
    optimizer = make_optimizer(OptimizerConfig(), ddp.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, x.device):
            loss = F.cross_entropy(ddp(x), target)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


class OurStep:
    """A step of ours under a plan; BN groups as data parallelism has them: batch ÷ ranks. `network` is consumed."""

    def __init__(
        self,
        network: nn.Module,
        plan: Plan,
        x: Tensor,
        target: Tensor,
        *,
        precision: str = "fp32",
        execution: Execution = "fused",
        channels_last: bool = False,
        recompute: bool = False,
    ) -> None:
        mesh = make_mesh(plan.data, plan.branch)
        self.network = parallelize(network, plan, mesh, execution=execution)
        self.network.use_memory_format(channels_last=channels_last)
        self.network.recompute = recompute
        self.optimizer = make_optimizer(OptimizerConfig(), self.network.parameters())
        self._train = TrainStep(self.network, self.optimizer, cross_entropy(), precision=precision)
        (deal,) = deal_step(
            len(x),
            bn_batch_size=len(x) // mesh.world_size,
            data=plan.data,
            branch=plan.branch,
            samples=plan.samples,
        )
        rows = self.network.rank_batch(deal, len(x))
        taken = rows.range_of(self.network.input_rows)
        ids = torch.arange(len(x))
        own, group = (ids[r.start : r.stop] for r in (rows.own_range, rows.group_range))
        part = slice(taken.start, taken.stop)
        self._batch = MicroBatch(x[part], target[part], rows.with_samples(own, group, 0))

    def __call__(self) -> None:
        self._train.gradients([self._batch])
        self._train.apply(0.1)

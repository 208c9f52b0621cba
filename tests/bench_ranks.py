"""What tests of benchmarks run on every rank."""

from __future__ import annotations

import copy
import os
import warnings
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from anabranch.benchmarks import steps
from anabranch.benchmarks.steps import images
from anabranch.benchmarks.table5_row import measure_row
from anabranch.benchmarks.table5_sides import Row, compile_plain, network_of
from anabranch.runtime import audit, exchange
from anabranch.runtime.compiling import BACKEND


def row(rank: int, world_size: int, variants: list[str]) -> dict[str, dict[str, Any]]:
    """A row of Table V, two rounds, plans timed in as few as there may be; told: nothing."""
    with mock.patch.object(audit, "time_plans", partial(audit.time_plans, rounds=8)):
        return measure_row(rank, Row(8, 2, fold=18), variants, 2, 1, 1.0, 0.0, False)


def baselines(rank: int, world_size: int) -> tuple[list[list[torch.Tensor]], list[str]]:
    """Gradients of tuned DDP over several buckets, by gloo and by shared memory, and what the latter did in its last
    step: sums begun and waited for."""
    did: list[str] = []

    class Told:
        def __init__(self, work: exchange.Work) -> None:
            self.work = work

        def wait(self) -> None:
            did.append("waited")
            self.work.wait()

    def begin(x: torch.Tensor, group: dist.ProcessGroup) -> Told:
        did.append("begun")
        return Told(exchange.begin_sum(x, group))

    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    x, gradients = torch.randn(world_size, 3, 16)[rank], []
    with (
        mock.patch.dict(steps.TUNED, bucket_cap_mb=1e-3),
        mock.patch.object(exchange, "all_reduce", begin),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # so small buckets are not what DDP is made for
        for shared in (False, True):
            ddp = steps.make_ddp(copy.deepcopy(layers), tuned=True, shared=shared)
            for _ in range(3):  # of a static graph all gradients are one bucket first
                did.clear()
                ddp.zero_grad()
                ddp(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in ddp.parameters() if p.grad is not None])
    return gradients, did


def compiled_baseline(rank: int, world_size: int) -> tuple[list[float], list[str], list[bool]]:
    """A short baseline's losses as it is and compiled, what was said of it, and of each layer whether it is compiled.

    By a backend that gets every graph that inductor would get, then by one that fails.
    """
    row = Row(8, 2, fold=18, compiled=True)
    x, target = images(8)
    networks = [network_of(row, "b", blocks_per_stage=(1, 1, 1)) for _ in range(3)]
    told = []
    for backend, network in zip(("aot_eager", "no such backend"), networks[1:], strict=True):
        os.environ[BACKEND] = backend
        told.append(compile_plain(network, x, target, "fp32"))
    losses = [float(F.cross_entropy(network(x), target)) for network in networks]
    layers = [layer for network in networks for layer in network.children()]
    return losses, told, [layer._compiled_call_impl is not None for layer in layers]


def row_alone(rank: int, world_size: int, variants: list[str]) -> list[dict[str, dict[str, Any]]]:
    """A row of two ranks, one after the other in this process, on a wire on which nothing travels."""
    dist.destroy_process_group()
    found = []
    for virtual in (0, 1):
        dist.init_process_group("fake", store=FakeStore(), rank=virtual, world_size=2)
        torch.manual_seed(1)
        found.append(
            measure_row(virtual, Row(8, 2, fold=18, whole_groups=True), variants, 2, 1, 1.0, 0.0, False)
        )
        dist.destroy_process_group()
    return found

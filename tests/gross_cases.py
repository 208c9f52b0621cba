"""Small GroSS networks and their parity trials, importable by the ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from parity_cases import small_trial, verify_all
from torch import Tensor, nn

from anabranch.blocks import group_series
from anabranch.blocks.gross import gross_net, series_network, train_series_only
from anabranch.blocks.group_search import series_layers, set_group_sizes
from anabranch.blocks.group_series import GroupSeriesConv, GroupSize, check_group_sizes
from anabranch.blocks.random import fold
from anabranch.cluster import WorkerContext
from anabranch.runtime.assemble import local_cluster, make_data, make_plan
from anabranch.runtime.config import Config
from anabranch.runtime.gross import run_gross
from anabranch.runtime.gross_config import GrossConfig
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.verify import Report, Trial
from anabranch.schedulers import BranchPlacement, Plan

Counts = tuple[int, ...] | None  # branches by branch rank; None: split by sample
SMALL: dict[str, Any] = {
    "channels": (4, 8, 8), "width": 7, "num_classes": 5, "in_channels": 2, "image_size": 8
}  # fmt: skip


def seeded(make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    """A network in float64 whose parameters are all random, series' terms too: no gradient vanishes."""
    torch.manual_seed(seed)
    network = make().double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def small_series() -> nn.Module:
    """Layers of 4 and 8 channels, sizes 1, 2, 4 and 1, 2, 4, 8: 4 and 8 branches."""
    return series_network(gross_net(**SMALL))


@dataclass(frozen=True)
class Case:
    """What is run under which plan. sizes: None is the full network, not decomposed. frozen: all but the series."""

    sizes: Sequence[int] | GroupSize | None
    data: int
    blocks: tuple[Counts, ...]
    edges: str = "sample"
    frozen: bool = False
    temperature: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def network(self) -> nn.Module:
        network = seeded((lambda: gross_net(**SMALL)) if self.sizes is None else small_series)
        if self.sizes is not None:
            set_group_sizes(network, self.sizes)
            for layer in series_layers(network).values():
                layer.temperature = self.temperature
        if self.frozen:
            train_series_only(network)
        return network

    def plan(self) -> Plan:
        names = list(spec_of(gross_net(**SMALL)).by_name)
        blocks = {
            name: BranchPlacement("sample") if counts is None else BranchPlacement.from_counts(counts)
            for name, counts in zip(names, self.blocks, strict=True)
        }
        ranks = max((len(counts) for counts in self.blocks if counts), default=2)
        return Plan(self.data, ranks, blocks, self.edges, self.edges)  # type: ignore[arg-type]

    def trial(self) -> Trial:
        return small_trial(**{"seed": 5, **self.options})


def parity(rank: int, world_size: int, cases: Sequence[Case]) -> list[Report]:
    """Each case verified on these ranks."""
    return verify_all((case.network(), case.plan(), case.trial()) for case in cases)


def sabotaged(rank: int, world_size: int, case: Case, defects: Sequence[str]) -> list[Report]:
    """The case once with each planted defect."""
    rows, keyed = GroupSeriesConv._rows, fold

    def local_rows(self: GroupSeriesConv, held: Sequence[int]) -> list[int]:
        return rows(self, range(len(held)))  # as if the copy's first branch were the layer's

    def own_draw(*parts: int | str) -> int:
        return keyed(*parts, rank)

    planted: dict[str, Any] = {
        "rows counted from the copy's first": mock.patch.object(GroupSeriesConv, "_rows", local_rows),
        "each rank draws for itself": mock.patch.object(group_series, "fold", own_draw),
    }
    reports = []
    for defect in defects:
        with planted[defect]:
            reports += parity(rank, world_size, [case])
    return reports


def drawn_sizes(rank: int, world_size: int, num_steps: int) -> list[tuple[int, ...]]:
    """What this rank's layers draw, step by step."""
    layers = {"a": (1, 2, 4), "b": (1, 2, 4, 8)}
    return [
        tuple(group_series.sample_group_size(5, step, name, sizes, 0.0) for name, sizes in layers.items())
        for step in range(num_steps)
    ]


def dense_of(r: Tensor, channels: int) -> Tensor:
    """A grouped weight as a dense one, element by element."""
    check_group_sizes([r.shape[1]], channels)
    dense = torch.zeros(r.shape[0], channels, *r.shape[2:], dtype=r.dtype)
    for row in range(r.shape[0]):
        first = row // r.shape[1] * r.shape[1]
        dense[row, first : first + r.shape[1]] = r[row]
    return dense


QUICK = GrossConfig(
    reconstruct_epochs=1,
    reconstruct_lr=0.005,
    reconstruct_milestones=(),
    tune_epochs=2,
    tune_lr=0.01,
    tune_milestones=(1,),
    fixed_reconstruct_lr=0.005,
    fixed_tune_epochs=1,
    fixed_tune_lr=0.01,
    fixed_tune_milestones=(),
    baselines=(2,),
    winners=2,
    temperature=1.0,
)


def quick_config(*layers: dict[str, Any]) -> Config:
    """On the digits, in float64, 6 steps an epoch."""
    defaults = {
        "data": {"name": "digits"},
        "optimizer": {"name": "adamw", "lr": 0.02, "weight_decay": 0.0},
        "lr_schedule": {"name": "constant", "warmup_epochs": 0.0},
        "train": {"epochs": 8, "batch_size": 200, "eval_every_epochs": 0, "precision": "fp64"},
        "checkpoint": {"every_epochs": 1.0},
        "mesh": {
            "execution": "fused",
            "memory_format": "contiguous",
        },  # measuring takes longer than the steps
    }
    return Config.from_dict(defaults, *layers)


class StoppedContext(WorkerContext):
    """A rank that is asked to stop once it has said so many things, or one that begins so."""

    stop_at: int | str = -1
    phases: list[str]

    def publish(self, **status: Any) -> None:
        super().publish(**status)
        self.phases.append(str(self.status().get("phase")))
        if len(self.phases) == self.stop_at or (
            isinstance(self.stop_at, str) and self.phases[-1].startswith(self.stop_at)
        ):
            self.request_stop("test")


def search(
    rank: int,
    world_size: int,
    folder: str,
    gross: GrossConfig = QUICK,
    stop_at: int | str = -1,
    *layers: dict[str, Any],
) -> dict[str, Any]:
    """`run_gross` on these ranks; the last rank is asked to stop, see `StoppedContext`."""
    config = replace(quick_config(*layers), gross=gross)
    data = make_data(config)
    network = searched()
    cluster = local_cluster(world_size, "localhost")
    plan = make_plan(config, spec_of(network), cluster)
    context = StoppedContext(rank, world_size, rank, "localhost", "cpu", 1, "", "gloo")
    context.phases = []
    if rank == world_size - 1:
        context.stop_at = stop_at
    result = run_gross(network, data, config, plan=plan, context=context, run_dir=Path(folder))
    return {**result, "status": context.status(), "phases": context.phases}


def killed(rank: int, world_size: int, folder: str, stop_at: str) -> dict[str, Any]:
    """`search`, whose last rank is killed where it would be asked to stop."""

    def kill(self: StoppedContext, reason: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(StoppedContext, "request_stop", kill):
        return search(rank, world_size, folder, QUICK, stop_at)


def searched() -> nn.Module:
    """The network of `search`, before it is trained."""
    torch.manual_seed(0)
    return gross_net((4, 8, 16), width=32, in_channels=1, image_size=8).double()

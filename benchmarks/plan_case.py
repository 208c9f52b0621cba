"""A network, a batch and the hosts it runs on: one process tree a case, and its row in the record at once."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from anabranch.benchmarks.record import write_record
from anabranch.benchmarks.steps import images
from anabranch.benchmarks.two_hosts import two_hosts, why_not
from anabranch.benchmarks.workers import run_workers
from anabranch.blocks import build
from anabranch.blocks.convert import prepare
from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.loss import cross_entropy
from anabranch.runtime.plan_step import StepSetting
from anabranch.schedulers import BranchPlacement, Cluster, Device, ModelSpec, Plan
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.plan import SAMPLE, neighbour_split

_STEADY = 1.25  # times as long as at its fastest that a plan may take at another time
_STOLEN = 0.1  # of the processors' time
_AGAIN = 2  # times that a disturbed case is measured again


@dataclass(frozen=True)
class Case:
    """A network and a batch. size: pixels; channels: of the images; groups: BN groups of a batch, 0: one a worker.

    mbit_per_s: of the wire between two hosts (namespaces; root) that have half of the workers each; 0: one host.
    """

    name: str
    options: Mapping[str, Any]
    batch_size: int
    size: int = 32
    channels: int = 3
    groups: int = 0
    mbit_per_s: float = 0.0

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        network = prepare(build(self.name, in_channels=self.channels, **self.options))
        network.input_shape = (self.channels, self.size, self.size)  # type: ignore[assignment]
        return network

    def setting(self) -> StepSetting:
        groups = self.groups or dist.get_world_size()
        train = {"batch_size": self.batch_size, "bn_batch_size": self.batch_size // groups}
        return StepSetting(
            *images(self.batch_size, self.channels, self.size),
            Config.from_dict({"train": train}),
            cross_entropy(),
        )

    def cluster(self) -> tuple[Cluster, list[str]]:
        """The workers, and their names by rank."""
        world = dist.get_world_size()
        half = world // 2 if self.mbit_per_s else world
        devices = tuple(Device(f"host-{'ab'[rank // half]}", rank % half, "cpu") for rank in range(world))
        return Cluster(devices), [str(device) for device in devices]

    def run(self, workers: int, measured: Callable[..., Any], rounds: int) -> Any:
        """measured(rank, case, rounds) on the workers; rank 0's result. Raises as `check`, `run_workers`."""
        self.check(workers)
        with ExitStack() as stack:
            hosts = stack.enter_context(two_hosts(self.mbit_per_s)) if self.mbit_per_s else ()
            places = [host for host in hosts for _ in range(workers // 2)]
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="anabranch-costs-"))
            return run_workers(
                workers, _with_own_cache, cache, measured, self, rounds, hosts=places, on_cpu=True
            )

    def check(self, workers: int) -> None:
        """Raises ConfigError where the hosts cannot be made, or the workers not halved."""
        if self.mbit_per_s and workers % 2:
            raise ConfigError(f"{workers} workers are no two equal hosts ({self}): give an even number")
        if self.mbit_per_s and (reason := why_not()):
            raise ConfigError(f"{self}: {reason}")

    def __str__(self) -> str:
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        groups = f", {self.groups} BN groups" if self.groups else ""
        wire = f", two hosts at {self.mbit_per_s:g} Mbit/s" if self.mbit_per_s else ""
        shape = f"{self.channels}x{self.size}x{self.size}"
        return f"{self.name} ({options}), batch {self.batch_size} of {shape}{groups}{wire}"


def multi(
    depth: int,
    k: int,
    batch: int,
    size: int = 16,
    *,
    mbit_per_s: float = 0.0,
    groups: int = 0,
    **options: Any,
) -> Case:
    """A Multi-ResNet of k branches a block."""
    options = {"depth": depth, "num_branches": k, **options}
    return Case("multi_resnet", options, batch, size, groups=groups, mbit_per_s=mbit_per_s)


def measure_cases(
    name: str, cases: Sequence[Case], workers: int, rounds: int, folder: Path, resume: bool,
    measured: Callable[[int, Case, int], Mapping[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Every case's row, in folder/NAME.json as soon as it is there; resume: rows that the record has are not redone.

    A case that was disturbed is measured again; what it gave is kept under `disturbed`.
    """
    for case in cases:
        case.check(workers)
    path, rows = folder / f"{name}.json", []
    before = json.loads(path.read_text()) if resume and path.exists() else {"cases": []}
    known = {row["case"]: row for row in before["cases"] if before.get("rounds") == rounds}
    for case in cases:
        row: dict[str, Any] | None = known.get(str(case))
        disturbed: list[dict[str, Any]] = row.pop("disturbed", []) if row else []
        while row is None or (not _is_steady(row) and len(disturbed) < _AGAIN):
            disturbed += [row] if row else []
            begun = _ticks()
            row = {"case": str(case), **case.run(workers, measured, rounds)}
            spent, stolen = (now - then for now, then in zip(_ticks(), begun, strict=True))
            row["stolen_share"] = stolen / max(spent, 1)
        rows.append(row | {"disturbed": disturbed} if disturbed else row)
        write_record(name, {"workers": workers, "rounds": rounds, "cases": rows}, folder)
    return rows


def _is_steady(row: Mapping[str, Any]) -> bool:
    """Whether no other program or virtual machine had the cores.

    Then one and the same plan takes about as long each time that it is timed, and little processor time is stolen.
    """
    turns: list[float] = row.get("reference", {}).get("turns_s", [1.0])
    return max(turns) <= _STEADY * min(turns) and row.get("stolen_share", 0.0) <= _STOLEN


def _ticks() -> tuple[int, int]:
    """Of all processors since this machine's start: those in all, and those that its host gave to other machines."""
    path = Path("/proc/stat")  # Linux alone says it
    if not path.exists():
        return 0, 0
    found = [int(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(found), found[7]


def _with_own_cache(rank: int, cache: str, measured: Callable[..., Any], *arguments: Any) -> Any:
    """Costs that are measured here stay here: a run's on the same hosts know nothing of the wire between ours."""
    os.environ["XDG_CACHE_HOME"] = cache
    return measured(rank, *arguments)


def batch_of(setting: StepSetting) -> Batch:
    """What the simulator is told of a step's samples."""
    return Batch(len(setting.x), setting.config.train.bn_batch_size)


def data_plan(spec: ModelSpec, devices: Sequence[str]) -> Plan:
    """Plain data parallelism."""
    return plan_on(devices, 1, {block.name: SAMPLE for block in spec.blocks})


def plan_on(devices: Sequence[str], branch: int, placed: dict[str, BranchPlacement]) -> Plan:
    """Blocks as placed, stem and head with their neighbours, on the devices in order, `branch` to a group."""
    data, blocks = len(devices) // branch, list(placed.values())
    rows = tuple(tuple(devices[d * branch : (d + 1) * branch]) for d in range(data))
    return Plan(data, branch, placed, neighbour_split(blocks[0]), neighbour_split(blocks[-1]), rows)

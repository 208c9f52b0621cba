"""What tests of small talk run on every rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from anabranch.cluster import WorkerContext
from anabranch.runtime import exchange, worker
from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.config import Config
from anabranch.runtime.job import Job
from anabranch.runtime.mesh import Mesh, leave_meshes, make_mesh
from anabranch.runtime.process_group import gather_json, process_group
from anabranch.runtime.trainer import Trainer

LENGTHS = (0, 70, 76, 77, 78, 79, 80, 81, 400, 100_000)  # six bytes a letter, in a message of 500 or more


def talk(rank: int, world_size: int) -> list[list[Any]]:
    return [gather_json({"rank": rank, "text": "é" * length * (rank > 0)}, "cpu") for length in LENGTHS]


def agree(rank: int, world_size: int) -> list[Any]:
    """What came of work that goes well, and of one that fails on the last rank; groups go on afterwards."""
    mesh, device = make_mesh(2, 1), torch.device("cpu")
    told: list[Any] = [on_all_ranks(mesh, device, lambda: rank, "count")]

    def fails() -> int:
        if rank:
            raise ValueError("no such file " + "x" * 600)
        return rank

    text = ""
    try:
        on_all_ranks(mesh, device, fails, "count files")
    except (ValueError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    told.append(on_all_ranks(mesh, device, lambda: {"rank": rank}, "go on"))
    return [*told, text]


def timeouts(rank: int, world_size: int, store: str) -> list[list[float]]:
    """Seconds that each group of two meshes waits for a rank, in torch and through shared memory."""
    dist.destroy_process_group()
    context = WorkerContext(rank, world_size, rank, "here", "cpu", 1, f"file://{store}", "gloo")
    told = []
    with process_group(context, 33.0):
        for mesh in (make_mesh(2, 2), make_mesh(4, 1)):
            for group in (mesh.world_group, mesh.data_group, mesh.branch_group):
                told.append([group._get_backend(torch.device("cpu")).options._timeout.total_seconds()])
                if group in exchange._shared:
                    told[-1].append(exchange._shared[group].timeout_s)
    return told


def leaves(rank: int, world_size: int) -> list[Any]:
    """Groups of three meshes: how many torch and shared memory have before all but one are left, and afterwards."""

    def sums(mesh: Mesh) -> list[int]:
        groups, found = (mesh.world_group, mesh.data_group, mesh.branch_group), []
        for group in groups:
            x = torch.ones(1)
            exchange.all_reduce(x, group).wait()
            found.append(int(x))
        return found

    def num_groups() -> list[int]:
        return [len(dist.distributed_c10d._world.pg_map), len(exchange._shared)]

    mesh = make_mesh(2, 2)
    told: list[Any] = [sums(make_mesh(4, 1)), sums(mesh), sums(make_mesh(1, 4)), num_groups()]
    leave_meshes(but=mesh)
    told += [make_mesh(2, 2) is mesh, num_groups(), sums(mesh)]
    return [*told, sums(make_mesh(4, 1))]


def trains(rank: int, world_size: int, folder: str) -> int:
    """Groups that stand when the training begins, after the plan was chosen among plans of two meshes."""
    config = Config.from_dict(
        {
            "model": {"name": "multi_resnet", "options": {"depth": 8, "num_branches": 2}},
            "data": {"name": "digits"},
            "mesh": {"plan": "auto", "num_workers": world_size},
            "launch": {"run_dir": f"{folder}/run"},
        }
    )

    def chosen(*arguments: Any) -> dict[str, str]:
        for branch in (1, 2):
            make_mesh(world_size // branch, branch)
        return {"plan": '[mesh]\ndata = 1\nbranch = 2\n[[blocks]]\nmatch = "*"\nsplit = "sample"\n'}

    def fit(self: Trainer) -> dict[str, Any]:
        return {"groups": len(dist.distributed_c10d._world.pg_map)}

    context = WorkerContext(rank, world_size, rank, "here", "cpu", 1, "", "gloo")
    with mock.patch.object(worker, "_automatic", chosen), mock.patch.object(Trainer, "fit", fit):
        groups: int = worker.train_worker(Job("train", config, None, folder=folder), context)["groups"]
    return groups

"""What tests of small talk run on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from anabranch.cluster import WorkerContext
from anabranch.runtime import exchange
from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.process_group import gather_json, process_group

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

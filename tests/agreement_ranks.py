"""What tests of small talk run on every rank."""

from __future__ import annotations

from typing import Any

import torch

from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.process_group import gather_json

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

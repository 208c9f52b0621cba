"""Work that every rank does, or none: each tells the others how it went, as JSON."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import torch

from anabranch.runtime.exchange import all_gather
from anabranch.runtime.mesh import Mesh


def on_all_ranks(mesh: Mesh, device: torch.device, work: Callable[[], Any], what: str) -> list[Any]:
    """What `work` returned on each rank (plain JSON), by rank. Collective.

    device: where the ranks' messages travel. what: names the work in errors. Raises on all ranks if it raised on one,
    so that none waits for that one: there the error itself, elsewhere a RuntimeError ("cannot write step-000120: rank 1
    on host-b: OSError: no space left").
    """
    failure: Exception | None = None
    try:
        told = {"result": work()}
    except Exception as error:  # whatever it is, the others must hear of it
        failure, told = (
            error,
            {"error": f"rank {mesh.rank} on {socket.gethostname()}: {type(error).__name__}: {error}"},
        )
    mine = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8).to(device)
    sizes = all_gather(
        torch.tensor([len(mine)], device=device), [1] * mesh.world_size, mesh.world_group
    ).tolist()
    rows = all_gather(mine, sizes, mesh.world_group).cpu().split(sizes)
    everything = [json.loads(row.numpy().tobytes()) for row in rows]
    errors = [told["error"] for told in everything if "error" in told]
    if failure is not None:
        raise failure
    if errors:
        raise RuntimeError(f"cannot {what}: {'; '.join(errors)}")
    return [told["result"] for told in everything]

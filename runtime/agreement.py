"""Work that every rank does, or none: each tells the others how it went, as JSON."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch

from anabranch.runtime.mesh import Mesh
from anabranch.runtime.process_group import gather_json


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
    everything = gather_json(told, device, mesh.world_group)
    errors = [told["error"] for told in everything if "error" in told]
    if failure is not None:
        raise failure
    if errors:
        raise RuntimeError(f"cannot {what}: {'; '.join(errors)}")
    return [told["result"] for told in everything]

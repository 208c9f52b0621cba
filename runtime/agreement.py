"""Work that every rank does, or none: each tells the others how it went, as JSON."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch

from anabranch.cluster.errors import NoPeerLost
from anabranch.cluster.failures import failed_in_collective
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.process_group import gather_json


class ElsewhereError(NoPeerLost, RuntimeError):
    """Another rank could not do its part, and told so."""


def on_all_ranks(mesh: Mesh, device: torch.device, work: Callable[[], Any], what: str) -> list[Any]:
    """What `work` returned on each rank (plain JSON), by rank. Collective.

    device: where the ranks' messages travel. what: names the work in errors. Raises on all ranks if it raised on one,
    so that none waits for that one: there the error itself, elsewhere an ElsewhereError ("cannot write step-000120:
    rank 1 on host-b: OSError: no space left"), or where that rank had lost others a ConnectionError.
    """
    failure: Exception | None = None
    try:
        told = {"result": work()}
    except Exception as error:  # whatever it is, the others must hear of it
        text = f"rank {mesh.rank} on {socket.gethostname()}: {type(error).__name__}: {error}"
        failure, told = error, {"error": text, "lost": failed_in_collective(error)}
    everything = gather_json(told, device, mesh.world_group)
    failed = [told for told in everything if "error" in told]
    if failure is not None:
        raise failure
    if failed:
        text = f"cannot {what}: {'; '.join(told['error'] for told in failed)}"
        raise (
            ConnectionError(f"process group: {text}")
            if any(t["lost"] for t in failed)
            else ElsewhereError(text)
        )
    return [told["result"] for told in everything]

"""A newcomer gets parameters, buffers and the optimizer's state from a rank that holds the same branches.

As flat bytes over the data group; what lies where is told as JSON, so nothing received can run code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.process_group import gather_json

_CHUNK_BYTES = 64 * 2**20


@torch.no_grad()
def fill(network: ParallelNetwork, optimizer: torch.optim.Optimizer, source: int, is_new: bool) -> None:
    """Makes this rank's part, where it `is_new`, that of rank `source`, bit by bit. Collective over the data group."""
    mesh = network.mesh
    device = next(network.parameters()).device
    layouts = gather_json(_layout(optimizer), device, mesh.data_group)
    if is_new:
        _make_state(optimizer, layouts[source // mesh.branch])
    for tensors in _chunks([*network.parameters(), *network.buffers(), *_state_tensors(optimizer)]):
        flat = torch.cat([_bytes(tensor).to(device) for tensor in tensors])
        dist.broadcast(flat, source, group=mesh.data_group)
        if is_new:
            for tensor, part in zip(tensors, flat.split([t.nbytes for t in tensors]), strict=True):
                tensor.copy_(
                    part.clone().view(tensor.dtype).view(tensor.shape)
                )  # a view must begin at its alignment


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _layout(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """For each parameter its state: slot → [dtype, shape, whether it lies with the parameter], or a plain number."""

    def described(value: Any, device: torch.device) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype).removeprefix("torch."), list(value.shape), value.device == device]
        return value

    return [
        {slot: described(value, p.device) for slot, value in optimizer.state.get(p, {}).items()}
        for p in _parameters(optimizer)
    ]


def _make_state(optimizer: torch.optim.Optimizer, layout: list[dict[str, Any]]) -> None:
    for parameter, slots in zip(_parameters(optimizer), layout, strict=True):
        if slots:
            optimizer.state[parameter] = {
                slot: torch.empty(
                    value[1], dtype=getattr(torch, value[0]), device=parameter.device if value[2] else "cpu"
                )
                if isinstance(value, list)
                else value
                for slot, value in slots.items()
            }


def _state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = (optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer))
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    chunk: list[Tensor] = []
    for tensor in tensors:
        if chunk and sum(t.nbytes for t in chunk) + tensor.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(tensor)
    if chunk:
        yield chunk

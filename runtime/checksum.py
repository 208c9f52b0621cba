"""Whether all copies of a tensor are still the same bits: the proof, at checkpoints, that replicas do not drift."""

from __future__ import annotations

import zlib

import torch
import torch.distributed as dist
from torch import Tensor

from anabranch.runtime.exchange import all_gather
from anabranch.runtime.parallel_network import ParallelNetwork

_BITS = {1: torch.uint8, 2: torch.int16}  # by bytes an element; wider ones in pieces of four bytes
_STRIDE = 0x9E3779B1  # odd: no two positions look alike


class ReplicaError(RuntimeError):
    """Ranks hold different values of a tensor that they must hold alike."""


@torch.no_grad()
def check_replicas(network: ParallelNetwork) -> None:
    """Compares every parameter and buffer that several ranks hold, bit by bit through a checksum.

    Replicated tensors are held by all ranks, a branch's by the ranks of one data group. Collective: all ranks call it,
    and if any copy differs, all raise ReplicaError; who holds such a copy names the tensors and the ranks.
    """
    mesh = network.mesh
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    found: list[str] = []
    for over, group, ranks in (
        ("world", mesh.world_group, range(mesh.world_size)),
        ("data", mesh.data_group, range(mesh.branch_rank, mesh.world_size, mesh.branch)),
    ):
        names = [name for name in tensors if network.roles[name].over == over]
        if names and len(ranks) > 1:
            mine = torch.stack([checksum(tensors[name]) for name in names])
            sums = all_gather(mine[None], [1] * len(ranks), group).T.tolist()
            found += [
                _sides(name, ranks, row) for name, row in zip(names, sums, strict=True) if len(set(row)) > 1
            ]
    differs = torch.zeros(mesh.world_size, device=next(iter(tensors.values())).device)
    differs[mesh.rank] = len(found)
    dist.all_reduce(differs, group=mesh.world_group)
    if bool(differs.any()):
        where = f"on ranks {differs.nonzero().flatten().tolist()}, whose messages name them"
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ReplicaError(
            f"copies that must be equal differ: {'; '.join(found[:3]) + more if found else where}. "
            "Go on from the last checkpoint; if it happens again, look at the memory of the ranks named"
        )


def checksum(tensor: Tensor) -> Tensor:
    """Of a tensor's bits in their order, a scalar on its device: on the CPU CRC-32, which takes less than a copy."""
    flat = tensor.detach().reshape(-1)
    if flat.device.type == "cpu":
        return torch.tensor(zlib.crc32(flat.view(torch.uint8).numpy().data))
    bits = flat.view(_BITS.get(flat.element_size(), torch.int32)).to(torch.int64)
    mixed = bits + torch.arange(bits.numel(), device=bits.device) * _STRIDE
    return (mixed * mixed).sum()  # squared: differences of several elements cannot cancel by their sum


def _sides(name: str, ranks: range, sums: list[int]) -> str:
    """ "fc.weight (ranks [0, 1, 2] against [3])", the most numerous first."""
    sides: dict[int, list[int]] = {}
    for rank, value in zip(ranks, sums, strict=True):
        sides.setdefault(value, []).append(rank)
    ordered = sorted(sides.values(), key=len, reverse=True)
    return f"{name} (ranks {' against '.join(map(str, ordered))})"

"""Whether all copies of a tensor are still the same bits: the proof, at checkpoints, that replicas do not drift."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor


class ReplicaError(RuntimeError):
    """Ranks hold different values of a tensor that they must hold alike."""


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bits in their order: it takes less than a copy."""
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def check_replicas(sums: Mapping[int, Mapping[str, int]]) -> None:
    """Compares the ranks' checksums by key. Raises ReplicaError naming the keys that differ, and the ranks."""
    holders: dict[str, dict[int, list[int]]] = {}
    for rank, of_rank in sorted(sums.items()):
        for key, value in of_rank.items():
            holders.setdefault(key, {}).setdefault(value, []).append(rank)
    found = [_sides(key, sides) for key, sides in holders.items() if len(sides) > 1]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ReplicaError(
            f"copies that must be equal differ: {'; '.join(found[:3])}{more}. "
            "Go on from the last checkpoint; if it happens again, look at the memory of the ranks named"
        )


def _sides(key: str, sides: Mapping[int, list[int]]) -> str:
    """ "fc.weight (ranks [0, 1, 2] against [3])", the most numerous first."""
    ordered = sorted(sides.values(), key=len, reverse=True)
    return f"{key.removeprefix('network/')} (ranks {' against '.join(map(str, ordered))})"

"""Counter-based random numbers: what is drawn depends on the key and the sample alone.

Dropout masks, augmentation and random choices are functions of (seed, epoch or step, layer, sample), never of
how many numbers were drawn before. So every mesh, every plan and every resume sees the same stream.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def fold(*parts: int | str) -> int:
    """A stable 63-bit key of its parts, the same in every process and on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer (two multiply-xorshift rounds) on int64 tensors that hold 32-bit values."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def sample_keys(key: int, sample_ids: Tensor) -> Tensor:
    """One 32-bit key a sample: (n,) int64 from the stream's key and (n,) int64 sample indices."""
    low, high = key & _MASK32, key >> 32
    return _mix(_mix((sample_ids & _MASK32) ^ low) + (sample_ids >> 32) + high & _MASK32)


def uniform(keys: Tensor, num: int) -> Tensor:
    """(n, num) float32 in [0, 1), 24 random bits each: row i is a function of keys[i] alone."""
    counter = torch.arange(num, device=keys.device, dtype=torch.int64)
    bits = _mix(_mix(counter + 0x9E3779B9 & _MASK32)[None, :] + keys[:, None] & _MASK32)
    return (bits >> 8).to(torch.float32) * 2.0**-24

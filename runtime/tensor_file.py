"""A safetensors file, written in pieces between which others may have the machine; the library reads it.

    8 bytes: the header's length, little-endian | header: JSON {key: {dtype, shape, data_offsets}}, padded | tensors

The library writes 400 MB in one go, beside which a training step that fills the memory's bandwidth takes 12 to 25 ms
longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_PIECE = 1 << 20  # bytes: what is hashed is still in the processor's cache when it is written
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def save_file(
    tensors: Mapping[str, Tensor], path: Path, rest: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    """Writes contiguous tensors on the CPU; the file's bytes and sha256.

    rest: called after every piece. Raises OSError, and ValueError for a tensor of a kind that is not kept.
    """
    if problem := not_kept(tensors):
        raise ValueError(problem)
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # all aligned
    header, end = {}, 0
    for key, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    contents = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes_of(one) for _, one in ordered)]
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for content in contents:
            for start in range(0, len(content), _PIECE):
                piece = content[start : start + _PIECE]
                digest.update(piece)
                file.write(piece)
                rest()
        return file.tell(), digest.hexdigest()


def not_kept(tensors: Mapping[str, Tensor]) -> str:
    """Which of them a file cannot hold, and why; "" where it can hold all."""
    other = next((key for key, tensor in tensors.items() if tensor.dtype not in _DTYPES), None)
    return (
        f"{other} is of {tensors[other].dtype}: a safetensors file has no such numbers here" if other else ""
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data

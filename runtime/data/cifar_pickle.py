"""The files of CIFAR's python version, which are pickles, read without running anything that they name.

A pickle can name any function and have it called. These files (Python 2, protocol 2) need three names, and each
stands for a record here that only keeps what it is given: not even numpy is called.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from anabranch.runtime.errors import DataError


class _Dtype:
    """In place of `numpy.dtype`: keeps its code, "u1" for bytes."""

    def __init__(self, code: str, align: int, copy: int) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


class _Array:
    """In place of `numpy.ndarray`: keeps the shape, the dtype, the order of dims and the bytes (a str in Python 2)."""

    shape: tuple[int, ...]
    dtype: _Dtype
    fortran: bool
    raw: str

    def __init__(self, *of_reconstruct: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, str]) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state


_STANDINS: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


# The unpickler in Python: the one in C makes a table as long as the largest index in the file, up to 64 GB.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _STANDINS:
            raise DataError(f"it names {module}.{name}, which no CIFAR file does: it was not loaded")
        return _STANDINS[module, name]


def read_pickle(raw: bytes, label_key: str, where: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of one file; `DataError` when it is not what CIFAR's are."""
    try:
        content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        array, labels = content["data"], content[label_key]
        if array.dtype.code != "u1":
            raise DataError(f"its data are of numpy type {array.dtype.code}, not u1")
        if not isinstance(labels, list) or any(type(label) is not int for label in labels):
            raise DataError(f"its {label_key} are no list of whole numbers")
        pixels = torch.frombuffer(bytearray(array.raw, "latin1"), dtype=torch.uint8)
        rows = pixels.view(array.shape[::-1]).T if array.fortran else pixels.view(array.shape)
        return rows.reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64)
    except Exception as error:  # a torn pickle raises almost anything
        raise DataError(f"{where} is not a CIFAR file: {type(error).__name__}: {error}") from error

"""Files that are whole or absent, also after a kill or a power cut: written aside, fsynced, then renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from anabranch.runtime.tensor_file import save_file


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, written: Path) -> None:
    """Gives a finished file its name `path`, in the same folder; whatever was there before is replaced at once."""
    sync(written)
    written.replace(path)
    sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a small file."""
    aside = aside_of(path)
    aside.write_bytes(content)
    replace_file(path, aside)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file; tensors may be views of one another, on any device. Raises OSError."""
    write_copies(path, {key: own_copy(tensor) for key, tensor in tensors.items()})


def write_copies(
    path: Path, tensors: Mapping[str, Tensor], rest: Callable[[], object] = lambda: None
) -> tuple[int, str]:
    """The same of contiguous tensors on the CPU; the file's bytes and sha256. rest: called after every piece."""
    aside = aside_of(path)
    try:
        written = save_file(tensors, aside, rest)
    except OSError:  # a full disk is no fuller for it
        aside.unlink(missing_ok=True)
        raise
    replace_file(path, aside)
    return written


def sha256(path: Path) -> str:
    """Of a file's contents, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def aside_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f"{path.name}.tmp")


def own_copy(tensor: Tensor) -> Tensor:
    """The values in contiguous memory of their own on the CPU, as a safetensors file wants them."""
    return tensor.detach().contiguous().to("cpu", copy=True)

"""Tensors on their way to a disk: the format is the library's, and the training keeps the machine."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from anabranch.runtime import pace
from anabranch.runtime.durable import write_copies
from anabranch.runtime.tensor_file import _DTYPES, save_file

TENSORS = {
    **{f'"{dtype}" é': torch.arange(6).reshape(2, 3).to(dtype) for dtype in _DTYPES},
    "number": torch.tensor(7.5),
    "empty": torch.zeros(0, 4),
    "large": torch.randn(700, 1000, generator=torch.Generator().manual_seed(0)),
    "odd": torch.arange(3, dtype=torch.uint8),
}


def test_the_library_writes_the_same_and_reads_it(tmp_path: Path) -> None:
    pieces = []
    size, sha256 = save_file(TENSORS, tmp_path / "ours", lambda: pieces.append(1))
    content = (tmp_path / "ours").read_bytes()
    assert (size, sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert len(pieces) == len(TENSORS) + 2  # the header; nothing of "empty"; 2.8 MB in three
    safetensors.torch.save_file(TENSORS, tmp_path / "theirs")
    for found in (safetensors.torch.load_file(tmp_path / name) for name in ("ours", "theirs")):
        assert found.keys() == TENSORS.keys()
        for key, tensor in TENSORS.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found[key], tensor)


def test_numbers_that_the_format_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wave is of torch\.complex64"):
        save_file({"wave": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_copies(tmp_path / "file", TENSORS)
    assert not list(tmp_path.iterdir())


def test_a_thread_rests_three_times_what_it_computed_until_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked = [100.0], list[float | None]()

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            asked.append(timeout)
            return super().wait(timeout)

    monkeypatch.setattr(pace, "time", SimpleNamespace(thread_time=lambda: now[0]))
    own = pace.Pace()
    monkeypatch.setattr(own, "_hurried", Event())

    def work() -> None:
        own.start()
        for computed_s in (0.001, 0.002, 1e6, 1e6):
            now[0] += computed_s
            own.rest()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while len(asked) < 3:
        time.sleep(0.001)
    assert thread.is_alive()
    own.hurry()
    thread.join(60)
    assert not thread.is_alive()
    assert asked == pytest.approx([0.003, 0.006, 3e6, 3e6])

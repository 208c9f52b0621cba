"""The most memory that something takes on top of what was there: of the process, or of the GPU's allocator."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """A context; afterwards num_bytes: the peak inside it above the start, None where unknown (no Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
            return self
        self._base = -1
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what others have freed is not this one's to reuse for nothing
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self._base = _status_bytes("VmRSS")
        except (OSError, AttributeError):
            pass
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self.device) - self._base
        elif self._base >= 0:
            self.num_bytes = max(_status_bytes("VmHWM") - self._base, 0)


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024

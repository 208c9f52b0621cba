"""Known kinds of devices, from their data sheets: for plans where nothing was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from anabranch.schedulers.cluster import Link
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.wording import did_you_mean, quote


@dataclass(frozen=True)
class DeviceKind:
    """Data-sheet peaks. local_bytes_per_s: to a neighbour of the same host, one way."""

    name: str
    fp32_flops: float
    half_flops: float
    bytes_per_s: float
    memory_bytes: int
    local_bytes_per_s: float
    launch_s: float = 6e-6


SUSTAINED_FLOPS, SUSTAINED_BYTES = 0.4, 0.7  # parts of the peaks that training reaches, a usual figure
_GB = 10**9
KINDS = {
    kind.name: kind
    for kind in (
        DeviceKind("H200", 67e12, 989e12, 4.8e12, 141 * _GB, 450e9),
        DeviceKind("H100", 67e12, 989e12, 3.35e12, 80 * _GB, 450e9),
        DeviceKind("A100", 19.5e12, 312e12, 2.04e12, 80 * _GB, 300e9),
        DeviceKind("L4", 30.3e12, 121e12, 0.3e12, 24 * _GB, 16e9),
        DeviceKind("RTX 4090", 82.6e12, 165e12, 1.01e12, 24 * _GB, 25e9),
        DeviceKind("V100", 15.7e12, 125e12, 0.9e12, 32 * _GB, 150e9),
        DeviceKind("T4", 8.1e12, 65e12, 0.32e12, 16 * _GB, 12e9),
        DeviceKind("P100", 10.6e12, 21.2e12, 0.73e12, 16 * _GB, 80e9),
        DeviceKind("K80", 4.1e12, 4.1e12, 0.24e12, 12 * _GB, 10e9),  # one of the board's two
        DeviceKind("cpu", 1e11, 1e11, 2e10, 16 * _GB, 5e9, 2e-5),
    )
}


def device_kind(name: str) -> DeviceKind:
    """A kind by its name or one that has it as whole words ("NVIDIA A100-SXM4-80GB", "RTX4090"; an L40S is no L4).

    Raises PlanError for an unknown one.
    """
    for kind in KINDS.values():
        words = kind.name.replace(" ", "[ _-]?")
        if re.search(rf"(?<![^\W_]){words}(?![^\W_])", name, re.IGNORECASE):
            return kind
    raise PlanError(
        f"no figures for a device {quote(name)}{did_you_mean(name, KINDS)}; there are {', '.join(KINDS)}: "
        "choose one, or measure on it"
    )


def local_link(kind: DeviceKind) -> Link:
    """Between devices of one host, from the data sheet."""
    return Link(1e-5, kind.local_bytes_per_s * SUSTAINED_BYTES)

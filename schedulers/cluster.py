"""The machines as plain data: devices, and how fast two of them exchange."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.plan import Devices, mesh_name
from anabranch.schedulers.wording import first_few


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU worker's place.

    kind: what costs are measured for ("cpu", "NVIDIA H200"). memory_bytes: None where unknown.
    speed: relative to another device of the same kind.
    """

    host: str
    index: int
    kind: str
    memory_bytes: int | None = None
    speed: float = 1.0

    def __str__(self) -> str:
        return f"{self.host}:{self.index}"


@dataclass(frozen=True)
class Link:
    """Seconds until the first byte arrives, bytes a second after it (inside a host: of one device; across: of
    one host). occupancy: the part of an overlapped transfer's time that is taken from compute.
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    occupancy: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """Devices that are free for this run; the links inside a host and across hosts, None where not measured.

    Raises PlanError when a device is named twice or none is there.
    """

    devices: tuple[Device, ...]
    local: Link | None = None
    across: Link | None = None

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise PlanError("the cluster has no devices: nothing can be placed")
        if len(set(names)) != len(names):
            raise PlanError(
                f"the cluster names a device twice ({first_few(names)}): number a host's devices 0, 1, …"
            )

    @property
    def names(self) -> list[str]:
        """Every device as "host:index"."""
        return [str(device) for device in self.devices]

    @cached_property
    def by_name(self) -> dict[str, Device]:
        """The devices by "host:index"."""
        return {str(device): device for device in self.devices}

    def place(self, data: int, branch: int) -> Devices:
        """Devices for a mesh, [data][branch], each branch group on one host where it fits, the groups on all hosts.

        Hosts are taken by turns, so that a lost one takes few replicas along; the groups of one host are neighbours.
        Groups that fit no host take what is left on as few hosts as possible. Raises PlanError when the
        cluster is too small.
        """
        num_devices = data * branch
        if num_devices > len(self.devices):
            raise PlanError(
                f"the mesh {mesh_name(data, branch)} needs {num_devices} devices, the cluster has "
                f"{len(self.devices)} ({first_few(self.names)}): choose a smaller mesh or add devices"
            )
        hosts: dict[str, list[str]] = {}
        for device in self.devices:
            hosts.setdefault(device.host, []).append(str(device))
        whole, rest = [], []
        for host, names in enumerate(hosts.values()):
            num = len(names) // branch
            whole += [(turn, host, tuple(names[turn * branch : (turn + 1) * branch])) for turn in range(num)]
            rest.append(names[num * branch :])
        taken = sorted(sorted(whole)[:data], key=lambda group: group[1])
        groups = [names for _, _, names in taken]
        left = [name for names in sorted(rest, key=len, reverse=True) for name in names]
        groups += [tuple(left[start : start + branch]) for start in range(0, len(left), branch)]
        return tuple(groups[:data])

    def check(self, devices: Iterable[Iterable[str]]) -> None:
        """Raise PlanError when a plan names devices that the cluster has not."""
        known = set(self.names)
        unknown = [name for row in devices for name in row if name not in known]
        if unknown:
            raise PlanError(
                f"the plan's devices {first_few(unknown)} are not in the cluster, which has "
                f"{first_few(self.names)}: correct them, or leave devices out to have them filled in"
            )

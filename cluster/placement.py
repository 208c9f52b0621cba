"""Which host and GPU each rank gets: pure functions over what the cluster has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from anabranch.cluster.environment import thread_share
from anabranch.cluster.errors import ClusterError
from anabranch.schedulers.cluster import Cluster, Device

Devices = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Host:
    """One node of the cluster: what it has, and what other jobs left free of it. address, port: of its raylet."""

    name: str
    node_id: str
    cpus: float
    free_cpus: float
    gpus: int = 0
    free_gpus: int = 0
    gpu_kind: str = "gpu"
    address: str = ""
    port: int = 0


@dataclass(frozen=True)
class Seat:
    """Where one rank runs. gpu: the GPU's index on its host as the plan names it, None: Ray's choice, or a CPU."""

    rank: int
    host: Host
    local_rank: int
    num_threads: int
    gpu: int | None = None


def devices_of(hosts: tuple[Host, ...], cpus_per_worker: float = 1.0) -> Cluster:
    """What is free for a run: every free GPU, or where no host has a GPU, floor(free CPUs ÷ cpus_per_worker) places.

    Raises PlanError when nothing is free.
    """
    use_gpu = any(host.gpus for host in hosts)
    return Cluster(
        tuple(
            Device(host.name, index, host.gpu_kind if use_gpu else "cpu")
            for host in hosts
            for index in range(_free(host, use_gpu, cpus_per_worker))
        )
    )


def place(
    hosts: tuple[Host, ...],
    mesh: tuple[int, int],
    *,
    use_gpu: bool,
    cpus_per_worker: float = 1.0,
    devices: Devices | None = None,
    any_gpu: bool = False,
) -> tuple[Seat, ...]:
    """A seat for every rank of a data × branch mesh, in rank order (branch innermost).

    With `devices` [data][branch] exactly those (any_gpu: on their hosts); else each branch group on a host that holds
    it, the one with the fewest ranks of this run, then with the fewest free places; where none does, on as few hosts as
    possible. So a lost host takes few replicas along. Raises ClusterError when the cluster cannot hold that.
    """
    if cpus_per_worker > 1 and cpus_per_worker != int(cpus_per_worker):
        raise ClusterError(
            f"launch.cpus_per_worker is {cpus_per_worker}, Ray deals whole CPUs above 1: "
            f"make it {int(cpus_per_worker)} or {int(cpus_per_worker) + 1}"
        )
    world_size = mesh[0] * mesh[1]
    _check_room(hosts, world_size, use_gpu, cpus_per_worker)
    if devices is not None:
        chosen = _as_planned(hosts, mesh, use_gpu, cpus_per_worker, devices)
        if any_gpu:
            chosen = [(host, None) for host, _ in chosen]
    else:
        chosen = [(host, None) for host in _packed(hosts, mesh, use_gpu, cpus_per_worker)]
    ranks_on = Counter(host.name for host, _ in chosen)
    seats: list[Seat] = []
    for rank, (host, gpu) in enumerate(chosen):
        local_rank = sum(seat.host is host for seat in seats)
        seats.append(Seat(rank, host, local_rank, thread_share(host.cpus, ranks_on[host.name]), gpu))
    return tuple(seats)


def place_spares(
    hosts: tuple[Host, ...],
    seats: tuple[Seat, ...],
    num: int,
    use_gpu: bool,
    cpus_per_worker: float,
    what: str = "as launch.spares",
) -> tuple[Host, ...]:
    """Hosts for `num` processes more than the seats, one after another where there is most room.

    Raises ClusterError when there is not enough.
    """
    free = {h: _free(h, use_gpu, cpus_per_worker) - sum(seat.host == h for seat in seats) for h in hosts}
    chosen: list[Host] = []
    for _ in range(num):
        host = max(hosts, key=lambda host: free[host], default=None)
        if host is None or free[host] < 1:
            raise ClusterError(
                f"{num} workers more were asked for {what}, beside {len(seats)} the cluster has room for "
                f"{len(chosen)}: ask for fewer, or a larger cluster"
            )
        free[host] -= 1
        chosen.append(host)
    return tuple(chosen)


def place_more(
    hosts: tuple[Host, ...],
    idle: Sequence[str],
    branch: int,
    most: int,
    use_gpu: bool,
    cpus_per_worker: float,
) -> list[Host]:
    """Hosts for up to `most` whole branch groups more, one a rank: as many groups as there is room for.

    idle: node IDs of places that the run holds already and does not use, one for each.
    """
    roomy = tuple(
        replace(
            host,
            free_cpus=host.free_cpus + cpus_per_worker * idle.count(host.node_id),
            free_gpus=host.free_gpus + idle.count(host.node_id) * use_gpu,
        )
        for host in hosts
    )
    free = sum(_free(host, use_gpu, cpus_per_worker) for host in roomy)
    return _packed(roomy, (min(most, free // branch), branch), use_gpu, cpus_per_worker)


def _places(host: Host, cpus: float, gpus: int, use_gpu: bool, cpus_per_worker: float) -> int:
    by_cpu = int(cpus / cpus_per_worker + 1e-6)
    return min(gpus, by_cpu) if use_gpu else by_cpu


def _free(host: Host, use_gpu: bool, cpus_per_worker: float) -> int:
    return _places(host, host.free_cpus, host.free_gpus, use_gpu, cpus_per_worker)


def _check_room(hosts: tuple[Host, ...], world_size: int, use_gpu: bool, cpus_per_worker: float) -> None:
    free = sum(_free(host, use_gpu, cpus_per_worker) for host in hosts)
    if world_size <= free:
        return
    total = sum(_places(host, host.cpus, host.gpus, use_gpu, cpus_per_worker) for host in hosts)
    bundle = f"{cpus_per_worker:g} CPUs" + (" and 1 GPU" if use_gpu else "")
    busy = f", {free} of them free (other jobs hold the rest)" if free < total else ""
    remedy = (
        "fewer workers or a larger cluster"
        if use_gpu
        else "fewer workers, or a smaller launch.cpus_per_worker"
    )
    raise ClusterError(
        f"{world_size} workers with a bundle of {bundle} each were asked for, the cluster has room for {total}{busy}: "
        f"ask for {remedy}\n{_table(hosts)}"
    )


def _table(hosts: tuple[Host, ...]) -> str:
    """What each host has, as lines."""
    rows = [("host", "CPUs", "free", "GPUs", "free", "kind")] + [
        (
            h.name,
            f"{h.cpus:g}",
            f"{h.free_cpus:g}",
            str(h.gpus),
            str(h.free_gpus),
            h.gpu_kind if h.gpus else "–",
        )
        for h in hosts
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _describe(host: Host) -> str:
    gpus = f"{host.gpus} GPUs and " if host.gpus else ""
    return f"{host.name}: {gpus}{host.cpus:g} CPUs"


def _packed(
    hosts: tuple[Host, ...], mesh: tuple[int, int], use_gpu: bool, cpus_per_worker: float
) -> list[Host]:
    data, branch = mesh
    room = {host: _free(host, use_gpu, cpus_per_worker) for host in hosts}
    free = dict(room)
    chosen: list[Host] = []
    for _ in range(data):
        fitting = [host for host in hosts if free[host] >= branch]
        group = [min(fitting, key=lambda h: (room[h] - free[h], free[h]))] * branch if fitting else []
        while len(group) < branch:  # spread: the hosts with most room first
            roomy = max(hosts, key=lambda host: free[host] - group.count(host))
            group += [roomy] * min(free[roomy] - group.count(roomy), branch - len(group))
        for host in group:
            free[host] -= 1
        chosen += group
    return chosen


def _as_planned(
    hosts: tuple[Host, ...], mesh: tuple[int, int], use_gpu: bool, cpus_per_worker: float, devices: Devices
) -> list[tuple[Host, int | None]]:
    lengths = [len(row) for row in devices]
    if lengths != [mesh[1]] * mesh[0]:
        raise ClusterError(
            f"mesh.devices has rows of {lengths} devices, the mesh is {mesh[0]}x{mesh[1]}: "
            f"give {mesh[0]} rows of {mesh[1]}"
        )
    by_name = {host.name: host for host in hosts}
    names = [name for row in devices for name in row]
    chosen: list[tuple[Host, int | None]] = []
    for name in names:
        host_name, _, index = name.rpartition(":")
        host = by_name.get(host_name)
        if host is None:
            raise ClusterError(
                f"mesh.devices names {name}, the cluster's hosts are {', '.join(by_name)}: name one of them"
            )
        places = host.gpus if use_gpu else _places(host, host.cpus, 0, use_gpu, cpus_per_worker)
        if not index.isdecimal() or int(index) >= places:
            what = "GPUs" if use_gpu else f"places of {cpus_per_worker:g} CPUs"
            raise ClusterError(
                f"mesh.devices names {name}, {host.name} has {places} {what}: number them from 0"
            )
        if names.count(name) > 1:
            raise ClusterError(f"mesh.devices names {name} {names.count(name)} times: give each rank its own")
        chosen.append((host, int(index) if use_gpu else None))
    for host, asked in Counter(host for host, _ in chosen).items():
        free = _free(host, use_gpu, cpus_per_worker)
        if asked > free:
            raise ClusterError(
                f"mesh.devices puts {asked} workers on {host.name}, which has room for {free} more "
                f"({_describe(host)}): move some, or wait until other jobs there end"
            )
    return chosen

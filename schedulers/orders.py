"""The meshes, device orders and sample weights that a search looks at.

Devices are alike when host, kind, speed and memory are. A small cluster's orders are all listed, once up to
exchanges of alike devices, of replicas and of branch ranks. A large one's are block-shaped: a host covers a
rows × b columns of the mesh (a · b = devices of a host), the branch or the data groups close together; and
rows, or columns, of devices of like speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations
from math import comb, factorial, prod
from typing import NamedTuple

from anabranch.schedulers.cluster import Cluster, Device
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.layout import deal_samples
from anabranch.schedulers.plan import Devices
from anabranch.schedulers.request import Request

_MOST_ORDERS = 500  # of a mesh, before symmetries: beyond, only some are looked at
_MOST_SETTINGS = 2_000  # of a mesh: orders × weights, likewise


class Setting(NamedTuple):
    """All of a plan but its placements. is_all: no other order or weights of this mesh could be better."""

    devices: Devices
    samples: tuple[int, ...] | None
    is_all: bool


def settings(request: Request, batch: Batch) -> Iterator[Setting]:
    """What the request leaves open, tried out; a settled part is kept."""
    cluster = request.cluster
    # with placements settled by branch rank, branch ranks cannot be exchanged
    columns_alike = not any(placement.branches for placement in request.fixed.values())
    for data, branch in meshes(request):
        if request.devices is not None or request.standing is not None:
            orders, all_orders = [request.place(data, branch)], True
        else:
            orders, all_orders = device_orders(cluster, data, branch)
        seen: set[object] = set()
        for devices in orders:
            ranks = [[cluster.by_name[name] for name in row] for row in devices]
            weights: list[tuple[int, ...] | None] = [request.samples]
            all_weights = True
            if request.samples is None:
                weights, all_weights = sample_weights(ranks, batch, most=_MOST_SETTINGS // len(orders))
            for samples in weights:
                if len(orders) * len(weights) > 1:
                    same = _signature(ranks, deal_samples(batch, data, branch, samples)[1], columns_alike)
                    if same in seen:
                        continue
                    seen.add(same)
                yield Setting(devices, samples, all_orders and all_weights)


def _signature(
    ranks: Sequence[Sequence[Device]], own: Sequence[Sequence[int]], columns_alike: bool
) -> object:
    """The same for settings that differ by an exchange of alike devices, of replicas, of branch ranks."""
    rows = [
        [(*_nature(device, with_host=True), num) for device, num in zip(devices, nums, strict=True)]
        for devices, nums in zip(ranks, own, strict=True)
    ]
    num = len(rows[0])
    if len(rows) == 1 and columns_alike:
        return tuple(sorted(rows[0], key=repr))
    shapes = permutations(range(num)) if columns_alike and num <= 5 else [tuple(range(num))]
    return min(tuple(sorted(tuple(row[m] for m in shape) for row in rows)) for shape in shapes)


def meshes(request: Request) -> list[tuple[int, int]]:
    """(data, branch): the one settled, else every factorization of the number of devices."""
    if request.mesh is not None:
        return [request.mesh]
    if request.devices is not None:
        return [(len(request.devices), len(request.devices[0]))]
    num = len(request.cluster.devices)
    if request.pins:  # a pinned branch has a rank of its own branch group
        return [(num // branch, branch) for branch in range(2, num + 1) if num % branch == 0]
    return [(num // branch, branch) for branch in range(1, num + 1) if num % branch == 0]


def device_orders(cluster: Cluster, data: int, branch: int) -> tuple[list[Devices], bool]:
    """Orders of devices on a mesh, [data][branch], and whether they are all that can differ."""
    classes: dict[object, list[str]] = {}
    for device in cluster.devices:
        classes.setdefault(_nature(device, with_host=True), []).append(str(device))
    num = len(cluster.devices)
    if data * branch == num and (len(classes) == 1 or (branch == 1 and _same(cluster.devices))):
        return [cluster.place(data, branch)], True
    possible = factorial(num) // prod(factorial(len(names)) for names in classes.values())
    if data * branch == num and possible <= _MOST_ORDERS:
        return [
            _in_order([*classes.values()], word, branch) for word in _words([*map(len, classes.values())])
        ], True
    return _some_orders(cluster, data, branch), False


def _in_order(classes: Sequence[Sequence[str]], word: Sequence[int], branch: int) -> Devices:
    names = [iter(group) for group in classes]
    flat = [next(names[kind]) for kind in word]
    return tuple(tuple(flat[start : start + branch]) for start in range(0, len(flat), branch))


def _words(counts: list[int]) -> Iterator[tuple[int, ...]]:
    """All orders of counts[0] zeros, counts[1] ones, …"""
    if not sum(counts):
        yield ()
        return
    for kind, left in enumerate(counts):
        if left:
            rest = [*counts[:kind], left - 1, *counts[kind + 1 :]]
            for word in _words(rest):
                yield (kind, *word)


def _some_orders(cluster: Cluster, data: int, branch: int) -> list[Devices]:
    found = [cluster.place(data, branch)]
    columns = cluster.place(branch, data)
    found.append(tuple(zip(*columns, strict=True)))
    hosts: dict[str, list[Device]] = {}
    for device in cluster.devices:
        hosts.setdefault(device.host, []).append(device)
    sizes = {len(devices) for devices in hosts.values()}
    if len(sizes) == 1 and data * branch == len(cluster.devices):
        size = sizes.pop()
        for rows in range(1, size + 1):
            if size % rows == 0 and data % rows == 0 and branch % (size // rows) == 0:
                found.append(_blocks([*hosts.values()], data, branch, rows))
    if not _same(cluster.devices):
        by_speed = sorted(cluster.devices, key=lambda device: (-device.speed, device.kind))
        names = [str(device) for device in by_speed][: data * branch]
        found.append(tuple(tuple(names[start : start + branch]) for start in range(0, len(names), branch)))
        found.append(tuple(tuple(names[row::data]) for row in range(data)))
    return list(dict.fromkeys(found))


def _blocks(hosts: Sequence[Sequence[Device]], data: int, branch: int, rows: int) -> Devices:
    """Each host covers `rows` rows of the mesh."""
    width = len(hosts[0]) // rows
    mesh = [[""] * branch for _ in range(data)]
    for number, devices in enumerate(hosts):
        top, left = number // (branch // width) * rows, number % (branch // width) * width
        for index, device in enumerate(devices):
            mesh[top + index // width][left + index % width] = str(device)
    return tuple(map(tuple, mesh))


def sample_weights(
    ranks: Sequence[Sequence[Device]], batch: Batch, most: int
) -> tuple[list[tuple[int, ...] | None], bool]:
    """Weights of replicas to try, at most about `most`, and whether they are all that can differ."""
    data = len(ranks)
    num_groups = -(-batch.num_samples // batch.bn_batch_size)
    are_even = batch.num_samples % num_groups == 0  # else replicas with as many groups differ by samples
    if data == 1 or (are_even and _same([device for row in ranks for device in row])) or num_groups < data:
        return [None], True
    if comb(num_groups - 1, data - 1) <= most:
        cuts = combinations(range(1, num_groups), data - 1)
        parts = [tuple(b - a for a, b in pairwise((0, *cut, num_groups))) for cut in cuts]
        return [None, *parts], True
    slowest = [min(device.speed for device in row) for row in ranks]
    total = [sum(device.speed for device in row) for row in ranks]
    tried = [None, *(_proportional(num_groups, speeds) for speeds in (slowest, total))]
    return list(dict.fromkeys(tried)), False


def _proportional(num_groups: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """Groups dealt one by one to the replica that would be ready first; each has one at least."""
    exact = [num_groups * speed / sum(speeds) for speed in speeds]
    counts = [max(int(share), 1) for share in exact]
    while sum(counts) < num_groups:
        least = min(range(len(counts)), key=lambda d: (counts[d] + 1) / speeds[d])
        counts[least] += 1
    while sum(counts) > num_groups:
        most = max((d for d in range(len(counts)) if counts[d] > 1), key=lambda d: counts[d] / speeds[d])
        counts[most] -= 1
    return tuple(counts)


def _nature(device: Device, *, with_host: bool) -> tuple[object, ...]:
    own = (device.kind, device.speed, device.memory_bytes)
    return (device.host, *own) if with_host else own


def _same(devices: Sequence[Device]) -> bool:
    first = _nature(devices[0], with_host=False)
    return all(_nature(device, with_host=False) == first for device in devices)

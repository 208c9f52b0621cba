"""What would stop a run on a cluster: all of it for `anabranch doctor`, the cheap part before each run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from anabranch.cluster.checks import Check
from anabranch.cluster.errors import ClusterError
from anabranch.cluster.placement import Host, place
from anabranch.cluster.ray_session import connect, hosts
from anabranch.cluster.ward import Ward


def examine(
    address: str, folder: Path | None, port: int, num_workers: int, cpus_per_worker: float
) -> list[Check]:
    """Every check, on every node. folder: the run's, None where it is no path. num_workers: 0, as many as there are.

    A cluster that cannot be reached is a failed check like the others; so is one that is too small.
    """
    try:
        with connect(address):
            found = hosts()
            names = ", ".join(host.name for host in found)
            answers = Check("cluster", "", True, f"{len(found)} hosts: {names}")
            room = _check_room(found, num_workers, cpus_per_worker)
            with Ward(found) as ward:
                return [answers, room, *ward.examine(folder, port)]
    except ClusterError as error:
        what, _, remedy = str(error).partition(": ")
        return [Check("cluster", "", False, what, remedy)]


def preflight(names: Sequence[str], folder: Path | None) -> None:
    """The cheap part, before workers start on the hosts of these names: versions, token, the folder where it is shared.

    Raises ClusterError that names every failed check; a remedy that hosts share stands once, after the last of them.
    """
    with Ward(tuple(host for host in hosts() if host.name in names)) as ward:
        found = ward.glance(folder)
    failed = []
    for remedy, alike in groupby((check for check in found if not check.ok), key=lambda check: check.remedy):
        failed += [f"{check.host}: {check.found}" for check in alike]
        failed[-1] += f" – {remedy}"
    if failed:
        raise ClusterError("\n".join(["the cluster is not ready (`anabranch doctor` has it all):", *failed]))


def _check_room(found: tuple[Host, ...], num_workers: int, cpus_per_worker: float) -> Check:
    use_gpu = any(host.gpus for host in found)
    try:
        place(found, (max(num_workers, 1), 1), use_gpu=use_gpu, cpus_per_worker=cpus_per_worker)
    except ClusterError as error:
        what, _, remedy = str(error).partition(": ")
        return Check("room", "", False, what, remedy)
    return Check("room", "", True, f"for {num_workers} workers" if num_workers else "for a worker at least")


def is_remote(address: str) -> bool:
    """Whether `connect` would use a cluster that is there already, and not make one for the run."""
    return bool(address or os.environ.get("RAY_ADDRESS"))

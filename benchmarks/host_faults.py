"""Cells of the matrix of faults on two hosts: lost, cut off, back again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from anabranch.benchmarks.fault_cells import Cell
from anabranch.benchmarks.fault_judge import Outcome, judge
from anabranch.benchmarks.fault_runs import Fault, finish, prepare, start, traces
from anabranch.benchmarks.ray_hosts import RayHosts, ray_hosts

_SHARE = 0.5  # of a core for each worker: hosts of one core have room for one replica, not for a second


def run_on_hosts(place: Path, cell: Cell, wanted: Mapping[str, Tensor], limit_s: float) -> Outcome:
    """Runs a cell on two hosts, the command on the first; lost hosts and wires are whole again for a second command."""
    with ray_hosts(num_cpus=1) as cluster:
        prefix = ("ip", "netns", "exec", cluster.hosts[0].namespace)
        flags = ["--mesh", cell.mesh, "--launch.address", cluster.address]
        flags += ["--launch.cpus-per-worker", str(_SHARE), *cell.flags]
        flags += ["--train.precision", "fp64"] if cell.tolerance else []
        faults = tuple(_aimed(fault, cluster) for fault in cell.faults)
        prepare(place, faults)
        begun = time.monotonic()
        process = start(place, *flags, prefix=prefix)
        if cell.returns:
            _await(lambda: (place / "fired-0.json").exists() and not cluster.pids(1), limit_s)
            cluster.start(1)
        ended = finish(place, process, limit_s, begun)

        def repair() -> None:
            for index, host in enumerate(cluster.hosts):
                host.heal()
                # A node that Ray declared dead while the wire was down ends itself when it hears of it.
                if index == 1 or not cluster.has_ray(index):
                    cluster.lose(index)
                    cluster.start(index)

        outcome = judge(
            place, faults, ended, wanted, limit_s, flags, cell.tolerance, repair=repair, prefix=prefix
        )
        if outcome.outcome in cell.promise and (wrong := _misplaced(place, cluster, cell)):
            return replace(outcome, outcome="MISPLACED", said=wrong)
        return outcome


def _aimed(fault: Fault, cluster: RayHosts) -> Fault:
    host = cluster.hosts[fault.rank // 2]
    return replace(fault, argument={"network": host.device, "host": host.namespace}.get(fault.kind, ""))


def _await(happened: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.1)


def _misplaced(place: Path, cluster: RayHosts, cell: Cell) -> str:
    """What is wrong with the ranks' hosts and interfaces, and of a host that came back; "": nothing."""
    told = [record for record in traces(place) if "interface" in record]
    for record in told:
        host = cluster.hosts[record["rank"] // 2]
        if record["interface"] != host.device:
            return (
                f"rank {record['rank']} used interface {record['interface']!r}, its host's is {host.device}"
            )
    last = max((record["step"] for record in traces(place) if "step" in record), default=0)
    at_the_end = {record["rank"] for record in traces(place) if record.get("step") == last}
    if cell.returns and at_the_end != {0, 1, 2, 3}:
        return f"ranks {sorted(at_the_end)} made the last step, the lost host was back"
    return ""

"""The matrix of faults: kinds × ranks × moments, each cell run or void with its reason.

kind       what happens                                   where
kill       SIGKILL (the kernel's out-of-memory kill too)  rank 0, another, 5 moments; D=1; recovery; a branch's holders
stop       SIGSTOP                                        rank 0, another, 5 moments
exception  the worker's code raises                       rank 0, another, 5 moments
memory     memory taken, then exit 137                    rank 0, another, 5 moments
raylet     SIGKILL of the node's raylet                   one host: 5 moments
driver     SIGKILL of the command                         5 moments
disk       the run folder's file system (tmpfs) is full   before and while a checkpoint is written; needs root
network    the wire between two hosts goes down           5 moments; needs root
host       SIGKILL of all of a host: Ray and its ranks    going on later, smaller, and grown again; needs root
"""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.benchmarks.fault_runs import Fault
from anabranch.benchmarks.injector import MOMENTS


@dataclass(frozen=True)
class Cell:
    """One run with its faults, or the reason why there is none.

    promise: outcomes that are right. void: why it is not run. flags: of train. tolerance: 0: weights to the bit, else
    the largest relative difference of a tensor, in fp64. hosts: on two hosts, replica 0 on the first. returns: the
    lost host comes back while the run goes on, and the replicas must be two again at its end.
    """

    name: str
    faults: tuple[Fault, ...] = ()
    promise: tuple[str, ...] = ("recovered",)
    void: str = ""
    mesh: str = "2x2"
    flags: tuple[str, ...] = ()
    tolerance: float = 0.0
    hosts: bool = False
    returns: bool = False


def cells() -> list[Cell]:
    """All of the matrix, void ones too."""
    found = [cell for kind in ("kill", "stop", "exception", "memory") for cell in _in_worker(kind)]
    found += _of_the_node(
        "raylet", "all ranks are this raylet's; another host's takes its workers along: host-lost"
    )
    found += _of_the_node("driver", "there is one driver, whichever rank's moment it is")
    for moment in MOMENTS:
        named = f"disk-rank0-{moment}"
        if moment in ("optimizer", "checkpoint"):
            step = 14 if moment == "optimizer" else 15  # the next thing written is a checkpoint, or is one
            found.append(Cell(named, (Fault("disk", 0, moment, step),), ("recovered", "resumed")))
        else:
            found.append(Cell(named, void="nothing is written then: as disk-rank0-optimizer"))
        found.append(Cell(f"disk-another-{moment}", void="one file system: full for all, whoever fills it"))
    newcomer = Fault("kill", 3, "reduction")
    found += [
        Cell(f"kill-during-recovery-{name}", (newcomer, Fault("kill", rank, moment)))
        for name, rank, moment in (
            ("survivor0", 0, "recovery"), ("survivor2", 2, "recovery"), ("newcomer", 3, "newcomer"),
        )
    ]  # fmt: skip
    both = tuple(Fault("kill", rank, "branch_all_reduce") for rank in (1, 3))
    none_allowed = ("--launch.max-failures", "0")
    found.append(Cell("kill-without-retries", (newcomer,), ("resumed",), flags=none_allowed))
    found.append(Cell("kill-with-a-spare", (newcomer,), flags=("--launch.spares", "1")))
    found.append(Cell("kill-both-holders-of-a-branch", both))
    found += [
        Cell(f"one-replica-kill-rank{rank}-{moment}", (_fault("kill", rank, moment),), mesh="1x2")
        for rank in (0, 1)
        for moment in ("forward", "optimizer", "checkpoint")
    ]
    return found + _on_two_hosts()


def _on_two_hosts() -> list[Cell]:
    both = ("resumed", "recovered")
    found = [Cell("two-hosts", hosts=True, tolerance=1e-6)]  # against one host
    for moment in MOMENTS:
        if moment == "checkpoint":  # the first replica's host writes
            found.append(Cell(f"network-rank0-{moment}", (_fault("network", 0, moment),), both, hosts=True))
            found.append(Cell(f"network-another-{moment}", void="the other host's ranks write nothing"))
        else:
            found.append(Cell(f"network-rank0-{moment}", void="one wire: as network-another"))
            found.append(Cell(f"network-another-{moment}", (Fault("network", 2, moment),), both, hosts=True))
    lost, smaller = Fault("host", 2, "reduction"), ("--launch.min-replicas", "1")
    return [
        *found,
        Cell("two-hosts-kill", (Fault("kill", 2, "reduction"),), hosts=True),
        Cell("host-lost", (lost,), both, hosts=True),
        Cell("host-lost-smaller", (lost,), flags=smaller, tolerance=1e-6, hosts=True),
        Cell(
            "network-smaller", (Fault("network", 2, "reduction"),), flags=smaller, tolerance=1e-6, hosts=True
        ),
        Cell("host-lost-and-back", (lost,), flags=smaller, tolerance=1e-6, hosts=True, returns=True),
    ]


def _in_worker(kind: str) -> list[Cell]:
    return [
        Cell(f"{kind}-{'another' if rank else 'rank0'}-{moment}", (_fault(kind, rank, moment),))
        for rank in (0, 3)
        for moment in MOMENTS
    ]


def _fault(kind: str, rank: int, moment: str) -> Fault:
    if moment == "checkpoint":  # ranks of the first replica write
        return Fault(kind, min(rank, 1), moment, 10)
    return Fault(kind, rank, moment)


def _of_the_node(kind: str, void: str) -> list[Cell]:
    promise = ("resumed",) if kind == "driver" else ("resumed", "recovered")  # before the workers notice
    run = [Cell(f"{kind}-rank0-{moment}", (_fault(kind, 0, moment),), promise) for moment in MOMENTS]
    return run + [Cell(f"{kind}-another-{moment}", void=void) for moment in MOMENTS]

"""The matrix of faults: each cell one run of the real command line with a fault at an exact rank, step and moment.

kind       what happens                                   where
kill       SIGKILL (the kernel's out-of-memory kill too)  rank 0, another, 5 moments; D=1; during recovery; spares
stop       SIGSTOP                                        rank 0, another, 5 moments
exception  the worker's code raises                       rank 0, another, 5 moments
memory     memory taken, then exit 137                    rank 0, another, 5 moments
raylet     SIGKILL of the node's raylet                   one host: 5 moments
driver     SIGKILL of the command                         5 moments
disk       the run folder's file system (tmpfs) is full   before and while a checkpoint is written; needs root
network    the wire between two hosts goes down           5 moments, in `host_faults`; needs root
"""

from __future__ import annotations

import fnmatch
import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from anabranch.benchmarks import fault_runs
from anabranch.benchmarks.fault_judge import Outcome, judge, weights
from anabranch.benchmarks.fault_runs import Fault, config_text, prepare
from anabranch.benchmarks.injector import MOMENTS
from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.cluster import connect

LIMIT_S = 120.0
_TMPFS_BYTES = 24 * 2**20
_IN_WORKER = ("kill", "stop", "exception", "memory")


@dataclass(frozen=True)
class Cell:
    """faults: by `fault_runs`. promise: outcomes that DESIGN.md promises. void: why it is not run. flags: of train."""

    name: str
    faults: tuple[Fault, ...] = ()
    promise: tuple[str, ...] = ("recovered",)
    void: str = ""
    mesh: str = "2x2"
    flags: tuple[str, ...] = ()


def cells() -> list[Cell]:
    """All of the matrix, void ones too."""
    found = [cell for kind in ("kill", "stop", "exception", "memory") for cell in _in_worker(kind)]
    found += _of_the_node("raylet", "all ranks are this raylet's: the other host's is in `host_faults`")
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
    found.append(Cell("kill-both-holders-of-a-branch", both))
    found += [
        Cell(f"one-replica-kill-rank{rank}-{moment}", (_fault("kill", rank, moment),), mesh="1x2")
        for rank in (0, 1)
        for moment in ("forward", "optimizer", "checkpoint")
    ]
    return found


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


def run(
    *, only: Sequence[str] = (), resume: bool = False, folder: Path = RESULTS, console: Console | None = None
) -> dict[str, Any]:
    """Runs the cells whose names match one of the patterns `only` (default: all), and writes the record after each.

    resume: cells that the record has already are not run again. Folders of cells that broke their promise are kept.
    """
    console = console or Console()
    wanted = [c for c in cells() if not only or any(fnmatch.fnmatch(c.name, p) for p in only)]
    if not wanted:
        raise ValueError(f"no cell is called {', '.join(only)}: they are listed in benchmarks/README.md")
    record = _recorded(folder) if resume else {}
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="faults-"))
        bench = Bench(root, stack)
        for cell in wanted:
            if cell.name in record:
                continue
            record[cell.name] = {"void": cell.void} if cell.void else bench.measure(cell)
            console.print(_line(cell.name, record[cell.name]), highlight=False, soft_wrap=True)
            path = write_record("faults", {"cells": record}, folder)
    if all(cell.get("kept", True) for cell in record.values()):
        shutil.rmtree(root)
    return {"cells": record, "path": str(path if record else ""), "kept": str(root) if root.exists() else ""}


class Bench:
    """Undisturbed runs by mesh, made when first asked for, and the one cluster that most cells share."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root, self._stack = root, stack
        self._undisturbed: dict[str, dict[str, Tensor]] = {}
        self._address = ""

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Runs one cell; its outcome as plain data, and whether it is what was promised."""
        outcome = self.run(cell)
        kept = outcome.outcome in cell.promise
        if kept:
            shutil.rmtree(self.root / cell.name)
        return {**asdict(outcome), "promise": cell.promise, "kept": kept}

    def run(self, cell: Cell) -> Outcome:
        """Runs one cell in root/NAME."""
        place, flags = self.root / cell.name, ["--mesh", cell.mesh, *cell.flags]
        wanted = self.undisturbed(cell.mesh)
        if all(fault.kind in _IN_WORKER for fault in cell.faults):
            flags += ["--launch.address", self.address()]
        with ExitStack() as stack:
            faults = cell.faults
            if any(fault.kind == "disk" for fault in faults):
                run_dir = stack.enter_context(small_disk(place / "run"))
                faults = tuple(replace(fault, argument=str(run_dir)) for fault in faults)
            prepare(place, faults, config_text())
            ended = fault_runs.run(place, LIMIT_S, *flags)
            return judge(place, faults, ended, wanted, LIMIT_S, flags)

    def undisturbed(self, mesh: str) -> dict[str, Tensor]:
        """Weights of the run without faults. Raises RuntimeError where it fails."""
        if mesh not in self._undisturbed:
            place = self.root / f"undisturbed-{mesh}"
            prepare(place, (), config_text())
            ended = fault_runs.run(place, LIMIT_S, "--mesh", mesh, "--launch.address", self.address())
            step, self._undisturbed[mesh] = weights(place / "run")
            if ended.code or step != fault_runs.STEPS:
                raise RuntimeError(f"the undisturbed run failed:\n{ended.stderr[-4000:]}")
        return self._undisturbed[mesh]

    def address(self) -> str:
        """Of the shared cluster, which lives as long as the stack."""
        if not self._address:
            import ray

            os.environ["PYTHONPATH"] = fault_runs.python_path()  # of its workers, which start elsewhere
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # runs in other processes need it
            self._stack.enter_context(connect(num_cpus=4))
            self._address = str(ray.get_runtime_context().gcs_address)
        return self._address


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of a few megabytes at `folder`. Needs root (Linux)."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_BYTES}", "tmpfs", str(folder)]
    subprocess.run(command, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def table(record: dict[str, Any]) -> Table:
    """Outcomes of the cells that were run."""
    found = Table(
        "cell", "outcome", "promised", "to go on, s", "steps redone", "whole, s", box=None, pad_edge=False
    )
    for name, cell in record.items():
        if cell.get("void"):
            continue
        seconds = ", ".join("–" if s is None else f"{s:.1f}" for s in cell["recovery_s"])
        outcome = cell["outcome"] if cell["kept"] else f"[red]{cell['outcome']}[/red]"
        found.add_row(
            name,
            outcome,
            " or ".join(cell["promise"]),
            seconds,
            str(cell["redone"]),
            f"{cell['seconds']:.0f}",
        )
    return found


def _line(name: str, cell: dict[str, Any]) -> str:
    if cell.get("void"):
        return f"{name}: void, {cell['void']}"
    said = "" if cell["kept"] else f": {cell['said']}"
    return f"{name}: {cell['outcome']} ({cell['seconds']:.0f} s){said}"


def _recorded(folder: Path) -> dict[str, Any]:
    path = folder / "faults.json"
    return json.loads(path.read_text())["cells"] if path.exists() else {}

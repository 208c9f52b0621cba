"""Runs the matrix of faults: each cell one run of the real command line, against one without faults."""

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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from anabranch.benchmarks import fault_runs
from anabranch.benchmarks.fault_cells import Cell, cells
from anabranch.benchmarks.fault_judge import Outcome, judge, weights
from anabranch.benchmarks.fault_runs import prepare
from anabranch.benchmarks.host_faults import run_on_hosts
from anabranch.benchmarks.injector import empty
from anabranch.benchmarks.record import RESULTS, environment, write_record
from anabranch.cluster import connect
from anabranch.runtime.errors import ConfigError

LIMIT_S = 240.0
_TMPFS_BYTES = 24 * 2**20
_IN_WORKER = ("kill", "stop", "exception", "memory")


def run(
    *, only: Sequence[str] = (), resume: bool = False, folder: Path = RESULTS, console: Console | None = None
) -> dict[str, Any]:
    """Runs the cells whose names match one of the patterns `only` (default: all), and writes the record after each.

    resume: cells that the record has already are not run again. What it has of cells that were not asked for stays.
    Folders of cells that broke their promise are kept.
    """
    console = console or Console()
    wanted = [c for c in cells() if not only or any(fnmatch.fnmatch(c.name, p) for p in only)]
    if not wanted:
        raise ConfigError(
            f"no cell is called {', '.join(only)}: fault_cells.py has them all; patterns work, as in kill-*"
        )
    record, path = _recorded(folder) if resume or only else {}, folder / "faults.json"
    with ExitStack() as stack:
        root = Path(tempfile.mkdtemp(prefix="faults-"))
        bench = Bench(root, stack)
        for cell in wanted:
            if resume and cell.name in record:
                continue
            record[cell.name] = {"void": cell.void} if cell.void else bench.measure(cell)
            console.print(_line(cell.name, record[cell.name]), highlight=False, soft_wrap=True)
            path = write_record("faults", {"cells": record}, folder)
    found = {cell.name: record[cell.name] for cell in wanted}
    if all(one.get("kept", True) for one in found.values()):
        shutil.rmtree(root)
    return {"cells": found, "path": str(path), "kept": str(root) if root.exists() else ""}


class Bench:
    """Undisturbed runs by mesh, made when first asked for, and the one cluster that most cells share."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root, self._stack = root, stack
        self._undisturbed: dict[str, dict[str, Tensor]] = {}
        self._address = ""
        self._here = environment()

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Runs one cell; its outcome as plain data, and whether it is what was promised."""
        outcome = self.run(cell)
        kept = outcome.outcome in cell.promise
        if kept:
            shutil.rmtree(self.root / cell.name)
        load = round(os.getloadavg()[0], 1)  # of the last minute: seconds depend on it
        found = {**asdict(outcome), "promise": cell.promise, "kept": kept, "load": load}
        return found | {name: self._here[name] for name in ("date", "commit")}

    def run(self, cell: Cell) -> Outcome:
        """Runs one cell in root/NAME."""
        precision = "fp64" if cell.tolerance else "fp32"
        place = self.root / cell.name
        # Hosts exchange over gloo, which adds in another order than ranks that share memory.
        on_hosts = cell.hosts and not cell.tolerance
        wanted = self.undisturbed(cell.mesh, "hosts" if on_hosts else precision)
        if cell.hosts:
            return run_on_hosts(place, cell, wanted, LIMIT_S)
        flags = ["--mesh", cell.mesh, *cell.flags]
        if all(fault.kind in _IN_WORKER for fault in cell.faults):
            flags += ["--launch.address", self.address()]
        with ExitStack() as stack:
            faults, run_dir = cell.faults, place / "run"
            if any(fault.kind == "disk" for fault in faults):
                stack.enter_context(small_disk(run_dir))
                faults = tuple(replace(fault, argument=str(run_dir)) for fault in faults)
            prepare(place, faults)
            ended = fault_runs.run(place, LIMIT_S, *flags)
            return judge(place, faults, ended, wanted, LIMIT_S, flags, repair=partial(empty, run_dir))

    def undisturbed(self, mesh: str, precision: str = "fp32") -> dict[str, Tensor]:
        """Weights of the run without faults, whose folder stays. Raises RuntimeError where it fails.

        precision: "hosts" is fp32 on two hosts.
        """
        name = f"undisturbed-{mesh}-{precision}"
        if name not in self._undisturbed:
            place = self.root / name
            if precision == "hosts":
                said = run_on_hosts(place, Cell(name, mesh=mesh, hosts=True), {}, LIMIT_S).said
            else:
                prepare(place, ())
                flags = ["--mesh", mesh, "--train.precision", precision, "--launch.address", self.address()]
                said = fault_runs.run(place, LIMIT_S, *flags).stderr
            step, self._undisturbed[name] = weights(place / "run")
            if step != fault_runs.STEPS:
                raise RuntimeError(f"the undisturbed run failed:\n{said[-4000:]}")
        return self._undisturbed[name]

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
        "cell",
        "outcome",
        "seen, s",
        "to go on, s",
        "steps redone",
        "whole, s",
        "load",
        box=None,
        pad_edge=False,
    )
    found.columns[0].no_wrap = True
    for name, cell in record.items():
        if cell.get("void"):
            continue
        outcome = cell["outcome"]
        if not cell["kept"]:
            outcome = f"[red]{outcome}[/red], promised: {' or '.join(cell['promise'])}"
        found.add_row(
            name,
            outcome,
            _seconds(cell["seen_s"]),
            _seconds(cell["recovery_s"]),
            str(cell["redone"]),
            f"{cell['seconds']:.0f}",
            str(cell.get("load", "")),
        )
    return found


def _seconds(by_fault: Sequence[float | None]) -> str:
    return ", ".join("–" if s is None else f"{s:.1f}" for s in by_fault)


def _line(name: str, cell: dict[str, Any]) -> str:
    if cell.get("void"):
        return f"{name}: void, {cell['void']}"
    said = "" if cell["kept"] else f": {cell['said']}"
    return f"{name}: {cell['outcome']} ({cell['seconds']:.0f} s){said}"


def _recorded(folder: Path) -> dict[str, Any]:
    path = folder / "faults.json"
    return json.loads(path.read_text())["cells"] if path.exists() else {}

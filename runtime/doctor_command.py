"""`anabranch doctor`: what would stop a run on this cluster, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anabranch.cluster.checks import Check
from anabranch.cluster.doctor import examine
from anabranch.runtime.config import Config
from anabranch.runtime.config_rules import is_plan_file, mesh_axes
from anabranch.runtime.progress import RunProgress
from anabranch.runtime.redact import redacted
from anabranch.schedulers import read_plan


def doctor(config: Config, console: Console) -> dict[str, Any]:
    """Checks the cluster for a configuration: ok, checks (a list of {name, host, ok, found, remedy})."""
    launch, num_workers = config.launch, num_workers_of(config)
    with RunProgress(console, "doctor") as progress:
        progress.watch([{"phase": "asking every host"}])
        shared = None if config.checkpoint.url else run_folder(launch.run_dir)
        found = examine(launch.address, shared, launch.port, num_workers, launch.cpus_per_worker)
    print_checks(console, found)
    return {"ok": all(check.ok for check in found), "checks": [vars(check) for check in found]}


def num_workers_of(config: Config) -> int:
    """Workers that the run is to have, with its spares: as told, or by the mesh that is told or the plan file's. 0: as
    many as there is room for. Raises PlanError for a file that is no plan."""
    mesh = config.mesh
    file = read_plan(Path(mesh.plan)) if is_plan_file(mesh.plan) else None
    axes = mesh_axes(mesh.shape) or (file.mesh if file else (0, 0))
    num_workers = mesh.num_workers or axes[0] * axes[1]
    return num_workers + config.launch.spares if num_workers else 0


def run_folder(run_dir: str) -> Path:
    """Where runs are written on every host."""
    return Path(run_dir or "runs").absolute()


def print_checks(console: Console, found: list[Check]) -> None:
    """The failed checks last, each with its remedy below it."""
    table = Table(box=None, pad_edge=False)
    for name in ("check", "host", "", "found"):
        table.add_column(name, overflow="fold")
    for check in sorted(found, key=lambda check: not check.ok):
        color = "green" if check.ok else "red"
        table.add_row(
            check.name, check.host, f"[{color}]{'pass' if check.ok else 'FAIL'}[/]", escape(check.found)
        )
        if not check.ok:
            table.add_row("", "", "", f"→ {escape(check.remedy)}")
    console.print(table, highlight=False)
    failed = sum(not check.ok for check in found)
    console.print(f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks passed")


def escape(text: str) -> str:
    """Square brackets are no markup here; secrets are taken out before a cell's lines are folded."""
    return str(redacted(text)).replace("[", r"\[")

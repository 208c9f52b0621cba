"""`anabranch profile`: on every rank, and what it prints and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from anabranch.cluster import WorkerContext
from anabranch.runtime.config import Config
from anabranch.runtime.measure import with_speeds
from anabranch.runtime.profile_advice import known_to
from anabranch.runtime.profile_build import build_profile
from anabranch.runtime.profile_file import write_profile
from anabranch.runtime.profile_loop import StopProfile
from anabranch.runtime.profile_steps import profile_steps
from anabranch.runtime.profile_table import print_profile
from anabranch.runtime.profile_trace import write_trace
from anabranch.runtime.trainer import Trainer
from anabranch.schedulers import Cluster, ModelSpec
from anabranch.schedulers.cost_file import read_costs
from anabranch.schedulers.costs import Batch


def profile_rank(
    trainer: Trainer,
    model: ModelSpec,
    config: Config,
    steps: int,
    costs: str,
    run_dir: Path,
    context: WorkerContext,
    cluster: Cluster,
) -> dict[str, Any]:
    """Profiles on this rank; rank 0 writes profile.json and trace.json.gz and returns {"profile", "run_dir"}.

    costs: the file of a prediction to compare with, "" for none; cluster: with the plan's devices. Raises PlanError,
    before any step, where the costs are not of these devices or this network.
    {"stopped": why} where a rank is told to stop: a profile of fewer steps than asked for is none.
    """
    known = None
    if costs and context.rank == 0:
        known = read_costs(costs)
        cluster = known_to(known, with_speeds(cluster, cluster.names, known))
        known.check(model, frozenset(device.kind for device in cluster.devices), costs)
    try:
        ranks = profile_steps(trainer, steps)
    except StopProfile:
        context.publish(phase="stopped")
        return {"stopped": context.stop_requested or "by another rank"}
    if context.rank != 0:
        return {}
    context.publish(phase="adding up")
    train = config.train
    batch = Batch(train.batch_size, train.bn_batch_size, train.accumulation)
    profile = build_profile(ranks, trainer.plan, model, batch, known, cluster)
    write_profile(profile, run_dir / "profile.json")
    write_trace(ranks, run_dir / "trace.json.gz")
    context.publish(phase="done")
    return {"profile": profile, "run_dir": str(run_dir)}


def print_result(console: Console, result: dict[str, Any], run: Path | None) -> dict[str, Any]:
    """Tables and files for people; the plain data of `--json`. run: whose report it is; None: the profile's own."""
    from anabranch.runtime.report import write_report

    profile, folder = result["profile"], Path(result["run_dir"])
    print_profile(console, profile)
    report = write_report([run or folder])
    files = {
        "profile": str(folder / "profile.json"),
        "trace": str(folder / "trace.json.gz"),
        "report": report["output"],
    }
    for what, path in files.items():
        hint = " (ui.perfetto.dev opens it)" if what == "trace" else ""
        console.print(f"{what}: {path}{hint}", highlight=False, soft_wrap=True)
    return {
        "step_s": profile["steps"]["step_s"],
        "stragglers": profile["stragglers"],
        "suggestion": profile["suggestion"],
        "unattributed": [rank["unattributed"] for rank in profile["ranks"]],
        "overhead": profile["overhead"],
        "run_dir": str(folder),
        **files,
        "notes": report["notes"],
    }

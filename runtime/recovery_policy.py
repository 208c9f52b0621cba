"""What a run does after a failure: which failures are worth another try, and where all ranks go on."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anabranch.cluster import ClusterError, Recovery
from anabranch.cluster.failures import Failure
from anabranch.runtime.commit import RankState, decide
from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError, UnreadableError
from anabranch.schedulers import Plan, PlanError


def recovery_of(
    config: Config, plan: Plan, checkpoint: str, told: Callable[[dict[str, Any]], None]
) -> Recovery | None:
    """The recovery of a training run under `[launch]`; None where its first failure ends it.

    checkpoint: that it began from, "" for none. told: gets every failure that was recovered from, and what is wrong
    with checkpoints that are passed over.
    """
    launch = config.launch
    if not launch.max_failures:
        return None
    of_plan = list(range(plan.world_size))  # the plan's rank that each rank stands for

    def order(states: list[dict[str, Any] | None]) -> dict[str, Any]:
        was = len(of_plan) // plan.branch
        missing = [rank for rank in range(plan.world_size) if rank not in of_plan]
        of_plan.extend(missing[: len(states) - len(of_plan)])
        vacant = [rank for rank, state in enumerate(states) if state is None]
        decision = decide([_rank_state(state) for state in states], plan.branch, vacant)
        of_plan[:] = [of_plan[rank] for rank in decision.ranks]
        found: dict[str, Any] = {
            "action": decision.action,
            "step": decision.step,
            "ranks": list(decision.ranks),
            "sources": decision.sources,
            "leader": decision.leader,
            "of_plan": list(of_plan),
            "was": was,
        }
        if decision.action == "rewind":
            path, step = _newest(
                Path(launch.run_dir), config.checkpoint.url, checkpoint,
                lambda text: told({"cause": text, "at": time.time(), "text": text}),
            )  # fmt: skip
            found |= {"checkpoint": path, "step": step}
        return found

    return Recovery(
        order, _retries, told, launch.max_failures, launch.spares, launch.hang_s, launch.min_replicas or None
    )


def check_replicas_wanted(config: Config, plan: Plan) -> None:
    """Raises ConfigError where `launch.min_replicas` is more than the plan has."""
    fewest = config.launch.min_replicas
    if fewest > plan.data:
        raise ConfigError(
            f"launch.min_replicas is {fewest}, the mesh {plan.data}x{plan.branch} (data x branch) has {plan.data} "
            f"replica{'s' if plan.data > 1 else ''}: make it {plan.data} or less"
        )


def _rank_state(state: dict[str, Any] | None) -> RankState | None:
    if state is None or state["committed"] is None:
        return None
    return RankState(state["committed"], state["prepared"], state["tended"])


def _newest(run_dir: Path, url: str, first: str, on_bad: Callable[[str], object]) -> tuple[str, int]:
    """The newest whole checkpoint of the run, else the one that it began from: its folder and step."""
    from anabranch.runtime.checkpoint import Checkpoint
    from anabranch.runtime.checkpoints import Checkpoints

    found = Checkpoints(run_dir, url=url).newest(on_bad)
    if found is None:
        return (first, int(Checkpoint.open(first).position["step"])) if first else ("", 0)
    return str(found.folder), int(found.position["step"])


def _retries(failure: Failure) -> bool:
    """Wrong input stays wrong; a store may answer again."""
    from anabranch.blocks.errors import ModelError  # not at the top: torch comes with it, while Ray starts

    if failure.exception is None:
        return True
    try:
        error = pickle.loads(failure.exception)
    except Exception:  # its module exists on the worker only
        return True
    wrong = isinstance(error, ConfigError | PlanError | ModelError | ClusterError)
    return isinstance(error, UnreadableError) or not wrong

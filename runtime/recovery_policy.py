"""What a run does after a failure: which failures are worth another try, and where all ranks go on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anabranch.blocks.errors import ModelError
from anabranch.cluster import ClusterError, Recovery
from anabranch.cluster.failures import Failure
from anabranch.runtime.commit import RankState, decide
from anabranch.runtime.config import Config
from anabranch.runtime.errors import ConfigError
from anabranch.schedulers import Plan, PlanError


def recovery_of(
    config: Config, plan: Plan, checkpoint: str, told: Callable[[dict[str, Any]], None]
) -> Recovery | None:
    """The recovery of a training run under `[launch]`; None where its first failure ends it.

    checkpoint: that it began from, "" for none. told: gets every failure that was recovered from.
    """
    launch = config.launch
    if not launch.max_failures:
        return None

    def order(states: list[dict[str, Any]]) -> dict[str, Any]:
        decision = decide([_rank_state(state) for state in states], plan.branch)
        found: dict[str, Any] = {
            "action": decision.action,
            "step": decision.step,
            "sources": decision.sources,
            "leader": decision.leader,
        }
        if decision.action == "rewind":
            path, step = _newest(Path(launch.run_dir), checkpoint)
            found |= {"checkpoint": path, "step": step}
        return found

    return Recovery(order, _retries, told, launch.max_failures, launch.spares, launch.hang_s)


def _rank_state(state: dict[str, Any]) -> RankState | None:
    if state["committed"] is None:
        return None
    return RankState(state["committed"], state["prepared"], state["tended"])


def _newest(run_dir: Path, first: str) -> tuple[str, int]:
    """The newest whole checkpoint of the run, else the one that it began from: its folder and step."""
    from anabranch.runtime.checkpoint import Checkpoint, Checkpoints

    found = Checkpoints(run_dir).newest(on_bad=lambda text: None)
    if found is None:
        return (first, int(Checkpoint.open(Path(first)).position["step"])) if first else ("", 0)
    return str(found.path), int(found.position["step"])


def _retries(failure: Failure) -> bool:
    """Wrong input stays wrong."""
    if failure.exception is None:
        return True
    try:
        error = pickle.loads(failure.exception)
    except Exception:  # its module exists on the worker only
        return True
    return not isinstance(error, ConfigError | PlanError | ModelError | ClusterError)

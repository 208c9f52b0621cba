"""What workers are told: plain data, made by the driver without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from anabranch.cluster import WorkerContext
from anabranch.runtime.config import Config
from anabranch.schedulers import Cluster, Plan

Kind = Literal["train", "eval", "verify", "gross", "plan", "profile"]


@dataclass(frozen=True)
class Job:
    """A target for every launcher: called with a rank's context, it does that rank's work.

    kind: which target. plan: None where the launcher has placed the ranks already (torchrun, srun): they make it
    together. run_dir: "" where rank 0 is to choose it. checkpoint: to start from; "" for none. folder: the
    user's working directory, importable on every worker. steps: of verify, profile.
    cluster: what a plan is made for; None where the ranks tell each other where they are.
    """

    kind: Kind
    config: Config
    plan: Plan | None
    run_dir: str = ""
    checkpoint: str = ""
    folder: str = ""
    steps: int = 0
    cluster: Cluster | None = None

    def __call__(self, context: WorkerContext) -> dict[str, Any]:
        from anabranch.runtime import worker  # torch, which the driver need not wait for

        targets = {
            "train": worker.train_worker,
            "eval": worker.eval_worker,
            "verify": worker.verify_worker,
            "gross": worker.gross_worker,
            "plan": worker.plan_worker,
            "profile": worker.profile_worker,
        }
        return targets[self.kind](self, context)

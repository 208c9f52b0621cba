"""What the ranks of tests/test_profile.py run."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.convert import prepare
from anabranch.cluster import WorkerContext
from anabranch.runtime.assemble import make_data, make_network
from anabranch.runtime.config import Config
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.profile_steps import profile_steps
from anabranch.runtime.trainer import Trainer
from anabranch.schedulers import BranchPlacement, ModelSpec, Plan
from anabranch.schedulers.plan import SAMPLE, Devices

SLOW_S = 0.020
SMALL: dict[str, Any] = {
    "model": {"name": "multi_resnet", "options": {"depth": 8, "num_branches": 4}},
    "data": {"name": "digits"},
    "train": {"batch_size": 32, "bn_batch_size": 16, "epochs": 4},
}


def plan_for(model: ModelSpec, data: int, branch: int) -> Plan:
    blocks = {
        b.name: BranchPlacement.even(b.num_branches, branch) if branch > 1 else SAMPLE for b in model.blocks
    }
    return Plan(data, branch, blocks, "replicated" if branch > 1 else "sample", "sample")


def profile_on_rank(
    rank: int, world_size: int, mesh: tuple[int, int], steps: int, slow: str = "", late_s: float = 0.0,
    devices: Devices | None = None,
) -> Any:  # fmt: skip
    """This rank's profile; with `slow` the last rank sleeps in that block's branches. late_s: its clock's error.

    devices: of the plan.
    """
    config = Config.from_dict(SMALL)
    context = WorkerContext(rank, world_size, rank, "here", "cpu", 1, "", "gloo")
    data = make_data(config)
    network = prepare(make_network(config, data))
    model = spec_of(network)
    trainer = Trainer(
        network, data, config, plan=replace(plan_for(model, *mesh), devices=devices), context=context
    )
    last = rank == world_size - 1

    def sleeps(parallel: ParallelNetwork) -> None:
        if slow and last:
            ((_, block),) = branch_sums(parallel.blocks.get_submodule(slow))
            run = block.branches

            def branches(h: Any) -> Any:
                time.sleep(SLOW_S)
                return run(h)

            block.branches = branches  # type: ignore[method-assign]

    clock = (lambda: time.perf_counter() + late_s) if last else time.perf_counter
    return profile_steps(trainer, steps, on_network=sleeps, clock=clock), trainer.plan, model

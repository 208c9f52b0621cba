"""Steps of a plan on one fixed batch: what measuring and timing plans repeat."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anabranch.runtime.compiling import compile_blocks
from anabranch.runtime.config import Config
from anabranch.runtime.deal import deal_step
from anabranch.runtime.execution import how_to_run, is_ours
from anabranch.runtime.loss import LossFunction
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.regularizer import OrthogonalityPenalty
from anabranch.runtime.step import MicroBatch, TrainStep
from anabranch.schedulers import Plan


@dataclass(frozen=True)
class StepSetting:
    """What all plans have in common: x (n, C, H, W) and target (n,), the step's samples, and how they are trained."""

    x: Tensor
    target: Tensor
    config: Config
    loss: LossFunction
    penalty: OrthogonalityPenalty | None = None


class PlanStep:
    """A plan's training step, to be called again and again. `network` is consumed. how_to_run: what was chosen."""

    def __init__(self, network: nn.Module, plan: Plan, mesh: Mesh, setting: StepSetting) -> None:
        config, device = setting.config, torch.device(mesh.device_mesh.device_type)
        ours, self.device = is_ours(network), device
        parallel = parallelize(network, plan, mesh).to(device)
        num = len(setting.x)
        deals = deal_step(
            num, bn_batch_size=min(config.train.bn_batch_size, num), data=mesh.data, branch=mesh.branch,
            samples=plan.samples, accumulation=config.train.accumulation,
        )  # fmt: skip
        rows = [parallel.rank_batch(deal, num) for deal in deals]
        shape, precision = tuple(setting.x.shape[1:]), config.train.precision
        how = how_to_run(parallel, shape, rows[0], config.mesh, precision=precision, ours=ours)
        how.apply(parallel)
        if config.mesh.compile == "on":
            how = compile_blocks(parallel, how, shape, rows[0], precision=precision)
        self.how_to_run = how
        self.train = TrainStep(
            parallel, make_optimizer(config.optimizer, parallel.parameters()), setting.loss,
            precision=precision, clip_norm=config.optimizer.clip_norm, penalty=setting.penalty,
        )  # fmt: skip
        ids = torch.arange(num)
        self.batches = []
        for part in rows:
            taken = part.range_of(parallel.input_rows)
            wanted = slice(taken.start, taken.stop)
            own, group = (ids[r.start : r.stop].to(device) for r in (part.own_range, part.group_range))
            x, target = setting.x[wanted].to(device), setting.target[wanted].to(device)
            self.batches.append(MicroBatch(x, target, part.with_samples(own, group, 0)))

    def __call__(self) -> None:
        self.train.gradients(self.batches)
        self.train.apply(self.train.optimizer.param_groups[0]["lr"])

    def timed(self) -> float:
        """Seconds of one step, until the device has done it."""
        begun = time.perf_counter()
        self()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begun

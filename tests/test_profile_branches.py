"""`anabranch profile`: which of a slow rank's branches it is that the others wait for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch import distributed as dist

from anabranch.blocks import build
from anabranch.blocks.convert import prepare
from anabranch.blocks.multi_residual import MultiResidual
from anabranch.blocks.network import Network
from anabranch.cluster import WorkerContext
from anabranch.runtime.config import Config
from anabranch.runtime.deal import deal_step
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.profile_branches import branch_seconds, slowest
from anabranch.runtime.profile_build import build_profile
from anabranch.runtime.profile_steps import profile_steps
from anabranch.runtime.profile_table import lines
from anabranch.runtime.trainer import Trainer
from anabranch.schedulers import BranchPlacement, Plan
from anabranch.schedulers.costs import Batch

SLOW_S = 0.02


class Sleeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(SLOW_S)
        return x


def network(*slow: int) -> Network:
    """Two blocks of four branches; some of the second block's branches sleep. The third block is a row of two sums."""

    def branch(sleeps: bool) -> nn.Module:
        last = [Sleeps()] if sleeps else []
        return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), *last)

    def block(*slow: int) -> nn.Module:
        return MultiResidual([branch(b in slow) for b in range(4)])

    blocks = {"block1": block(), "block2": block(*slow), "block3": nn.Sequential(block(), block(1))}
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    return Network(nn.Conv2d(1, 3, 3, padding=1), {"stage1": blocks}, head, input_shape=(1, 8, 8))


def profiled(rank: int, world_size: int) -> tuple[Any, Plan, Any]:
    torch.manual_seed(0)
    config = Config.from_dict({"train": {"batch_size": 16, "bn_batch_size": 8, "epochs": 1}})
    data = [(torch.randn(1, 8, 8), i % 10) for i in range(256)]
    whole = network(3)
    model = spec_of(whole)
    blocks = {b.name: BranchPlacement.even(b.num_branches, 2) for b in model.blocks}
    plan = Plan(1, 2, blocks, "replicated", "sample")
    context = WorkerContext(rank, world_size, rank, "here", "cpu", 1, "", "gloo")
    trainer = Trainer(whole, (data, data[:16]), config, plan=plan, context=context)
    return profile_steps(trainer, 8), plan, model


def test_the_slow_branch_of_a_rank_that_holds_two_is_named() -> None:
    ranks, plan, model = run_ranks(2, profiled)[0]
    profile = build_profile(ranks, plan, model, Batch(16, 8))
    (element,) = [e for e in profile["elements"] if e["name"] == "stage1.block2"]
    assert [row["held"] for row in element["ranks"]] == [[0, 1], [2, 3]]
    fast, slow = element["ranks"][1]["branches_s"]
    assert slow - fast == pytest.approx(SLOW_S, abs=0.005)
    found = {(one["element"], one["rank"]): one for one in profile["stragglers"] if one["part"] == "forward"}
    worst = found["stage1.block2", 1]
    assert (worst["branches"], worst["branch"], worst["branches_s"]) == ([2, 3], 3, [fast, slow])
    assert found["stage1.block3", 0]["branch"] == 1  # of a row of two sums
    said = [line for line in lines(profile) if "forward of stage1.block2 (" in line]
    # noise may have rank 0 waited for there too
    (line,) = [line for line in said if line.startswith("rank 1 ")]
    assert "it holds branches 2, 3: the slowest is branch 3, 2" in line


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    plan = Plan(1, 1, {f"stage1.block{i}": BranchPlacement("sample") for i in (1, 2, 3)}, "sample", "sample")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield plan, make_mesh(1, 1)
    dist.destroy_process_group()


def test_timing_branches_changes_nothing(alone: Any) -> None:
    parallel = parallelize(prepare(network(0)), *alone)
    before = {name: tensor.clone() for name, tensor in parallel.state_dict().items()}
    rows = parallel.rank_batch(deal_step(16, bn_batch_size=8, data=1, branch=1)[0], 16)
    progress = []
    seconds = branch_seconds(parallel, (1, 8, 8), rows, "fp32", lambda *done: progress.append(done))
    assert progress == [(done, 5) for done in range(5)]  # stem, blocks, head
    assert {name: sorted(of) for name, of in seconds.items()} == {
        f"stage1.block{i}": [0, 1, 2, 3] for i in (1, 2, 3)
    }
    assert slowest(seconds["stage1.block2"]) == 0
    after = parallel.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in parallel.parameters())


def test_stacked_branches_are_not_timed(alone: Any) -> None:
    whole = build("multi_resnet", depth=8, num_branches=4)
    plan, mesh = alone
    plan = Plan(1, 1, {b.name: BranchPlacement("sample") for b in spec_of(whole).blocks}, "sample", "sample")
    parallel = parallelize(whole, plan, mesh)
    rows = parallel.rank_batch(deal_step(16, bn_batch_size=8, data=1, branch=1)[0], 16)
    assert branch_seconds(parallel, (3, 32, 32), rows, "fp32") == {}


def test_only_a_branch_that_is_clearly_slower_is_named() -> None:
    assert slowest({}) is None
    assert slowest({2: 1.0}) is None
    assert slowest({0: 1.0, 1: 1.2}) is None
    assert slowest({0: 1.0, 1: 1.3}) == 1
    assert slowest({0: 1.0, 1: 2.0, 2: 2.0, 3: 2.1}) is None

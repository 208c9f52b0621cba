"""What makes the host wait for a GPU, looked for on the CPU: numbers read from tensors, lists of indices, copies."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from parity_cases import Case, S
from ranks import run_ranks
from test_step import Run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anabranch.blocks.channels import take_groups
from anabranch.blocks.filter_basis import FilterBasis
from anabranch.blocks.gross import ChannelSumConv
from anabranch.blocks.group_series import GroupSeriesConv
from anabranch.blocks.norm import BatchNorm
from anabranch.runtime.step import StepResult


class Waits(TorchDispatchMode):
    """Counts operators for which the host waits, or that get a list of indices (which is copied to the GPU), or that
    copy one number, as `t[i] = 1.0` does."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor)
        self.num += func is torch.ops.aten.copy_.default and args[1].dim() == 0
        return func(*args, **(kwargs or {}))


class Basis(nn.Module):
    """A grouped basis of which the branches 0 and 3 are here."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = FilterBasis(8, 4, own_groups=4)
        assert self.basis.own is not None
        self.basis.own = nn.Parameter(self.basis.own[[0, 3]])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.basis(x, (0, 3))
        return y


@pytest.mark.parametrize(
    "module",
    [
        ChannelSumConv(8, 4).shard((0, 2, 5)),
        Basis(),
        GroupSeriesConv(8, 4, (3, 3), (1, 4), padding=1).shard((0, 2, 5)),
        BatchNorm(8, momentum=None).eval(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_pass_waits_for_nothing(module: nn.Module) -> None:
    x = torch.randn(2, 8, 5, 5)
    module(x)
    with Waits() as waits, mock.patch.object(torch, "tensor", side_effect=AssertionError("copied again")):
        module(x)
    assert waits.num == 0


def unused(rank: int, world_size: int) -> int:
    run = Run(Case("choice", (2, 1), (S,)))  # which uses one layer of three
    finish = run.step.reducer.finish
    waits = Waits()

    def watched() -> None:
        with waits:
            finish()

    with mock.patch.object(run.step.reducer, "finish", watched):
        run.gradients()
    return waits.num


def test_unused_parameters_are_looked_up_at_once() -> None:
    assert run_ranks(2, unused) == [0, 0]


def whole_step(rank: int, world_size: int) -> int:
    run = Run(Case("basic4", (1, 2), (S, (2, 2), (4, 0), S), trial={"precision": "fp32"}))
    gradients, waits = run.step.gradients, Waits()

    def watched(*args: Any, **options: Any) -> StepResult:
        with waits:
            return gradients(*args, **options)

    run.gradients()
    with mock.patch.object(run.step, "gradients", watched):
        run.gradients()
    return waits.num


def test_a_step_waits_for_its_sums_alone() -> None:
    assert run_ranks(2, whole_step) == [0, 0], "they are read as a list"


def test_groups_of_channels_are_taken_as_slices() -> None:
    x = torch.arange(24.0).view(2, 12)
    for groups in ([0], [1, 2], [0, 2], [0, 1, 3]):
        assert torch.equal(take_groups(x, groups, 3), x.unflatten(1, (4, 3))[:, groups].flatten(1))
    assert take_groups(x, [1, 2], 3).data_ptr() == x[:, 3:].data_ptr(), "a view"

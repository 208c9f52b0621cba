"""The training step: the reduction, replicas that stay equal, losses, clipping, learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_cases import Case, Choice, S, seeded, verify
from ranks import run_ranks
from torch import Tensor
from torch.nn import functional as F

from anabranch.runtime import exchange
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.checksum import ReplicaError, check_replicas, checksum
from anabranch.runtime.config import LrScheduleConfig
from anabranch.runtime.deal import deal_step
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.keyed_state import held_elsewhere_too
from anabranch.runtime.loss import cross_entropy, step_share
from anabranch.runtime.lr_schedule import learning_rate
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.optimizer import clip_gradients, make_optimizer
from anabranch.runtime.parallel_network import ParallelNetwork, parallelize
from anabranch.runtime.reducer import GradientReducer
from anabranch.runtime.step import StepResult, TrainStep
from anabranch.runtime.verify import micro_batches


class Run:
    """A case set up on this rank, to be stepped by hand."""

    def __init__(self, case: Case) -> None:
        self.trial, self.plan, self.mesh = case.made_trial(), case.plan(), make_mesh(*case.mesh)
        dtype = torch.float64 if self.trial.precision == "fp64" else torch.float32
        self.network: ParallelNetwork = parallelize(seeded(case.network).to(dtype), self.plan, self.mesh)
        optimizer = make_optimizer(self.trial.optimizer, self.network.parameters())
        self.step = TrainStep(self.network, optimizer, self.trial.loss)

    def gradients(self, index: int = 0, *, stop: bool = False) -> StepResult:
        ids = torch.arange(self.trial.batch_size)
        deals = deal_step(
            len(ids),
            bn_batch_size=self.trial.bn_batch_size,
            data=self.mesh.data,
            branch=self.mesh.branch,
            samples=self.plan.samples,
        )
        batches = micro_batches(self.network, self.trial, ids, deals, index, "cpu")
        return self.step.gradients(batches, stop=stop)


# ---- replicas


def trained(rank: int, world_size: int, case: Case) -> dict[str, int]:
    run = Run(case)
    for index in range(200):
        run.gradients(index)
        run.step.apply(0.01)
    return {key: checksum(t.contiguous()) for key, t in held_elsewhere_too(run.network).items()}


@pytest.mark.timeout(300)
def test_replicas_are_the_same_bits_after_200_steps() -> None:
    case = Case("tuple", (2, 2), ((2, 1), S), "sr", trial={"precision": "fp32", "batch_size": 8})
    sums = run_ranks(4, trained, case)
    check_replicas(dict(enumerate(sums)))
    of_all = set.intersection(*map(set, sums))
    assert len(of_all) >= 10
    assert all(sums[0].keys() == other.keys() for other in sums[2::2])  # 0 and 2 hold the same branches
    assert set(sums[0]) - of_all


def planted(
    rank: int, world_size: int, case: Case, plant: list[tuple[str, int]], run_dir: Path
) -> tuple[str, list[str]]:
    """What the save after the next raises, and `on_failure` is told, once copies differ."""
    run, told = Run(case), list[str]()
    checkpoints = Checkpoints(run_dir, on_failure=told.append)

    def save(step: int) -> None:
        where = {"step": step}
        checkpoints.save(run.network, run.step.optimizer, position=where, config_toml="", plan_toml="")

    save(1)
    tensors = {**dict(run.network.named_parameters()), **dict(run.network.named_buffers())}
    for name, where in plant:  # the smallest change there is
        if where == rank:
            flat = tensors[name].detach().view(-1)
            flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1) if flat.is_floating_point() else flat[-1] + 1
    save(2)  # the first was whole
    with pytest.raises(ReplicaError) as caught:
        save(3)
    return str(caught.value), told


def test_copies_that_differ_are_named_and_not_saved(tmp_path: Path) -> None:
    case = Case("basic4", (2, 2), ((3, 1),), "rr", trial={"precision": "fp32"})
    stacked = "blocks.stage2.block1.convs.1.weight"  # rank 3's: the one branch of the second branch rank
    plants = {
        "head": ([("head.fc.weight", 2)], ["head.fc.weight (ranks [0, 1, 3] against [2])"]),
        "branch": ([(stacked, 3)], [f"{stacked}@3 (ranks [1] against [3])"]),
        "buffers": (
            [("head.norm.running_var", 0), ("head.norm.num_batches_tracked", 1)],
            ["head.norm.running_var (ranks [1, 2, 3] against [0])",
             "head.norm.num_batches_tracked (ranks [0, 2, 3] against [1])"],
        ),
    }  # fmt: skip
    for name, (plant, said) in plants.items():
        first, *others = run_ranks(4, planted, case, plant, tmp_path / name)
        message, told = first
        assert all(text in message for text in [*said, "last checkpoint"])
        assert len(told) == 1
        assert "step-000002 is not saved, the checkpoint before it stays" in told[0]
        assert others == [(message, [])] * 3
        newest = Checkpoints(tmp_path / name).newest()
        assert newest is not None
        assert newest.position == {"step": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_checksum_sees_value_and_order(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    other = x.clone()
    other[0, 0] = 0
    assert checksum(x) == checksum(x.clone())
    assert checksum(x) != checksum(other)
    assert checksum(x) != checksum(x.flip(1))
    assert checksum(x[:0]) == 0
    assert checksum(x[0, 0]) != checksum(x[0, 1])


# ---- the reduction


def observed(rank: int, world_size: int) -> list[str]:
    """What happens in a step, in order: all-reduces of gradients (by size of the buffer) and the end of backward."""
    run = Run(Case("basic4", (2, 1), (S,)))
    run.step.reducer = GradientReducer(
        run.network, num_extra=len(run.step.reducer.extra), bucket_bytes=20_000
    )
    sizes = {id(bucket.buffer): index for index, bucket in enumerate(run.step.reducer._buckets)}
    events: list[str] = []
    all_reduce, finish = exchange.all_reduce, run.step.reducer.finish

    def seen(tensor: Tensor, *args: Any, **options: Any) -> Any:
        if id(tensor) in sizes:
            events.append(f"bucket {sizes[id(tensor)]}")
        return all_reduce(tensor, *args, **options)

    def finished() -> None:
        events.append("backward is over")
        finish()

    exchange.all_reduce = seen  # type: ignore[assignment]
    run.step.reducer.finish = finished  # type: ignore[method-assign]
    try:
        run.gradients()
    finally:
        exchange.all_reduce = all_reduce
    return events


def test_buckets_leave_during_backward_in_their_order() -> None:
    first, second = run_ranks(2, observed)
    assert first == second
    buckets = [event for event in first if event.startswith("bucket")]
    assert len(buckets) > 4
    assert buckets == [f"bucket {index}" for index in range(len(buckets))]
    assert first.index("backward is over") >= len(buckets) - 2, first


def unused(rank: int, world_size: int) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """By parameter, the gradient of this rank's samples and the reduced one, after two steps."""
    run = Run(Case("choice", (2, 1), (S,)))
    (choice,) = (module for module in run.network.modules() if isinstance(module, Choice))
    choice.used = ["all", "one"] if rank == 1 else ["all"]
    local: dict[str, Tensor] = {}
    for name, parameter in run.network.named_parameters():
        parameter.register_hook(lambda grad, name=name: local.update({name: grad.clone()}))
    for _ in range(2):  # nothing of the first may linger
        run.step.reducer.discard()
        local.clear()
        run.gradients()
    return {name: (local.get(name), p.grad) for name, p in run.network.named_parameters()}


def test_unused_parameters_keep_none_and_used_anywhere_are_reduced() -> None:
    first, second = run_ranks(2, unused)
    for name, (local, reduced) in first.items():
        others_local, others_reduced = second[name]
        parts = [part for part in (local, others_local) if part is not None]
        if ".none." in name:
            assert parts == [None] * 0
            assert reduced is None
            assert others_reduced is None
        else:
            assert len(parts) == (1 if ".one." in name else 2)
            assert torch.equal(reduced, others_reduced)
            torch.testing.assert_close(reduced, torch.stack(parts).sum(0), rtol=0, atol=1e-15)
            assert reduced.any()


def other_order(rank: int, world_size: int) -> dict[str, Tensor]:
    """Rank 1 uses the layers the other way round: its gradients are ready in another order."""
    run = Run(Case("choice", (2, 1), (S,)))
    run.step.reducer = GradientReducer(run.network, num_extra=len(run.step.reducer.extra), bucket_bytes=1)
    (choice,) = (module for module in run.network.modules() if isinstance(module, Choice))
    choice.used = ["all", "one", "none"] if rank == 0 else ["none", "one", "all"]
    run.gradients()
    return {name: p.grad for name, p in run.network.named_parameters() if p.grad is not None}


def test_the_order_of_buckets_is_fixed_whatever_is_ready_first() -> None:
    first, second = run_ranks(2, other_order)
    assert len(first) == 8
    for name, grad in first.items():
        assert torch.equal(grad, second[name]), name


def reported_again(rank: int, world_size: int) -> str:
    run = Run(Case("choice", (2, 1), (S,)))
    reducer = GradientReducer(run.network, num_extra=len(run.step.reducer.extra), bucket_bytes=1)
    (parameter,) = reducer._buckets[0].parameters
    reducer.arm()
    reducer._on_ready(parameter)
    with pytest.raises(RuntimeError) as caught:
        reducer._on_ready(parameter)
    reducer.finish()
    return str(caught.value)


def test_a_gradient_that_comes_after_its_bucket_left_is_an_error() -> None:
    for message in run_ranks(2, reported_again):
        assert message.startswith("head.3.bias has another gradient"), message
        assert "mesh.overlap" in message


# ---- a step's result


def result(rank: int, world_size: int, case: Case) -> tuple[float, float, bool, bool]:
    run = Run(case)
    stopped = run.gradients(stop=rank == world_size - 1).stop
    run.step.reducer.discard()
    found = run.gradients()
    return found.loss, found.num_correct, found.stop, stopped


@pytest.mark.parametrize(
    "case",
    [
        Case("basic4", (1, 2), ((2, 2),), "rr"),
        Case("basic4", (1, 2), ((4, 0), S, S, (1, 3)), "ss"),
        Case("basic4", (2, 1), (S,), "ss", samples=(3, 1)),
    ],
    ids=lambda case: case.id,
)
def test_loss_hits_and_stop_are_of_the_whole_step(case: Case) -> None:
    (alone,) = run_ranks(1, result, Case("basic4", (1, 1), (S,)))
    found = run_ranks(2, result, case)
    assert found[0] == found[1]
    assert found[0] == (pytest.approx(alone[0], abs=1e-12), pytest.approx(alone[1]), False, True)
    assert alone[1] == int(alone[1])


def norms(rank: int, world_size: int, case: Case) -> list[float]:
    run = Run(case)
    run.gradients()
    return [float(clip_gradients(run.network, limit)) for limit in (1e9, 0.1, 1e9)]


def test_the_gradient_norm_counts_every_parameter_once() -> None:
    (alone,) = run_ranks(1, norms, Case("basic4", (1, 1), (S,)))
    assert alone[0] > 0.2
    assert alone[2] == pytest.approx(0.1, rel=1e-4)
    for case in (
        Case("basic4", (1, 2), ((3, 1),), "rr"),
        Case("basic4", (1, 2), ((4, 0), S, S, (1, 3)), "ss"),
    ):
        assert all(found == pytest.approx(alone, rel=1e-10) for found in run_ranks(2, norms, case))


# ---- losses


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def losses(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    found = []
    for loss in (mean_loss, cross_entropy()):
        run = Run(Case("basic4", (1, 2), (S, (3, 1), S, (2, 2)), "ss"))
        run.step.loss = loss
        for index in range(3):
            run.gradients(index)
            run.step.apply(0.1)
        found.append({name: p.detach().clone() for name, p in run.network.named_parameters()})
    return found


def test_a_loss_may_be_the_mean_or_one_value_a_sample() -> None:
    for mean, each in run_ranks(2, losses):
        for name, parameter in mean.items():
            torch.testing.assert_close(parameter, each[name], rtol=0, atol=1e-13)


def test_a_loss_of_another_shape_is_refused() -> None:
    output, target = torch.randn(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(ConfigError, match=r"shape \(2,\) for 3 samples: return one value a sample"):
        step_share(lambda output, target: output.sum(1)[:2], output, target, 3)


def test_label_smoothing_is_torchs() -> None:
    output, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    share = step_share(cross_entropy(0.2), output, target, 8)
    assert float(share) == pytest.approx(float(F.cross_entropy(output, target, label_smoothing=0.2)) / 2)
    empty = torch.zeros(0, 5, requires_grad=True)
    step_share(cross_entropy(), empty, target[:0], 8).backward()
    assert empty.grad is not None


# ---- learning rates


@pytest.mark.parametrize(
    ("schedule", "rates"),  # 10 steps an epoch, 100 in all, peak 2
    [
        (LrScheduleConfig("constant", warmup_epochs=0), {0: 2.0, 99: 2.0}),
        (LrScheduleConfig("constant", warmup_epochs=1), {0: 0.2, 8: 1.8, 9: 2.0, 10: 2.0}),
        (LrScheduleConfig("constant", warmup_epochs=0.5), {0: 0.4, 4: 2.0, 5: 2.0}),
        (
            LrScheduleConfig("step", milestones=(2, 5), factor=0.1, warmup_epochs=0),
            {0: 2.0, 19: 2.0, 20: 0.2, 49: 0.2, 50: 0.02, 99: 0.02},
        ),
        (
            LrScheduleConfig("step", milestones=(0, 1), factor=0.5, warmup_epochs=2),
            {0: 0.05, 9: 0.5, 10: 0.275, 19: 0.5},
        ),
        (LrScheduleConfig("cosine", warmup_epochs=0), {0: 2.0, 25: 1 + 0.5**0.5, 50: 1.0, 100: 0.0}),
        (LrScheduleConfig("cosine", warmup_epochs=2), {0: 0.1, 19: 2.0, 20: 2.0, 60: 1.0, 100: 0.0}),
        (LrScheduleConfig("cosine", warmup_epochs=0, final_factor=0.1), {0: 2.0, 50: 1.1, 100: 0.2}),
    ],
)
def test_learning_rates(schedule: LrScheduleConfig, rates: dict[int, float]) -> None:
    for step, rate in rates.items():
        assert learning_rate(schedule, 2.0, step, 10, 100) == pytest.approx(rate, abs=1e-12), step


# ---- the verifier itself


def diverged(rank: int, world_size: int) -> float:
    report = verify(Case("tuple", (1, 2), ((2, 1), S), trial={"optimizer": {"lr": 1e200}}))
    return report.max_relative_difference


def one_nan(rank: int, world_size: int) -> dict[str, float]:
    def plant(network: ParallelNetwork) -> None:  # in the last branch of a rank; training does not read it
        network.get_buffer("blocks.stage1.block1.norms.0.running_mean")[-1] = torch.nan

    return verify(Case("basic4", (1, 2), ((2, 2),), "rr"), plant).by_kind


def test_what_is_not_a_number_does_not_pass_as_equal() -> None:
    assert run_ranks(2, diverged) == [float("inf")] * 2
    for by_kind in run_ranks(2, one_nan):
        assert by_kind["statistic"] == float("inf")
        assert by_kind["gradient"] < 1e-9

"""Whether a plan computes the function of the one-device network: both train some steps on the same samples.

After every step the loss and every gradient are compared, at the end every parameter's *change* and every
running statistic. Rank 0 also runs the reference and sends its tensors round; each rank compares
what it holds, so a copy that differs on one rank only is found too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.blocks.convert import prepare
from anabranch.blocks.random import fold
from anabranch.runtime.branch_state import by_branch
from anabranch.runtime.compiling import compile_blocks
from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.deal import Deal, deal_step
from anabranch.runtime.execution import how_to_run, is_ours
from anabranch.runtime.loss import LossFunction, cross_entropy
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.numerics import is_exact
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import ParallelNetwork, branch_tensors, parallelize
from anabranch.runtime.reference import ReferenceStep
from anabranch.runtime.regularizer import OrthogonalityPenalty
from anabranch.runtime.step import MicroBatch, TrainStep
from anabranch.schedulers import Plan

_Tensors = Mapping[str, Tensor | None]
_BUNDLE = 2**22  # numbers that travel together


@dataclass(frozen=True)
class Trial:
    """What is trained: samples x with targets, in order, in batches; a short last batch is a step too.

    Same meaning as the configuration's fields of these names. steps: how many of the batches, None for all.
    """

    x: Tensor
    target: Tensor
    batch_size: int
    bn_batch_size: int
    accumulation: int = 1
    steps: int | None = None
    seed: int = 0
    precision: str = "fp32"
    execution: str = "fused"
    loss: LossFunction = field(default_factory=cross_entropy)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    penalty: OrthogonalityPenalty | None = None
    memory_format: str = "contiguous"
    wire: str = "fp32"
    overlap: str = "off"
    recompute: bool = False
    chunks: int = 1
    compile: str = "off"


@dataclass(frozen=True)
class Report:
    """max_relative_difference: of all tensors; worst: which one. by_kind: loss, gradient, change, statistic.

    A tensor's relative difference is max|a−b| ÷ max(max|b|, 1e-4 × the largest max|·| among tensors of its
    kind). Where not all is float64, roots of mean squares take the place of these maxima and 1e-2 that of 1e-4:
    an element's rounding may be as large as the element (a ReLU's gate turns out otherwise), and what cancels
    (the gradient of a bias before BatchNorm) is rounding alone.
    """

    max_relative_difference: float
    worst: str
    by_kind: dict[str, float]
    num_compared: int


def verify_plan(
    network: nn.Module,
    plan: Plan,
    mesh: Mesh,
    trial: Trial,
    *,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda step, num_steps: None,
    sabotage: Callable[[ParallelNetwork], None] = lambda network: None,
) -> Report:
    """Trains `network` under the plan and on one device, and compares. Every rank calls it with the same
    network.

    on_step(step, num_steps) is told before each step. sabotage: changes the parallel form before training;
    tests use it to show that a defect is found. The same report is returned on every rank.
    """
    prepare(network)
    dtype = torch.float64 if trial.precision == "fp64" else torch.float32
    network.to(dtype)
    like = copy.deepcopy(network).to("meta")
    reference = _reference(copy.deepcopy(network), trial, device) if mesh.rank == 0 else None
    ours = is_ours(network)
    parallel = parallelize(network, plan, mesh).to(device)
    (deal, *_) = deal_step(
        min(trial.batch_size, len(trial.x)), bn_batch_size=trial.bn_batch_size, data=mesh.data, branch=mesh.branch,
        samples=plan.samples, accumulation=trial.accumulation,
    )  # fmt: skip
    shape, rows = tuple(trial.x.shape[1:]), parallel.rank_batch(deal, trial.batch_size)
    how = how_to_run(parallel, shape, rows, trial, precision=trial.precision, ours=ours)
    how.apply(parallel)
    if trial.compile == "on":
        compile_blocks(parallel, how, shape, rows, precision=trial.precision)
    sabotage(parallel)
    optimizer = make_optimizer(trial.optimizer, parallel.parameters())
    step = TrainStep(
        parallel,
        optimizer,
        trial.loss,
        precision=trial.precision,
        clip_norm=trial.optimizer.clip_norm,
        penalty=trial.penalty,
    )
    measure = _EXACT if is_exact(trial.precision, trial.wire) else _ROUNDED
    compare = _Comparison(like, parallel, mesh, device, measure)
    before = {n: p.detach().clone() for n, p in parallel.named_parameters()}
    ref_before = {n: p.detach().clone() for n, p in reference.network.named_parameters()} if reference else {}
    num_batches = -(-len(trial.x) // trial.batch_size)
    steps = num_batches if trial.steps is None else trial.steps
    for index in range(steps):
        on_step(index, steps)
        start = index % num_batches * trial.batch_size
        ids = torch.arange(start, min(start + trial.batch_size, len(trial.x)))
        key = fold(trial.seed, index)
        deals = deal_step(
            len(ids), bn_batch_size=trial.bn_batch_size, data=mesh.data, branch=mesh.branch,
            samples=plan.samples, accumulation=trial.accumulation,
        )  # fmt: skip
        loss = 0.0
        if reference is not None:
            x, target = trial.x[ids].to(device, dtype), trial.target[ids].to(device)
            loss = reference.gradients(x, target, ids.to(device), deals, key)
        result = step.gradients(micro_batches(parallel, trial, ids, deals, key, device))
        compare.scalar("loss", f"loss of step {index}", loss, result.loss)
        ref_grads = {n: p.grad for n, p in reference.network.named_parameters()} if reference else {}
        grads = {n: p.grad for n, p in parallel.named_parameters()}
        compare.tensors("gradient", f" (step {index})", ref_grads, grads)
        step.apply(trial.optimizer.lr)
        if reference is not None:
            reference.apply(trial.optimizer.lr)
    changes = {n: p.detach() - before[n] for n, p in parallel.named_parameters()}
    if reference is not None:
        ref_changes = {n: p.detach() - ref_before[n] for n, p in reference.network.named_parameters()}
        ref_buffers = dict(reference.network.named_buffers())
    else:
        ref_changes, ref_buffers = {}, {}
    compare.tensors("change", "", ref_changes, changes)
    compare.tensors("statistic", "", ref_buffers, dict(parallel.named_buffers()))
    return compare.report()


def micro_batches(
    network: ParallelNetwork, trial: Trial, ids: Tensor, deals: list[Deal], key: int, device: str
) -> list[MicroBatch]:
    """This rank's micro-batches of the step over samples `ids`."""
    dtype = next(network.parameters()).dtype
    batches = []
    for deal in deals:
        rows = network.rank_batch(deal, len(ids))
        own, group = (ids[r.start : r.stop].to(device) for r in (rows.own_range, rows.group_range))
        rows = rows.with_samples(own, group, key)
        wanted = ids[rows.range_of(network.input_rows).start : rows.range_of(network.input_rows).stop]
        batches.append(MicroBatch(trial.x[wanted].to(device, dtype), trial.target[wanted].to(device), rows))
    return batches


def _reference(network: nn.Module, trial: Trial, device: str) -> ReferenceStep:
    network.to(device)
    optimizer = make_optimizer(trial.optimizer, network.parameters())
    return ReferenceStep(
        network,
        optimizer,
        trial.loss,
        precision=trial.precision,
        clip_norm=trial.optimizer.clip_norm,
        penalty=trial.penalty,
    )


@dataclass(frozen=True)
class _Measure:
    """size: of a tensor, one number. small: tensors this much smaller than the largest of their kind are measured
    against that."""

    size: Callable[[Tensor], Tensor]
    small: float


_EXACT = _Measure(lambda t: t.abs().max(), 1e-4)
_ROUNDED = _Measure(lambda t: t.square().mean().sqrt(), 1e-2)


@dataclass
class _Difference:
    kind: str
    name: str
    difference: float  # the size of a-b, the largest over all ranks
    size: float  # that of b


class _Comparison:
    """Collects differences; every rank calls its methods in the same order."""

    def __init__(
        self, like: nn.Module, parallel: ParallelNetwork, mesh: Mesh, device: str, measure: _Measure
    ) -> None:
        self.measure = measure
        self.like: dict[str, Tensor] = {**dict(like.named_parameters()), **dict(like.named_buffers())}
        self.whole, self.local = branch_tensors(like), branch_tensors(parallel)
        self.mesh, self.device = mesh, device
        self.found: list[_Difference] = []

    def scalar(self, kind: str, name: str, reference: float, mine: float) -> None:
        value = torch.tensor(reference, dtype=torch.float64, device=self.device)
        dist.broadcast(value, 0)
        self._add(kind, name, abs(mine - float(value)), abs(float(value)))

    def tensors(self, kind: str, suffix: str, reference: _Tensors, mine: _Tensors) -> None:
        names = [n for n, t in self.like.items() if (isinstance(t, nn.Parameter)) == (kind != "statistic")]
        present = torch.tensor([reference.get(name) is not None for name in names], device=self.device)
        dist.broadcast(present, 0)
        used = [name for name, is_used in zip(names, present.tolist(), strict=True) if is_used]
        for name in (name for name in names if name not in used):  # in one order on all ranks
            self._add(kind, name + suffix, 0.0 if self._is_zero(mine.get(name)) else math.inf, 0.0)
        for some in self._bundles(used):
            sizes = [self.like[name].numel() for name in some]
            bundle = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
            for name, part in zip(some, bundle.split(sizes), strict=True):
                if (theirs := reference.get(name)) is not None:
                    part.copy_(theirs.detach().reshape(-1))
            dist.broadcast(bundle, 0)
            for name, part in zip(some, bundle.split(sizes), strict=True):
                size = float(self.measure.size(part)) if part.numel() else 0.0
                whole = part.view(self.like[name].shape)
                self._add(kind, name + suffix, self._difference(name, whole, mine), size)

    def _bundles(self, names: list[str]) -> list[list[str]]:
        bundles: list[list[str]] = []
        held = _BUNDLE
        for name in names:
            if held >= _BUNDLE:
                bundles, held = [*bundles, []], 0
            bundles[-1].append(name)
            held += self.like[name].numel()
        return bundles

    @staticmethod
    def _is_zero(value: Tensor | None) -> bool:
        return value is None or not bool(value.any())

    def _difference(self, name: str, whole: Tensor, mine: _Tensors) -> float:
        owner = self.local.get(name)
        if name not in mine or (owner is not None and not owner.held):  # other ranks' branches
            return 0.0
        value = mine[name]
        if value is None:
            return math.inf
        expected = by_branch(name, whole, self.whole)
        held = by_branch(name, value.detach().to(torch.float64), self.local)
        differences = [self.measure.size(part - expected[k]) for k, part in held.items() if part.numel()]
        return float(torch.stack(differences).max()) if differences else 0.0  # Python's max would lose a NaN

    def _add(self, kind: str, name: str, difference: float, size: float) -> None:
        size = size if math.isfinite(size) else 0.0
        self.found.append(_Difference(kind, name, math.inf if math.isnan(difference) else difference, size))

    def report(self) -> Report:
        values = torch.tensor([d.difference for d in self.found], dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        found = [replace(d, difference=v) for d, v in zip(self.found, values.tolist(), strict=True)]
        largest: dict[str, float] = {}
        for d in found:
            largest[d.kind] = max(largest.get(d.kind, 0.0), d.size)
        small = self.measure.small
        relative = [(d.difference / max(d.size, small * largest[d.kind], 1e-300), d) for d in found]
        worst, where = max(relative, key=lambda pair: pair[0])
        by_kind = {kind: max(r for r, d in relative if d.kind == kind) for kind in largest}
        name = where.name if where.kind == "loss" else f"{where.kind} of {where.name}"
        return Report(worst, name, by_kind, len(found))

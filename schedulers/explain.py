"""When which split pays: plain rows, computed from `predict`'s prices, for a person to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from anabranch.schedulers.cluster import Cluster, Link
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.layout import make_layout
from anabranch.schedulers.plan import SAMPLE, BranchPlacement, Plan
from anabranch.schedulers.predict import Predictor
from anabranch.schedulers.request import Request


@dataclass(frozen=True)
class StageRow:
    """One stage (blocks up to the last dot of their names), all else as in the plan.

    sample_s, branch_s: predicted step times with the stage split so. break_even_batch: samples of a step from
    which "sample" pays (0: always; None: not up to 64 times the batch). needed_bytes_per_s, most_bytes_per_s: of
    the branch groups' link, from which and up to which "branch" pays at this batch (0: from the lowest, None: up
    to the highest; None, None: at none). At low ones alone it pays where the gradients that it saves outweigh
    activations.
    """

    stage: str
    blocks: tuple[str, ...]
    split: str
    sample_s: float
    branch_s: float
    break_even_batch: int | None
    needed_bytes_per_s: float | None
    most_bytes_per_s: float | None


def explain(plan: Plan, request: Request) -> list[StageRow]:
    """A row for each stage of a plan with several branch ranks; none for one. Raises PlanError without costs."""
    if request.costs is None or request.batch is None:
        raise PlanError("nothing to explain without costs and a batch: measure first, or give a cost file")
    if plan.branch == 1:
        return []
    stages: dict[str, list[str]] = {}
    for name in plan.blocks:
        stages.setdefault(name.rpartition(".")[0] or name, []).append(name)
    rows = []
    for stage, names in stages.items():
        by_sample, by_branch = (_with(plan, request, names, split) for split in ("sample", "branch"))
        if by_branch is None or by_sample is None:
            continue
        splits = {plan.blocks[name].split for name in names}

        def gain(costs: Costs, cluster: Cluster, batch: Batch, pair: tuple[Plan, Plan]) -> float:
            """Seconds that "branch" saves."""
            predict = Predictor(request.model, cluster, costs, batch)
            return predict(pair[0]).total_s - predict(pair[1]).total_s

        pair = (by_sample, by_branch)
        predict = Predictor(request.model, request.cluster, request.costs, request.batch)
        rows.append(
            StageRow(
                stage,
                tuple(names),
                splits.pop() if len(splits) == 1 else "mixed",
                predict(by_sample).total_s,
                predict(by_branch).total_s,
                _break_even(request, pair, gain),
                *_needed(request, pair, gain),
            )
        )
    return rows


_BANDWIDTHS = 1e3, 1e13  # bytes a second: the lowest and highest looked at
_LATENCY_S = 1e-5  # of a link of which nothing is known
_Gain = Callable[[Costs, Cluster, Batch, tuple[Plan, Plan]], float]


def _with(plan: Plan, request: Request, names: list[str], split: str) -> Plan | None:
    """The plan with a stage split so, and what shares its parameters; None where these cannot be."""
    tied = [unit for unit in request.model.units if {*unit} & {*names}]
    together = {name for unit in tied for name in unit}
    blocks, edges = dict(plan.blocks), {"stem": plan.stem, "head": plan.head}
    for name in together:
        if name in edges:
            if split == "branch":
                return None
            edges[name] = "sample"
        elif split == "sample":
            blocks[name] = SAMPLE
        elif blocks[name].branches is None:
            blocks[name] = BranchPlacement.even(request.model.by_name[name].num_branches, plan.branch)
    changed = replace(plan, blocks=blocks, stem=edges["stem"], head=edges["head"])
    try:
        changed.check(request.model)
    except PlanError:  # unequal numbers of branches that share a parameter
        return None
    return changed


def _break_even(request: Request, pair: tuple[Plan, Plan], gain: _Gain) -> int | None:
    assert request.costs is not None
    assert request.batch is not None
    batch, num_groups = request.batch, -(-request.batch.num_samples // request.batch.bn_batch_size)

    def pays(group: int) -> bool:  # the same number of BN groups, each of more samples
        sized = replace(batch, num_samples=group * num_groups, bn_batch_size=group)
        assert request.costs is not None
        return gain(request.costs, request.cluster, sized, pair) <= 0

    if pays(1):
        return 0
    low, high = 1, 1
    while not pays(high):
        low, high = high, 2 * high
        if high > 64 * batch.bn_batch_size:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high * num_groups


def _needed(request: Request, pair: tuple[Plan, Plan], gain: _Gain) -> tuple[float | None, float | None]:
    """Bandwidths from which and up to which "branch" pays: that of the branch groups' link varies, alone.

    By closed form: that link's measured groups are left out, its latency is kept.
    """
    assert request.costs is not None
    assert request.batch is not None
    costs, batch, cluster = request.costs, request.batch, request.cluster
    across = make_layout(pair[0].devices or (), cluster, batch, pair[0].samples).branch_group.across
    costs = replace(costs, groups=tuple(group for group in costs.groups if group.across != across))
    known = cluster.across if across else cluster.local
    link = known or Link(_LATENCY_S, 0.0)

    def pays(bandwidth: float) -> bool:
        changed = replace(link, bandwidth_bytes_per_s=bandwidth)
        where = replace(cluster, across=changed) if across else replace(cluster, local=changed)
        return gain(costs, where, batch, pair) > 0

    low, high = _BANDWIDTHS
    at_low, at_high = pays(low), pays(high)
    if at_low == at_high:
        return (0.0, None) if at_low else (None, None)
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if pays(middle) == at_low else (low, middle)
    return (0.0, low) if at_low else (high, None)

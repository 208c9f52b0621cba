"""Steps of one plan, seen element by element; and the plans that together show every element as any plan runs it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn

from anabranch.runtime.live_memory import LiveMemory
from anabranch.runtime.measure_elements import Seen
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.plan_step import PlanStep, StepSetting
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.recorder import PARTS, Span
from anabranch.schedulers import BranchPlacement, ModelSpec, Plan
from anabranch.schedulers.model_spec import EDGES
from anabranch.schedulers.plan import SAMPLE, EdgeSplit

WARM_UP = 2  # steps before measuring
_SUMS = ("world_sum", "data_sum")  # BatchNorm's statistics: a part of what an element takes
_MAX_COUNTS = 8  # numbers of branches, or unequal ones, measured one by one; of more, a spread


class Trial:
    """Steps of one plan on this rank, detailed, gradients reduced after the backward. Collective."""

    def __init__(self, network: nn.Module, plan: Plan, mesh: Mesh, setting: StepSetting) -> None:
        self.plan, self.mesh = plan, mesh
        self.step = PlanStep(network, plan, mesh, setting)
        self.parallel = self.step.train.network
        self.step.train.reducer.overlap = False
        for _ in range(WARM_UP):
            self.once_s = self.step.timed()
        self.memory, updating = _memory(self.step)
        self.num_bytes = sum(p.numel() * p.element_size() for p in self.parallel.parameters()) or 1
        self.update_copies = updating / self.num_bytes
        self.spans: list[list[Span]] = []
        self.rest: list[float] = []
        self.optimizer: list[float] = []

    def run(self) -> None:
        """One step more."""
        recorder = self.parallel.recorder
        recorder.detailed = True
        dist.barrier(self.mesh.world_group)
        recorder.end_step()
        self.step()
        recorder.detailed = False
        self.spans.append(recorder.spans())
        times = dict(zip(PARTS, recorder.times(), strict=True))
        inside = sum(span.end - span.start for span in self.spans[-1] if span.element and not span.op)
        self.rest.append(max(times["step"] - inside - times["reduction"] - times["optimizer"], 0.0))
        self.optimizer.append(times["optimizer"])

    def seen(self) -> Iterator[Seen]:
        """What each element took on this rank: medians over the steps, exchanges apart."""
        sums: dict[tuple[str, str], list[float]] = defaultdict(list)
        of_sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(self.spans))
        for step, spans in enumerate(self.spans):
            once: dict[tuple[str, str], float] = defaultdict(float)
            for span in spans:
                if span.element:
                    once[span.part, span.element] += (span.end - span.start) * (-1 if span.op else 1)
                if span.op in _SUMS:
                    of_sums[span.part, span.element][step] += span.end - span.start
            for key, seconds in once.items():
                sums[key].append(seconds)
        whole = {part: self._whole_s(part, sums) for part in ("forward", "backward")}
        times = len(self.step.batches)
        for name, _, rows in self.parallel.elements():
            samples = max(sum(batch.rows.layout_of(rows).group_sizes) for batch in self.step.batches)
            placed = self.plan.blocks.get(name)
            held = placed.branches[self.mesh.branch_rank] if placed and placed.branches else None
            forward, backward = (
                whole[part] * statistics.median(sums.get((part, name), [0.0])) / times
                for part in ("forward", "backward")
            )
            in_sums = (statistics.median(of_sums[part, name]) / times for part in ("forward", "backward"))
            yield Seen(
                name, samples, held, max(forward, 0.0), max(backward, 0.0), *self.memory[name], *in_sums
            )

    @staticmethod
    def _whole_s(part: str, sums: dict[tuple[str, str], list[float]]) -> float:
        """What medians of elements must be multiplied by to add up to the median of all of them together.

        Delays are rare and long: each element's median leaves out its own, a step has those of all elements.
        """
        of_part = [seconds for (which, _), seconds in sums.items() if which == part]
        parts = sum(map(statistics.median, of_part))
        return statistics.median(map(sum, zip(*of_part, strict=True))) / parts if parts > 0 else 1.0

    @property
    def is_even(self) -> bool:
        """Whether all ranks have equally much to do."""
        placed = [p.branches for p in self.plan.blocks.values() if p.branches]
        return all(len({*map(len, branches)}) == 1 for branches in placed)

    def exchanges(self, *, alike: bool) -> Iterator[tuple[int, float]]:
        """(bytes, seconds) of all branch groups' all-reduces. alike: whether all ranks are equally fast.

        Where all take equally long for what they have to do the mean over a group's ranks: that they wait for one
        another by turns is part of what an exchange costs. Else the shortest rank's, which waited for none.
        """
        of_group = statistics.mean if alike and self.is_even else min
        mine = [
            [(span.num_bytes, span.end - span.start) for span in spans if span.op == "all_reduce"]
            for spans in self.spans
        ]
        everyone = gather_json(mine, next(self.parallel.parameters()).device)
        branch = self.mesh.branch
        for first in range(0, len(everyone), branch):
            for of_ranks in zip(*everyone[first : first + branch], strict=True):
                for same in zip(*of_ranks, strict=True):
                    yield same[0][0], of_group([seconds for _, seconds in same])


def trial_plans(spec: ModelSpec, unequal: frozenset[str], world: int) -> Iterator[Plan]:
    """Plans of the reduced network: every element on own samples, then blocks with their branches on one rank or more.

    Together they show each number of alike branches, and what each of unequal ones (`unequal`: their blocks) takes.
    Blocks that share a parameter are placed as one, with stem or head or another number of branches split "sample".
    """
    yield Plan(world, 1, {block.name: SAMPLE for block in spec.blocks}, "sample", "sample")
    most = max(block.num_branches for block in spec.blocks)
    for branch in range(2, world + 1):
        if world % branch:
            continue
        ways: dict[str, list[BranchPlacement]] = {}
        for unit in spec.units:
            counts = {spec.by_name[name].num_branches if name in spec.by_name else 0 for name in unit}
            if counts == {0}:
                continue
            num = max(counts)
            if len(counts) > 1:
                found = [SAMPLE]
            elif unequal & {*unit}:
                found = [_first_rank_with(held, num, branch) for held in _alone(num)]
            else:
                found = [_first_rank_with(range(min(count, num)), num, branch) for count in _spread(most)]
            ways |= dict.fromkeys(unit, found)
        edges: dict[str, EdgeSplit] = {edge: "sample" if edge in ways else "replicated" for edge in EDGES}
        for turn in range(max(map(len, ways.values()))):
            placed = {block.name: ways[block.name][turn % len(ways[block.name])] for block in spec.blocks}
            yield Plan(world // branch, branch, placed, edges["stem"], edges["head"])


def _spread(most: int) -> list[int]:
    """Numbers of branches to give the first rank: with those the others get, 0 … k are shown."""
    if most <= _MAX_COUNTS:
        return list(range((most + 1) // 2, most + 1))
    steps = _MAX_COUNTS // 2
    return sorted({most - (most // 2) * i // steps for i in range(steps + 1)})


def _alone(num_branches: int) -> list[range]:
    """Unequal branches to give the first rank: all, which leaves the others none; then each alone (of many some).

    With fewer trials some would always be on one rank, and not be told apart.
    """
    each = -(-num_branches // _MAX_COUNTS)
    starts = range(0, num_branches, each)
    return [range(num_branches), *(range(start, min(start + each, num_branches)) for start in starts)]


def _first_rank_with(held: range, num_branches: int, num_ranks: int) -> BranchPlacement:
    """The first rank has these branches, the others evenly those that follow, by turns."""
    rest = [(held.stop + i) % num_branches for i in range(num_branches - len(held))]
    dealt = BranchPlacement.even(len(rest), num_ranks - 1).branches
    assert dealt is not None
    return BranchPlacement("branch", (tuple(held), *(tuple(rest[i] for i in one) for one in dealt)))


def _memory(step: PlanStep) -> tuple[dict[str, tuple[float, float]], float]:
    """By element: bytes kept for the backward, and the most while it runs; more while the optimizer runs."""
    recorder = step.train.network.recorder
    recorder.detailed = True
    with LiveMemory(step.train.network) as memory:
        step()
    recorder.detailed = False
    return memory.by_element(), memory.of_update()

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
from anabranch.schedulers import BlockSpec, BranchPlacement, ModelSpec, Plan
from anabranch.schedulers.plan import SAMPLE

WARM_UP = 2  # steps before measuring
_MAX_COUNTS = 8  # numbers of branches measured one by one; of more, a spread


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
        """What each element took on this rank: medians over the steps, without exchanges."""
        sums: dict[tuple[str, str], list[float]] = defaultdict(list)
        for spans in self.spans:
            once: dict[tuple[str, str], float] = defaultdict(float)
            for span in spans:
                if span.element:
                    once[span.part, span.element] += (span.end - span.start) * (-1 if span.op else 1)
            for key, seconds in once.items():
                sums[key].append(seconds)
        whole = {part: self._whole_s(part, sums) for part in ("forward", "backward")}
        for name, _, rows in self.parallel.elements():
            samples = max(sum(batch.rows.layout_of(rows).group_sizes) for batch in self.step.batches)
            placed = self.plan.blocks.get(name)
            held = placed.branches[self.mesh.branch_rank] if placed and placed.branches else None
            forward, backward = (
                whole[part] * statistics.median(sums.get((part, name), [0.0])) / len(self.step.batches)
                for part in ("forward", "backward")
            )
            yield Seen(name, samples, held, max(forward, 0.0), max(backward, 0.0), *self.memory[name])

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
    """Plans of the reduced network that show every element on own samples, and with each number of branches."""
    blocks = {block.name: SAMPLE for block in spec.blocks}
    yield Plan(world, 1, blocks, "sample", "sample")
    most = max(block.num_branches for block in spec.blocks)
    for branch in range(2, world + 1):
        if world % branch:
            continue
        counts = _spread(most)
        for count in counts:
            placed = {
                block.name: _one_rank_with(
                    min(count, block.num_branches), block, branch, block.name in unequal, counts.index(count)
                )
                for block in spec.blocks
            }
            shared = {name for users in spec.users.values() for name in users}
            if any(name in ("stem", "head") for name in shared):
                placed |= {name: SAMPLE for name in shared if name in placed}
            yield Plan(world // branch, branch, placed, "replicated", "replicated")


def _spread(most: int) -> list[int]:
    """Numbers of branches to give the first rank: with those the others get, 0 … k are shown."""
    if most <= _MAX_COUNTS:
        return list(range((most + 1) // 2, most + 1))
    steps = _MAX_COUNTS // 2
    return sorted({most - (most // 2) * i // steps for i in range(steps + 1)})


def _one_rank_with(count: int, block: BlockSpec, num_ranks: int, unequal: bool, turn: int) -> BranchPlacement:
    """The first rank has `count` branches, the others the rest evenly; unequal branches go round by turn."""
    rest = BranchPlacement.even(block.num_branches - count, num_ranks - 1).branches
    assert rest is not None
    counts = [count, *map(len, rest)]
    placement = BranchPlacement.from_counts(counts)
    if not unequal:
        return placement
    assert placement.branches is not None
    k = block.num_branches
    return BranchPlacement(
        "branch", tuple(tuple((b + turn) % k for b in held) for held in placement.branches)
    )


def _memory(step: PlanStep) -> tuple[dict[str, tuple[float, float]], float]:
    """By element: bytes kept for the backward, and the most while it runs; more while the optimizer runs."""
    recorder = step.train.network.recorder
    recorder.detailed = True
    with LiveMemory(step.train.network) as memory:
        step()
    recorder.detailed = False
    return memory.by_element(), memory.of_update()

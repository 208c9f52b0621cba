"""Measures what a network's steps cost on the workers that stand: `Costs` for the scheduler.

Costs are read off real steps, of a *reduced* network that has every distinct block once, under a few plans that
together show every element as each split and each number of branches runs it: with the allocator, threads and caches
of training, all ranks busy. Gradients are then reduced after the backward, so that neither hides the other.

    trial            shows
    all "sample"     every element on a rank's own samples
    1×M, counts …    every block on its group's samples, with 0 … k branches; exchanges as large as they are
    links            collectives by size and group; what an overlapped one takes from compute

What does not fit the budget is measured on a part of the batch and drawn out, labelled "extrapolated".
"""

from __future__ import annotations

import copy
import hashlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.blocks.network import named_blocks
from anabranch.runtime.config import Config
from anabranch.runtime.live_memory import LiveMemory
from anabranch.runtime.machine import processor
from anabranch.runtime.measure_links import link_costs, occupancy
from anabranch.runtime.mesh import Mesh, make_mesh
from anabranch.runtime.model_shape import parameter_bytes, shared_bytes, traffic, unequal_blocks
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.plan_step import PlanStep, StepSetting
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.recorder import PARTS, Span
from anabranch.schedulers import BlockSpec, BranchPlacement, Cluster, ModelSpec, Plan
from anabranch.schedulers.costs import Costs, Curve, ElementCost, ModelCosts, Work
from anabranch.schedulers.plan import SAMPLE

_WARM_UP, _LEAST, _MOST = 2, 3, 10  # steps of a trial: before measuring, fewest and most measured
_MAX_COUNTS = 8  # numbers of branches measured one by one; of more, a spread

SPEEDS = "speeds"  # the key's entry for the workers' relative speeds
OnTrial = Callable[[int, int], None]
Times = dict[str, tuple[float, float, float, float]]  # element → forward, backward seconds, saved bytes, peak


@dataclass(frozen=True)
class _Seen:
    """One element in one trial on one rank: its split, samples, branches held, and what it took."""

    element: str
    samples: int
    held: tuple[int, ...] | None  # None: all, on own samples
    forward_s: float
    backward_s: float
    saved_bytes: float
    peak_bytes: float

    def at_speed_1(self, speed: float) -> _Seen:
        return replace(self, forward_s=self.forward_s * speed, backward_s=self.backward_s * speed)


def measure_costs(
    network: nn.Module,
    setting: StepSetting,
    cluster: Cluster,
    devices: Sequence[str],
    *,
    budget_s: float = 60.0,
    on_trial: OnTrial = lambda done, total: None,
) -> Costs:
    """The costs of a one-device network (prepared, kept as it is) on the ranks of the default process group.

    Every rank calls it. devices: by rank, as "host:index" of the cluster. Collective; the same on all ranks.
    """
    started, world = time.perf_counter(), len(devices)
    kinds = [cluster.by_name[name].kind for name in devices]
    spec, alike = spec_of(network), _alike(network, setting.x[:2])
    reduced = _reduced(network, alike)
    meshes = {m: make_mesh(world // m, m, _device_type()) for m in range(1, world + 1) if world % m == 0}
    trials = list(_trials(spec_of(reduced), unequal_blocks(reduced), world))
    setting, label = _within(reduced, trials[0], meshes, setting, budget_s / 2, len(trials))
    running = [_Trial(copy.deepcopy(reduced), plan, meshes[plan.branch], setting) for plan in trials]
    rounds, once = _MOST, _agreed_max(sum(trial.once_s for trial in running), meshes[1])
    left = budget_s / 2 - (time.perf_counter() - started)
    rounds = min(max(int(_agreed_min(left, meshes[1]) / max(once, 1e-9)), _LEAST), _MOST)
    for number in range(rounds):  # all trials in every round: whatever drifts on the machine hits all of them
        on_trial(number, rounds + 1)
        for trial in running:
            trial.run()
    on_trial(rounds, rounds + 1)
    seen = [one for trial in running for one in trial.seen()]
    exchanges: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    even = {trial.plan.branch for trial in running if trial.is_even}
    for trial in running:
        if trial.is_even or trial.plan.branch not in even:
            for num_bytes, seconds in trial.exchanges():
                exchanges[trial.plan.branch][num_bytes].append(seconds)
    rest = [statistics.median(trial.rest) for trial in running]
    per_byte = [statistics.median(trial.optimizer) / trial.num_bytes for trial in running]
    in_steps = {
        size: {num_bytes: statistics.median(s) for num_bytes, s in found.items()}
        for size, found in exchanges.items()
    }
    hosts = [cluster.by_name[name].host for name in devices]
    taken = occupancy(PlanStep(copy.deepcopy(reduced), trials[0], meshes[1], setting))
    groups = link_costs(meshes, hosts, in_steps, taken, _device(network))
    everything = gather_json([[*vars(one).values()] for one in seen], _device(network))
    of_rank = [[_Seen(*row) for row in rows] for rows in everything]
    speeds = _speeds(of_rank, kinds)
    key = {**cost_key(network, setting.config, world), SPEEDS: " ".join(map(str, speeds))}
    models = []
    for kind in dict.fromkeys(kinds):
        ranks = [rank for rank in range(world) if kinds[rank] == kind]
        of_kind = [one.at_speed_1(speeds[r]) for r in ranks for one in of_rank[r]]
        elements = _elements(network, spec, alike, of_kind)
        models.append(
            ModelCosts(
                kind,
                elements,
                shared_bytes(network, spec),
                _agreed(rest, network),
                _agreed(per_byte, network),
                _copies(setting.config),
                _agreed([trial.update_copies for trial in running], network),
                (len(setting.x),),
                label,
                key,
            )
        )
    return Costs(tuple(models), groups)


def with_speeds(cluster: Cluster, devices: Sequence[str], costs: Costs) -> Cluster:
    """The cluster with the workers' relative speeds as they were measured. devices: by rank."""
    speeds = dict(zip(devices, map(float, costs.models[0].key.get(SPEEDS, "").split()), strict=False))
    changed = (replace(d, speed=speeds.get(str(d), d.speed)) for d in cluster.devices)
    return replace(cluster, devices=tuple(changed))


def _speeds(of_rank: Sequence[Sequence[_Seen]], kinds: Sequence[str]) -> list[float]:
    """Each rank's speed relative to the fastest of its kind, where all do the same (all branches, own samples).

    In steps of a twentieth, and 1 within a fifth of the fastest: on shared cores that is noise.
    """
    seconds = [
        sum(one.forward_s + one.backward_s for one in seen if one.held is None) or 1.0 for seen in of_rank
    ]
    fastest = {kind: min(s for s, k in zip(seconds, kinds, strict=True) if k == kind) for kind in kinds}
    ratios = [fastest[kind] / s for s, kind in zip(seconds, kinds, strict=True)]
    return [1.0 if ratio > 0.8 else max(round(ratio * 20), 1) / 20 for ratio in ratios]


def cost_key(network: nn.Module, config: Config, world_size: int) -> dict[str, str]:
    """What figures hold for: hardware, versions, network, batch. Equal keys, equal costs."""
    shapes = ",".join("x".join(map(str, p.shape)) for p in network.parameters())
    train = config.train
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "workers": str(world_size),
        "torch": torch.__version__,
        "network": f"{_digest(repr(network) + shapes)}",
        "batch": f"{train.batch_size}/{train.bn_batch_size}/{train.accumulation}",
        "precision": train.precision,
        "execution": "/".join(
            str(getattr(config.mesh, name))
            for name in ("execution", "memory_format", "wire", "overlap", "recompute", "chunks")
        ),
        "optimizer": config.optimizer.name,
    }


class _Trial:
    """Steps of one plan on this rank, detailed, gradients reduced after the backward. Collective."""

    def __init__(self, network: nn.Module, plan: Plan, mesh: Mesh, setting: StepSetting) -> None:
        self.plan, self.mesh = plan, mesh
        self.step = PlanStep(network, plan, mesh, setting)
        self.parallel = self.step.train.network
        self.step.train.reducer.overlap = False
        for _ in range(_WARM_UP):
            begun = time.perf_counter()
            self.step()
            self.once_s = time.perf_counter() - begun
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

    def seen(self) -> Iterator[_Seen]:
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
            yield _Seen(name, samples, held, max(forward, 0.0), max(backward, 0.0), *self.memory[name])

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

    def exchanges(self) -> Iterator[tuple[int, float]]:
        """(bytes, seconds) of all branch groups' all-reduces.

        Where all have equally much to do the mean over a group's ranks: that they wait for one another by turns is
        part of what an exchange costs. Else the shortest rank's, which waited for none.
        """
        of_group = statistics.mean if self.is_even else min
        mine = [
            [(span.num_bytes, span.end - span.start) for span in spans if span.op == "all_reduce"]
            for spans in self.spans
        ]
        everyone = gather_json(mine, _device(self.parallel))
        branch = self.mesh.branch
        for first in range(0, len(everyone), branch):
            for of_ranks in zip(*everyone[first : first + branch], strict=True):
                for same in zip(*of_ranks, strict=True):
                    yield same[0][0], of_group([seconds for _, seconds in same])


def _trials(spec: ModelSpec, unequal: frozenset[str], world: int) -> Iterator[Plan]:
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


def _within(
    network: nn.Module,
    plan: Plan,
    meshes: dict[int, Mesh],
    setting: StepSetting,
    budget_s: float,
    trials: int,
) -> tuple[StepSetting, str]:
    """The setting with as much of the batch as the budget lets, and the label of what is measured so."""
    step = PlanStep(copy.deepcopy(network), plan, meshes[1], setting)
    step()
    begun = time.perf_counter()
    step()
    once = _agreed_max(time.perf_counter() - begun, meshes[1])
    parts, train = 1, setting.config.train
    least = train.bn_batch_size * meshes[1].world_size  # a BN group a rank
    while once / parts * trials * (_WARM_UP + _LEAST) > budget_s and len(setting.x) // (2 * parts) >= least:
        parts *= 2
    if parts == 1:
        return setting, "measured"
    num = len(setting.x) // parts
    smaller = replace(setting.config, train=replace(train, batch_size=num, accumulation=1))
    return replace(setting, x=setting.x[:num], target=setting.target[:num], config=smaller), "extrapolated"


def _alike(network: nn.Module, x: Tensor) -> dict[str, str]:
    """Each block's first alike block: of the same modules and shapes, on inputs of the same shape."""
    first: dict[str, str] = {}
    found: dict[str, str] = {}
    shapes: dict[str, str] = {}
    hooks = []
    for name, block in named_blocks(network):
        hooks.append(
            block.register_forward_pre_hook(
                lambda module, args, name=name: shapes.__setitem__(name, str(tuple(args[0].shape[1:])))
            )
        )
    was_training = network.training
    network.eval()
    with torch.no_grad():
        x = x.to(_device(network), next(network.parameters()).dtype)
        for module in (network.stem, *(block for _, block in named_blocks(network)), network.head):
            x = module(x)  # type: ignore[operator]
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    for name, block in named_blocks(network):
        parameters = [tuple(p.shape) for p in block.parameters()]
        key = f"{shapes[name]} {block!r} {parameters}"
        found[name] = first.setdefault(key, name)
    return found


def _reduced(network: nn.Module, alike: dict[str, str]) -> nn.Module:
    """A copy with one block of each kind: alike blocks keep shapes, so that the rest still fit together.

    Only the second and later of alike *neighbours* go: others may feed what comes between.
    """
    reduced = copy.deepcopy(network)
    names = list(alike)
    for before, name in pairwise(names):
        if alike[name] == alike[before]:
            parent, _, last = f"blocks.{name}".rpartition(".")
            del reduced.get_submodule(parent)._modules[last]
    return reduced


def _elements(
    network: nn.Module, spec: ModelSpec, alike: dict[str, str], seen: Sequence[_Seen]
) -> dict[str, ElementCost]:
    by_element: dict[str, list[_Seen]] = defaultdict(list)
    for one in seen:
        by_element[one.element].append(one)
    moved = traffic(network)
    unequal = unequal_blocks(network)
    parameters = parameter_bytes(network, spec)
    made: dict[str, ElementCost] = {}
    for name in ("stem", "head"):
        made[name] = ElementCost(
            _work(by_element[name]),
            input_bytes=moved[name][2],
            parameters=parameters[name],
        )
    for block in spec.blocks:
        seen_alike = [
            one for name in alike if alike[name] == alike[block.name] for one in by_element.get(name, [])
        ]
        is_unequal = alike[block.name] in unequal
        work = _unequal_work if is_unequal else _block_work
        replicated, branches = work(seen_alike, block.num_branches)
        sums, hidden, inputs = moved[block.name]
        made[block.name] = ElementCost(
            replicated, branches, is_unequal, sums, hidden, inputs, parameters[block.name]
        )
    return made


_Four = tuple[float, float, float, float]  # forward, backward seconds, saved, peak bytes


def _block_work(seen: Sequence[_Seen], num_branches: int) -> tuple[Work, tuple[Work, ...]]:
    """Of alike branches: what is left without any (enter, join), and j branches together, for every j.

    Numbers of branches that no trial had are drawn between those that were; a number of samples on which only all
    branches ran takes its shares from the nearest on which more is known.
    """
    totals: dict[int, dict[int, _Four]] = defaultdict(dict)
    for key, group in _grouped(seen, lambda one: num_branches if one.held is None else len(one.held)).items():
        totals[key[0]][key[1]] = _medians(group)
    known = max(totals.values(), key=len)
    shapes = {n: _between(found, num_branches) if len(found) > 1 else None for n, found in totals.items()}
    like = _between(known, num_branches) if len(known) > 1 else None
    for n, found in totals.items():
        if shapes[n] is None:
            (whole,) = found.values()
            shares = like or [_times(whole, j / num_branches) for j in range(num_branches + 1)]
            shapes[n] = [
                _as_four(
                    w * part / all_ if all_ else 0.0
                    for w, part, all_ in zip(whole, row, shares[-1], strict=True)
                )
                for row in shares
            ]
    by_samples = {n: rows for n, rows in shapes.items() if rows is not None}
    replicated = _curves({n: rows[0] for n, rows in by_samples.items()})
    branches = tuple(
        _curves({n: _minus(rows[j], rows[0]) for n, rows in by_samples.items()})
        for j in range(1, num_branches + 1)
    )
    return replicated, branches


def _unequal_work(seen: Sequence[_Seen], num_branches: int) -> tuple[Work, tuple[Work, ...]]:
    """Of unequal branches: least squares over all that ran, by samples: enter and join, and each branch alone."""
    by_samples: dict[int, list[list[float]]] = {}
    for n, group in _grouped(seen, lambda one: 0).items():
        rows = torch.zeros(len(group), num_branches + 1, dtype=torch.float64)
        values = torch.zeros(len(group), 4, dtype=torch.float64)
        for index, one in enumerate(group):
            rows[index, 0] = 1
            rows[index, [1 + b for b in (range(num_branches) if one.held is None else one.held)]] = 1
            values[index] = torch.tensor(_four(one))
        solved = torch.linalg.lstsq(rows, values, driver="gelsd").solution.clamp(min=0)
        by_samples[n[0]] = solved.tolist()
    works = [_curves({n: tuple(rows[i]) for n, rows in by_samples.items()}) for i in range(num_branches + 1)]  # type: ignore[misc]
    return works[0], tuple(works[1:])


def _work(seen: Sequence[_Seen]) -> Work:
    """Of stem or head, over samples."""
    return _curves({n: _medians(group) for (n, _), group in _grouped(seen, lambda one: 0).items()})


def _grouped(seen: Sequence[_Seen], count: Callable[[_Seen], int]) -> dict[tuple[int, int], list[_Seen]]:
    groups: dict[tuple[int, int], list[_Seen]] = defaultdict(list)
    for one in seen:
        groups[one.samples, count(one)].append(one)
    return groups


def _four(one: _Seen) -> _Four:
    return one.forward_s, one.backward_s, one.saved_bytes, one.peak_bytes


def _as_four(values: Iterable[float]) -> _Four:
    a, b, c, d = values
    return a, b, c, d


def _medians(group: Sequence[_Seen]) -> _Four:
    forward, backward, saved, peak = (
        statistics.median(values) for values in zip(*map(_four, group), strict=True)
    )
    return forward, backward, saved, peak


def _between(found: dict[int, _Four], num_branches: int) -> list[_Four]:
    """Rows for 0 … k branches from those measured, straight between them."""
    curves = [Curve(tuple(sorted((float(j), row[i]) for j, row in found.items()))) for i in range(4)]
    return [tuple(curve(j) for curve in curves) for j in range(num_branches + 1)]  # type: ignore[misc]


def _times(row: _Four, factor: float) -> _Four:
    return row[0] * factor, row[1] * factor, row[2] * factor, row[3] * factor


def _minus(row: _Four, less: _Four) -> _Four:
    a, b, c, d = (max(x - y, 0.0) for x, y in zip(row, less, strict=True))
    return a, b, c, d


def _curves(by_samples: dict[int, _Four]) -> Work:
    """Curves through the origin: no samples, no work."""
    points = [(0.0, (0.0,) * 4), *sorted((float(n), row) for n, row in by_samples.items() if n)]
    return Work(*(Curve(tuple((n, row[i]) for n, row in points)) for i in range(4)))


def _memory(step: PlanStep) -> tuple[dict[str, tuple[float, float]], float]:
    """By element: bytes kept for the backward, and the most while it runs; more while the optimizer runs."""
    recorder = step.train.network.recorder
    recorder.detailed = True
    with LiveMemory(step.train.network) as memory:
        step()
    recorder.detailed = False
    return memory.by_element(), memory.of_update()


def _copies(config: Config) -> float:
    """Live bytes for a parameter's, all the time: itself and the optimizer's state."""
    optimizer = config.optimizer
    return 1.0 + (2.0 if optimizer.name == "adamw" else 1.0 if optimizer.momentum else 0.0)


def _agreed(values: Sequence[float], network: nn.Module) -> float:
    """The median over ranks of their medians, the same everywhere."""
    medians: list[float] = gather_json(statistics.median(values), _device(network))
    return statistics.median(medians)


def _agreed_max(value: float, mesh: Mesh) -> float:
    values: list[float] = gather_json(value, mesh.device_mesh.device_type, mesh.world_group)
    return max(values)


def _agreed_min(value: float, mesh: Mesh) -> float:
    values: list[float] = gather_json(value, mesh.device_mesh.device_type, mesh.world_group)
    return min(values)


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""The objective: how long a step of a plan takes, what it moves, what it holds.

Elements are stem, blocks, head. A rank runs an element on its *own* samples or on its *group*'s, as
`runtime.parallel_network` does; samples are dealt as in `runtime.deal`. Curves are read at the samples of the
step's largest micro-batch; device speed divides compute. Per element e, over all ranks r:

    forward   f_e = max_r (enter, branches held, join)_r  [+ num_sums all-reduces of sum_bytes]   split "branch"
    backward  c_e = max_r (the same)_r                    [+ num_sums all-reduces of hidden_bytes]
    own → group before e: an all-gather of input_bytes forward;  group → own: one backward, and where the block
                    before e ends in its sum, the last of its all-reduces is a reduce-scatter
    gradients g_e = bytes × a byte's share of its bucket's all-reduce: replicated and "sample" ones over the
                    world, owned ones over the data axis (there the rank that holds most)

Clocks are taken as aligned at every element's end, forward and backward: exact where exchanges align them or
the slowest rank is the same in all elements of a run, an upper bound else. Gradients leave in buckets, cut
in backward order by the network's parameter bytes (the runtime's by those held; the same where all is
replicated), on one channel, in order. Of a transfer of g seconds, occupancy · g is taken from compute; the
rest joins the backlog q when its bucket closes, and drains while later elements compute backward:

    q ← max(q - c_e, 0);   w ← w + (1 - occupancy) g_e;   at a bucket's end q ← q + w, w ← 0
    step = Σ f_e + Σ c_e + exchanges + Σ occupancy · g_e + last q + optimizer + step_s

Optimizer: by element the rank that holds most. With accumulation every micro-batch pays forward and backward,
and the last one hides the gradients. Memory: see `memory`. Synchronized BatchNorm (there is none with the default
bn_batch_size) is in what elements were measured to take; from data sheets it is not counted. Nor are targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from anabranch.schedulers.cluster import Cluster, Device
from anabranch.schedulers.costs import Batch, Collective, Costs, ModelCosts
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.layout import Layout, make_layout
from anabranch.schedulers.links import GroupKind
from anabranch.schedulers.memory import Held
from anabranch.schedulers.model_spec import ModelSpec
from anabranch.schedulers.plan import Devices, Plan
from anabranch.schedulers.pricing import Part, Pricing


@dataclass(frozen=True)
class Span:
    """A stretch of a rank's time in a step. element: "" for what belongs to none."""

    element: str
    phase: Literal["forward", "backward", "gradients", "optimizer", "step"]
    kind: Literal["compute", "transfer", "wait"]
    start_s: float
    end_s: float


class Traffic(NamedTuple):
    """Bytes that one group puts through a collective in a step."""

    axis: Literal["branch", "data", "world"]
    collective: Collective
    across: bool
    num_bytes: float


class _Phase(NamedTuple):
    """A stretch of everyone's time: each rank's own compute, then a transfer, all `times` times."""

    element: str
    phase: Literal["forward", "backward", "gradients", "optimizer", "step"]
    before_s: float
    compute_s: tuple[float, ...]  # by kind of rank; the longest sets the pace
    after_s: float


@dataclass(frozen=True)
class Prediction:
    """total_s: of a step. exposed_s: communication that nothing hides. By rank: compute_s, wait_s, memory_bytes.

    hidden_s: gradient transfers that compute hides. label: "measured", "extrapolated" or
    "predicted, not calibrated": of the costs.
    """

    total_s: float
    exposed_s: float
    hidden_s: float
    compute_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    memory_bytes: tuple[float, ...]
    traffic: tuple[Traffic, ...]
    label: str
    phases: tuple[_Phase, ...]
    kind_of_rank: tuple[int, ...]
    times: int

    def timeline(self, rank: int) -> list[Span]:
        """A rank's step without gaps; with accumulation only its last micro-batch, from 0."""
        spans: list[Span] = []
        now = 0.0
        for phase in self.phases:
            own, longest = phase.compute_s[self.kind_of_rank[rank]], max(phase.compute_s)
            for kind, seconds in (
                ("transfer", phase.before_s),
                ("compute", own),
                ("wait", longest - own),
                ("transfer", phase.after_s),
            ):
                if seconds > 0:
                    spans.append(Span(phase.element, phase.phase, kind, now, now + seconds))  # type: ignore[arg-type]
                    now += seconds
        return spans


class Predictor:
    """`predict` for many plans of one network."""

    def __init__(self, model: ModelSpec, cluster: Cluster, costs: Costs, batch: Batch) -> None:
        self.pricing = Pricing(model, cluster, costs, batch)
        self.pricing.check_speeds()
        self._layouts: dict[tuple[Devices, tuple[int, ...] | None], Layout] = {}

    def __call__(self, plan: Plan) -> Prediction:
        """Of a plan that keeps the rules, with devices."""
        if plan.devices is None:
            raise PlanError("the plan names no devices: a prediction needs them; fill them in first")
        pricing = self.pricing
        key = (plan.devices, plan.samples)
        if key not in self._layouts:
            if len(self._layouts) > 100:
                self._layouts.clear()
            self._layouts[key] = make_layout(plan.devices, pricing.cluster, pricing.batch, plan.samples)
        return _Simulation(pricing, plan, self._layouts[key]).run()


def predict(plan: Plan, model: ModelSpec, cluster: Cluster, costs: Costs, batch: Batch) -> Prediction:
    """A step of the plan; see the module. Raises PlanError where costs are not this network's or cluster's."""
    return Predictor(model, cluster, costs, batch)(plan)


class _Rank(NamedTuple):
    """Ranks that do the same: their device, its samples in each split, and their branch rank."""

    kind: str
    speed: float
    group: int
    own: int
    branch_rank: int


class _Simulation:
    def __init__(self, pricing: Pricing, plan: Plan, layout: Layout) -> None:
        self.pricing, self.plan, self.layout = pricing, plan, layout
        ranks = [
            _Rank(device.kind, device.speed, layout.group_samples[d], layout.own_samples[d][m], m)
            for d, row in enumerate(layout.ranks)
            for m, device in enumerate(row)
        ]
        numbers: dict[_Rank, int] = {}
        self.kind_of_rank = tuple(numbers.setdefault(rank, len(numbers)) for rank in ranks)
        self.ranks = list(numbers)
        self.traffic: dict[tuple[str, Collective, bool], float] = {}
        self.times = pricing.batch.accumulation
        blocks = [plan.blocks[name] for name in pricing.names[1:-1]]
        self.is_group = [
            layout.branch > 1 and split != "sample"
            for split in (plan.stem, *(block.split for block in blocks), plan.head)
        ]
        self.placed = [None, *(block.branches for block in blocks), None]

    def run(self) -> Prediction:
        pricing, rates = self.pricing, self.pricing.gradient_s_per_byte(self.layout)
        num_elements = len(pricing.names)
        forward: list[_Phase] = []
        backward: list[_Phase] = []
        gradients: list[tuple[float, float]] = []
        optimizer_s = [0.0] * num_elements
        for i, name in enumerate(pricing.names):
            parts, owned = self._parts(i)
            before, behind = self._transition(i)
            sums, hidden = self._exchanged_bytes(i)
            exchanged = self._exchange(i, sums, self._hands_over(i)), self._exchange(i, hidden)
            computes = [
                tuple(part[phase] / rank.speed for part, rank in zip(parts, self.ranks, strict=True))
                for phase in (0, 1)
            ]
            forward.append(_Phase(name, "forward", before, computes[0], exchanged[0]))
            backward.append(_Phase(name, "backward", 0.0, computes[1], exchanged[1] + behind))
            replicated = pricing.parameters[i].replicated
            is_owned = self.is_group[i] and self.placed[i] is not None
            world_bytes = replicated + (0 if is_owned else max(owned))
            data_bytes = max(owned) if is_owned else 0
            world_s, data_s = (
                rate * num_bytes
                for rate, num_bytes in zip(rates[pricing.bucket[i]], (world_bytes, data_bytes), strict=True)
            )
            gradients.append((world_s, data_s))
            self._count("world", "all_reduce", self.layout.world, world_bytes)
            self._count("data", "all_reduce", self.layout.data_group, data_bytes)
            for rank, num_bytes in zip(self.ranks, owned, strict=True):
                seconds = (replicated + num_bytes) * self._model(rank).optimizer_s_per_byte / rank.speed
                optimizer_s[i] = max(optimizer_s[i], seconds)
        return self._add_up(forward, backward, gradients, sum(optimizer_s))

    def _add_up(
        self,
        forward: list[_Phase],
        backward: list[_Phase],
        gradients: list[tuple[float, float]],
        optimizer_s: float,
    ) -> Prediction:
        pricing, times = self.pricing, self.times
        world, data = (
            pricing.links.occupancy(group) for group in (self.layout.world, self.layout.data_group)
        )
        backlog = waiting = taken = all_s = 0.0
        phases = list(forward)
        for i in reversed(range(len(forward))):
            world_s, data_s = gradients[i]
            own = world * world_s + data * data_s
            phases += [backward[i], _Phase(pricing.names[i], "gradients", own, (0.0,) * len(self.ranks), 0.0)]
            backlog = max(backlog - max(backward[i].compute_s), 0.0)
            waiting += world_s + data_s - own
            taken, all_s = taken + own, all_s + world_s + data_s
            if pricing.closes[i]:
                backlog, waiting = backlog + waiting, 0.0
        nothing = (0.0,) * len(self.ranks)
        phases += [
            _Phase("", "gradients", backlog, nothing, 0.0),
            _Phase("", "optimizer", 0.0, (optimizer_s,) * len(self.ranks), 0.0),
            _Phase("", "step", 0.0, (pricing.step_s,) * len(self.ranks), 0.0),
        ]
        compute, exposed, longest = [0.0] * len(self.ranks), taken + backlog, 0.0
        for phase in phases:
            is_work = phase.phase in ("forward", "backward")
            repeat = times if is_work else 1
            longest += repeat * max(phase.compute_s)
            compute = [total + repeat * own for total, own in zip(compute, phase.compute_s, strict=True)]
            if is_work:
                exposed += repeat * (phase.before_s + phase.after_s)

        def by_rank(values: list[float]) -> tuple[float, ...]:
            return tuple(values[kind] for kind in self.kind_of_rank)

        return Prediction(
            longest + exposed,
            exposed,
            all_s - taken - backlog,
            by_rank(compute),
            by_rank([longest - own for own in compute]),
            by_rank([self._peak_bytes(rank) for rank in self.ranks]),
            tuple(Traffic(*key, num_bytes) for key, num_bytes in self.traffic.items()),  # type: ignore[arg-type]
            pricing.label,
            tuple(phases),
            self.kind_of_rank,
            times,
        )

    def _peak_bytes(self, rank: _Rank) -> float:
        """The most that a rank holds in the step."""
        pricing, held = self.pricing, Held()
        for i in reversed(range(len(pricing.names))):
            samples = rank.group if self.is_group[i] else rank.own
            is_owned = self.is_group[i] and self.placed[i] is not None
            element = pricing.memory(i, rank.kind, samples, self._branches(i, rank), is_owned, self.layout)
            held = held.add(element, pricing.closes[i])
            if i and self.is_group[i] and not self.is_group[i - 1]:
                held = held.gathered(pricing.costs[pricing.first.kind][i].input_bytes * rank.group)
        return held.peak

    def _branches(self, i: int, rank: _Rank) -> Sequence[int]:
        placed = self.placed[i] if self.is_group[i] else None
        return range(self.pricing.num_branches[i]) if placed is None else placed[rank.branch_rank]

    def _parts(self, i: int) -> tuple[list[Part], list[int]]:
        """By kind of rank: the element's work, and bytes of its branches' parameters."""
        parts, owned = [], []
        for rank in self.ranks:
            held = self._branches(i, rank)
            samples = rank.group if self.is_group[i] else rank.own
            parts.append(self.pricing.part(i, rank.kind, samples, held))
            owned.append(self.pricing.held_bytes(i, held))
        return parts, owned

    def _transition(self, i: int) -> tuple[float, float]:
        """Seconds of all-gathers before the element: (forward, backward)."""
        if i == 0 or self.is_group[i] == self.is_group[i - 1]:
            return 0.0, 0.0
        num_bytes = self.pricing.costs[self.pricing.first.kind][i].input_bytes * self.layout.gathered_samples
        seconds = self.pricing.links.seconds("all_gather", self.layout.branch_group, num_bytes)
        self._count("branch", "all_gather", self.layout.branch_group, self.times * num_bytes)
        return (seconds, 0.0) if self.is_group[i] else (0.0, seconds)

    def _exchanged_bytes(self, i: int) -> tuple[float, float]:
        """Per sample: (forward, backward)."""
        if not self.is_group[i] or self.placed[i] is None:
            return 0.0, 0.0
        cost = self.pricing.costs[self.pricing.first.kind][i]
        return cost.sum_bytes, cost.hidden_bytes

    def _hands_over(self, i: int) -> bool:
        """Whether of its last sum each rank receives its own rows only."""
        return self.pricing.ends_in_sum[i] and self.is_group[i] and not self.is_group[i + 1]

    def _exchange(self, i: int, bytes_per_sample: float, hands_over: bool = False) -> float:
        num_sums, group, seconds = self.pricing.num_sums[i], self.layout.branch_group, 0.0
        each = bytes_per_sample * max(self.layout.group_samples) / num_sums
        sums: dict[Collective, int] = {"all_reduce": num_sums - hands_over, "reduce_scatter": int(hands_over)}
        for collective, num in sums.items():
            if num:
                self._count("branch", collective, group, self.times * num * each)
                seconds += num * self.pricing.links.seconds(collective, group, each)
        return seconds

    def _count(self, axis: str, collective: Collective, group: GroupKind, num_bytes: float) -> None:
        if group.size > 1 and num_bytes:
            key = (axis, collective, group.across)
            self.traffic[key] = self.traffic.get(key, 0.0) + num_bytes

    def _model(self, rank: _Rank) -> ModelCosts:
        return self.pricing.models[rank.kind]


def fits(device: Device, num_bytes: float) -> bool:
    """Whether the device's memory, where known, has room."""
    return device.memory_bytes is None or num_bytes <= device.memory_bytes

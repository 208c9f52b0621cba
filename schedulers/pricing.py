"""What parts of a step cost on a rank: curves read once for each kind of element, device and number of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from anabranch.schedulers.cluster import Cluster
from anabranch.schedulers.costs import Batch, Costs, ElementCost, ParameterBytes, Work
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.layout import Layout
from anabranch.schedulers.links import GroupKind, Links
from anabranch.schedulers.memory import Bytes, element_bytes
from anabranch.schedulers.model_spec import ModelSpec


class Part(NamedTuple):
    """One element on one rank at speed 1, for one micro-batch."""

    forward_s: float
    backward_s: float
    saved_bytes: float
    peak_bytes: float


_NOTHING = Part(0.0, 0.0, 0.0, 0.0)


class Pricing:
    """A network's costs, ready to be asked often.

    names: the elements in order. units: the model's, by element numbers. alike: for each a number, equal where costs
    are equal. parameters: bytes of each, shared ones at their first user, where their gradient is ready last. bucket:
    which piece of gradients each element's belong to; closes: whether that piece leaves after the element's backward.
    """

    def __init__(self, model: ModelSpec, cluster: Cluster, costs: Costs, batch: Batch) -> None:
        costs.check(model, frozenset(device.kind for device in cluster.devices))
        self.model, self.cluster, self.batch = model, cluster, batch
        self.models = {kind: costs.of(kind) for kind in {device.kind for device in cluster.devices}}
        self.first = costs.of(cluster.devices[0].kind)
        self.label = costs.label
        self.links = Links(cluster, costs)
        self.names = ["stem", *model.by_name, "head"]
        index = {name: i for i, name in enumerate(self.names)}
        self.units = [tuple(index[name] for name in unit) for unit in model.units]
        self.num_sums = [1, *(block.num_sums for block in model.blocks), 1]
        self.ends_in_sum = [False, *(block.ends_in_sum for block in model.blocks), False]
        self.num_branches = [0, *(block.num_branches for block in model.blocks), 0]
        self.parameters = self._parameters()
        self.costs = {
            kind: [costs.elements[name] for name in self.names] for kind, costs in self.models.items()
        }
        self.step_s = max(costs.step_s for costs in self.models.values())
        self._number_alike()
        self._cut_buckets()
        self._rates: dict[tuple[GroupKind, GroupKind], list[tuple[float, float]]] = {}
        self._counted: dict[int, bool] = {}
        self._memory: dict[tuple[bool, int, str, int, int | tuple[int, ...], tuple[bool, bool]], Bytes] = {}
        self._copies = {kind: (m.parameter_copies, m.update_copies) for kind, m in self.models.items()}
        self._parts: dict[tuple[int, str, int, int | tuple[int, ...]], Part] = {}

    def _parameters(self) -> list[ParameterBytes]:
        found = [self.first.elements[name].parameters for name in self.names]
        index = {name: i for i, name in enumerate(self.names)}
        for name, users in self.model.users.items():
            first, more = index[users[0]], self.first.shared[name]
            own = found[first]
            if users[0] == "stem":  # then all that share it run all branches
                more = ParameterBytes(more.replicated + sum(more.branches))
            branches = [*(own.branches or [0] * len(more.branches))]
            for branch, num_bytes in enumerate(more.branches):
                branches[branch] += num_bytes
            found[first] = ParameterBytes(own.replicated + more.replicated, tuple(branches))
        return found

    def _number_alike(self) -> None:
        numbers: dict[object, int] = {}
        by_identity: dict[tuple[int, ...], int] = {}
        self.alike = []
        for i, parameters in enumerate(self.parameters):
            costs = [self.costs[kind][i] for kind in self.costs]
            form = self.num_sums[i], self.ends_in_sum[i]
            same: tuple[int, ...] = (*map(id, costs), id(parameters), *form)
            if same not in by_identity:
                key = (tuple(costs), parameters, form)
                by_identity[same] = numbers.setdefault(key, len(numbers))
            self.alike.append(by_identity[same])

    def _cut_buckets(self) -> None:
        self.bucket, self.closes = [0] * len(self.names), [False] * len(self.names)
        self.bucket_bytes = [0.0]
        limit = min(self.batch.first_bucket_bytes, self.batch.bucket_bytes)
        for i in reversed(range(len(self.names))):
            self.bucket[i] = len(self.bucket_bytes) - 1
            self.bucket_bytes[-1] += self.parameters[i].replicated + sum(self.parameters[i].branches)
            if i == 0 or self.bucket_bytes[-1] >= limit:
                self.closes[i], limit = True, self.batch.bucket_bytes
                self.bucket_bytes.append(0.0)

    def part(self, i: int, kind: str, samples: int, held: Sequence[int]) -> Part:
        """Element i on a device of a kind with these samples and branches (speed 1)."""
        cost = self.costs[kind][i]
        key = (self.alike[i], kind, samples, tuple(held) if cost.unequal else len(held))
        if key not in self._parts:
            self._parts[key] = _sum([cost.replicated, *_works(cost, held)], samples)
        return self._parts[key]

    def memory(
        self, i: int, kind: str, samples: int, held: Sequence[int], is_owned: bool, layout: Layout
    ) -> Bytes:
        """What element i holds on a rank. is_owned: its branches' parameters are of their branch rank alone."""
        is_sent = layout.world.size > 1, (layout.data_group if is_owned else layout.world).size > 1
        branches = len(held) if self.is_counted(i) else tuple(held)
        key = (i == 0, self.alike[i], kind, samples, branches, is_sent)
        if key not in self._memory:
            part, replicated = self.part(i, kind, samples, held), self.parameters[i].replicated
            owned, copies = self.held_bytes(i, held), self._copies[kind]
            in_buckets, times = replicated * is_sent[0] + owned * is_sent[1], self.batch.accumulation
            found = element_bytes(
                part.saved_bytes, part.peak_bytes, replicated + owned, in_buckets, copies, times
            )
            images = times * samples * self.costs[kind][0].input_bytes if i == 0 else 0.0
            self._memory[key] = found._replace(always=found.always + images)
        return self._memory[key]

    def is_counted(self, i: int) -> bool:
        """Whether of the branches that a rank holds only their number counts."""
        if i not in self._counted:
            alike = len({*self.parameters[i].branches}) <= 1
            self._counted[i] = alike and not any(costs[i].unequal for costs in self.costs.values())
        return self._counted[i]

    def held_bytes(self, i: int, held: Sequence[int]) -> int:
        """Bytes of the element's branches' parameters."""
        branches = self.parameters[i].branches
        return sum(branches[branch] for branch in held) if branches else 0

    def gradient_s_per_byte(self, layout: Layout) -> list[tuple[float, float]]:
        """Of each bucket: a byte's share of the bucket's all-reduce over the world, over the data groups."""
        groups = (layout.world, layout.data_group)
        if groups in self._rates:
            return self._rates[groups]
        found = self._rates.setdefault(groups, [])
        for num_bytes in self.bucket_bytes:
            seconds = [
                self.links.seconds("all_reduce", group, num_bytes) / num_bytes if num_bytes else 0.0
                for group in groups
            ]
            found.append((seconds[0], seconds[1]))
        return found

    def check_speeds(self) -> None:
        """Every device's speed is positive."""
        for device in self.cluster.devices:
            if device.speed <= 0:
                raise PlanError(f"{device} has speed {device.speed}: give a positive number, 1.0 is usual")


def _works(cost: ElementCost, held: Sequence[int]) -> list[Work]:
    if cost.unequal:
        return [cost.branches[branch] for branch in held]
    return [cost.branches[len(held) - 1]] if held else []


def _sum(works: list[Work], samples: int) -> Part:
    if samples == 0:
        return _NOTHING
    return Part(
        sum(work.forward_s(samples) for work in works),
        sum(work.backward_s(samples) for work in works),
        sum(work.saved_bytes(samples) for work in works),
        sum(work.peak_bytes(samples) for work in works),
    )

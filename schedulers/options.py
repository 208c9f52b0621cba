"""The ways to run each element on a layout: what `chain.solve` chooses from, priced as `predict` does.

Ranks that cannot differ are looked at once: of a branch rank only its devices' kinds, speeds and samples
count, and branch ranks with the same ones are a class. How a block's branches may be divided: `divide`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

from anabranch.schedulers.chain import GROUP, OWN, Chain, Option, highest, to_go
from anabranch.schedulers.divide import Division, divisions
from anabranch.schedulers.layout import Layout
from anabranch.schedulers.memory import Bytes, largest
from anabranch.schedulers.model_spec import EDGES
from anabranch.schedulers.plan import SAMPLE, BranchPlacement, EdgeSplit
from anabranch.schedulers.pricing import Pricing
from anabranch.schedulers.request import Request

Memory = Literal["each", "fullest", "average"]


class Profile(NamedTuple):
    """A rank as far as its times go."""

    kind: str
    speed: float
    group: int
    own: int


class Limit(NamedTuple):
    """A rank's memory: its branch rank (or all of a class), samples, bytes."""

    columns: tuple[int, ...]
    kind: str
    group: int
    own: int
    num_bytes: int
    device: str


Choice = BranchPlacement | EdgeSplit


class Options:
    """Of one layout. memory: what an option keeps on each of `limits` is priced too: on each rank, or of alike
    branch ranks on the fullest, or on average.

    is_exact: false once a block's branches could not be divided exactly.
    """

    def __init__(
        self, pricing: Pricing, layout: Layout, request: Request, memory: Memory | None = None
    ) -> None:
        self.pricing, self.layout, self.request, self.memory = pricing, layout, request, memory
        self.num_columns, self.is_exact = layout.branch, True
        self.columns, self.classes = _classes(layout, with_hosts=bool(request.pins or request.fixed))
        self.profiles = sorted({profile for members in self.classes for profile in self.columns[members[0]]})
        self.limits = self._limits() if memory else ()
        self.rates = pricing.gradient_s_per_byte(layout)
        self.occupancy = [pricing.links.occupancy(group) for group in (layout.world, layout.data_group)]
        self.times = pricing.batch.accumulation
        self._named = {*EDGES, *request.fixed, *request.edges, *(pin.block for pin in request.pins)}
        self._alike: dict[int, tuple[Hashable, list[Choice]]] = {}  # of those that nothing names
        self._lists: dict[Hashable, list[Choice]] = {}
        self._priced: dict[Hashable, list[Option]] = {}
        self._alone: dict[Hashable, Option] = {}

    def _limits(self) -> tuple[Limit, ...]:
        each = self.memory == "each"
        groups = [(m,) for m in range(self.num_columns)] if each else [tuple(c) for c in self.classes]
        found: dict[Hashable, Limit] = {}
        for columns in groups:
            for d, row in enumerate(self.layout.ranks):
                for m in columns:
                    device, own = row[m], self.layout.own_samples[d][m]
                    if device.memory_bytes is None:
                        continue
                    key = (columns[0], device.kind, self.layout.group_samples[d], own)
                    if key not in found or found[key].num_bytes > device.memory_bytes:
                        found[key] = Limit(columns, *key[1:], device.memory_bytes, str(device))
        return tuple(found.values())

    def chain(self) -> Chain:
        """The whole network's."""
        names = self.pricing.names
        options: list[list[Option]] = [[] for _ in names]
        units: list[int | None] = [None] * len(names)
        for number, members in enumerate(self.pricing.units):
            key, choices = self._choices(members)
            for i in members:
                if len(members) > 1:
                    units[i] = number
                priced = (
                    i == 0,
                    self.pricing.alike[i],
                    self.rates[self.pricing.bucket[i]],
                    len(members) > 1,
                    key,
                )
                if priced not in self._priced:
                    found = [self.price(i, choice) for choice in choices]
                    self._priced[priced] = found if len(members) > 1 else efficient(found)
                options[i] = self._priced[priced]
        limits = tuple(float(limit.num_bytes) for limit in self.limits)
        changes: list[tuple[float, float]] = []
        between: dict[tuple[int, int], tuple[float, float]] = {}
        for i, alike in enumerate(self.pricing.alike):
            pair = (self.pricing.alike[i - 1], alike) if i else (-1, alike)
            if pair not in between:
                between[pair] = self._change(i)
            changes.append(between[pair])
        return Chain(options, changes, self.pricing.closes, units, limits, self._gathered())

    def _choices(self, members: Sequence[int]) -> tuple[Hashable, list[Choice]]:
        """What the members of a unit may all be, and a key that is the same for the same choices."""
        if len(members) > 1 or self.pricing.names[members[0]] in self._named:
            return self._own_choices(members)
        alike = self.pricing.alike[members[0]]
        if alike not in self._alike:
            self._alike[alike] = self._own_choices(members)
        return self._alike[alike]

    def _own_choices(self, members: Sequence[int]) -> tuple[Hashable, list[Choice]]:
        pricing, request = self.pricing, self.request
        names = [pricing.names[i] for i in members]
        edges = [name for name in names if name in EDGES]
        settled: list[Choice] = [request.fixed[name] for name in names if name in request.fixed]
        settled += [request.edges[name] for name in names if name in request.edges]
        if settled:
            return ("settled", settled[0]), settled[:1]
        if edges and len(members) == 1 and self.num_columns > 1:
            return "edge", ["sample", "replicated"]
        if edges or self.num_columns == 1 or len({pricing.num_branches[i] for i in members}) > 1:
            return "sample", [SAMPLE]
        pins: dict[int, frozenset[str]] = {}
        for pin in request.pins:
            if pin.block in names:
                pins[pin.branch] = pins.get(pin.branch, frozenset()) | {pin.host}
        key = (tuple(pricing.alike[i] for i in members), tuple(sorted(pins.items(), key=lambda pin: pin[0])))
        if key not in self._lists:
            found: Division = divisions(self, members, pins)
            self.is_exact &= found.is_exact
            self._lists[key] = [*([] if pins else [SAMPLE]), *found.placements]
        return key, self._lists[key]

    def price(self, i: int, choice: Choice) -> Option:
        """The same sums as in `predict`, each kind of rank once."""
        pricing = self.pricing
        split = choice.split if isinstance(choice, BranchPlacement) else choice
        is_group = self.num_columns > 1 and split != "sample"
        placed = choice.branches if is_group and isinstance(choice, BranchPlacement) else None
        everything = tuple(range(pricing.num_branches[i]))
        forward = backward = optimizer = 0.0
        owned_most, replicated = 0, pricing.parameters[i].replicated
        for profile, held in self._works(i, placed):
            samples = profile.group if is_group else profile.own
            part = pricing.part(i, profile.kind, samples, everything if held is None else held)
            owned = pricing.held_bytes(i, everything if held is None else held)
            forward = max(forward, part.forward_s / profile.speed)
            backward = max(backward, part.backward_s / profile.speed)
            owned_most = max(owned_most, owned)
            per_byte = pricing.models[profile.kind].optimizer_s_per_byte
            optimizer = max(optimizer, (replicated + owned) * per_byte / profile.speed)
        exchange = self._exchange_s(i) if placed is not None else 0.0
        world, data = self.rates[pricing.bucket[i]]
        if placed is None:
            world_s, data_s = world * (replicated + owned_most), 0.0
        else:
            world_s, data_s = world * replicated, data * owned_most
        taken = self.occupancy[0] * world_s + self.occupancy[1] * data_s
        return Option(
            GROUP if is_group else OWN,
            self.times * (forward + backward + exchange) + optimizer + taken,
            backward,
            world_s + data_s - taken,
            tuple(self._bytes(i, limit, is_group, placed) for limit in self.limits),
            choice,
        )

    def _works(
        self, i: int, placed: Sequence[tuple[int, ...]] | None
    ) -> list[tuple[Profile, tuple[int, ...] | None]]:
        """What ranks differ in: their profile and the branches they hold (None: all)."""
        if placed is None:
            return [(profile, None) for profile in self.profiles]
        found: list[tuple[Profile, tuple[int, ...] | None]] = []
        for members in self.classes:
            for held, _ in self.differing(i, [placed[m] for m in members]):
                found += [(profile, held) for profile in self.columns[members[0]]]
        return found

    def differing(self, i: int, held: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], int]]:
        """Of branch ranks' branches those that cost different things, and how many branch ranks have such."""
        if not self.pricing.is_counted(i):
            return [*Counter(held).items()]
        nums = Counter(map(len, held))
        examples = {len(branches): branches for branches in held}
        return [(examples[num], times) for num, times in nums.items()]

    def _bytes(self, i: int, limit: Limit, is_group: bool, placed: Sequence[tuple[int, ...]] | None) -> Bytes:
        pricing, samples = self.pricing, limit.group if is_group else limit.own
        everything = tuple(range(pricing.num_branches[i]))
        columns = [everything] if placed is None else [placed[m] for m in limit.columns]
        found: list[tuple[Bytes, int]] = []  # with the number of branch ranks
        for held, num in self.differing(i, columns):
            found.append((pricing.memory(i, limit.kind, samples, held, placed is not None, self.layout), num))
        if self.memory == "average":
            sums = zip(*([value * num for value in each] for each, num in found), strict=True)
            return Bytes(*(sum(values) / len(columns) for values in sums))
        return largest([each for each, _ in found])

    def _gathered(self) -> list[tuple[float, ...]]:
        """By element and limit: bytes of its gathered input."""
        inputs = [cost.input_bytes for cost in self.pricing.costs[self.pricing.first.kind]]
        return [tuple(num_bytes * limit.group for limit in self.limits) for num_bytes in inputs]

    def lacking(self, choices: Sequence[Choice]) -> list[float]:
        """By limit: bytes that these choices, one for each element, need beyond it."""
        options = []
        for i, choice in enumerate(choices):
            key = (i == 0, self.pricing.alike[i], choice)
            if key not in self._alone:
                self._alone[key] = self.price(i, choice)
            options.append(self._alone[key])
        used = highest(options, self.pricing.closes, self._gathered())
        return [num_bytes - limit.num_bytes for num_bytes, limit in zip(used, self.limits, strict=True)]

    def bound_s(self) -> float:
        """A lower bound where branches could not be divided exactly: as if they could be cut at will."""
        chain = self.chain()
        options = list(chain.options)
        for i, found in enumerate(options):
            choices = [option for option in found if option.rows == GROUP]
            if not choices or i in (0, len(options) - 1):
                continue
            works = [self._whole(i, profile) for profile in self.profiles]
            most = max(p.speed for column in self.columns for p in column)
            single, total = (min(work[part] for work in works) for part in (0, 1))
            least = self.times * max(single / most, total / (most * self.num_columns))
            options[i] = [
                *found,
                choices[0]._replace(added_s=least + self.times * self._exchange_s(i)),
            ]
        bounded = Chain(options, chain.change_s, chain.closes, chain.unit)
        return min(to_go(bounded)[-1]) + self.pricing.step_s

    def _whole(self, i: int, profile: Profile) -> tuple[float, float]:
        """Seconds at speed 1 of the longest branch, and of all: forward and backward."""
        branches = range(self.pricing.num_branches[i])
        nothing = sum(self.pricing.part(i, profile.kind, profile.group, ())[:2])
        alone = [
            sum(self.pricing.part(i, profile.kind, profile.group, (branch,))[:2]) - nothing
            for branch in branches
        ]
        total = sum(self.pricing.part(i, profile.kind, profile.group, tuple(branches))[:2]) - nothing
        return max(alone, default=0.0), total

    def _exchange_s(self, i: int) -> float:
        """Seconds of the exchanges of a block that is split by branch."""
        pricing, num_sums = self.pricing, self.pricing.num_sums[i]
        cost, seconds = pricing.costs[pricing.first.kind][i], 0.0
        for per_sample in (cost.sum_bytes, cost.hidden_bytes):
            num_bytes = per_sample * max(self.layout.group_samples) / num_sums
            seconds += pricing.links.seconds("all_reduce", self.layout.branch_group, num_bytes)
        return num_sums * seconds

    def _change(self, i: int) -> tuple[float, float]:
        if i == 0 or self.num_columns == 1:
            return 0.0, 0.0
        pricing, group = self.pricing, self.layout.branch_group
        before, here = pricing.costs[pricing.first.kind][i - 1 : i + 1]
        num_bytes = here.input_bytes * self.layout.gathered_samples
        gather = scatter = pricing.links.seconds("all_gather", group, num_bytes)
        # `price` has an all-reduce; this may save more than the all-gather takes
        if pricing.ends_in_sum[i - 1]:
            num_bytes = before.sum_bytes * max(self.layout.group_samples) / pricing.num_sums[i - 1]
            scatter += pricing.links.seconds("reduce_scatter", group, num_bytes)
            scatter -= pricing.links.seconds("all_reduce", group, num_bytes)
        return self.times * gather, self.times * scatter


def _classes(layout: Layout, with_hosts: bool) -> tuple[list[tuple[Profile, ...]], list[list[int]]]:
    """By branch rank the profiles of its devices; and the branch ranks that cannot be told apart."""
    columns, where = [], dict[Hashable, list[int]]()
    for m in range(layout.branch):
        profiles = {
            Profile(row[m].kind, row[m].speed, layout.group_samples[d], layout.own_samples[d][m])
            for d, row in enumerate(layout.ranks)
        }
        columns.append(tuple(sorted(profiles)))
        memory = frozenset(row[m].memory_bytes for row in layout.ranks)
        hosts = frozenset(row[m].host for row in layout.ranks) if with_hosts else None
        where.setdefault((columns[-1], memory, hosts), []).append(m)
    return columns, [*where.values()]


def efficient(options: list[Option]) -> list[Option]:
    """Those that no other makes useless: `chain`'s argument, for one element."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.added_s, -o.drain_s, o.waiting_s, o.memory)):
        for better in kept:
            later = max(option.drain_s - better.drain_s, 0.0) + max(better.waiting_s - option.waiting_s, 0.0)
            if (
                better.rows == option.rows
                and better.added_s + later <= option.added_s
                and all(
                    a <= b
                    for mine, others in zip(better.memory, option.memory, strict=True)
                    for a, b in zip(mine, others, strict=True)
                )
            ):
                break
        else:
            kept.append(option)
    return kept

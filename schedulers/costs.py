"""What a step costs: plain data, measured by the runtime or predicted from a table, read by `predict`.

Costs                     a cost file: everything known of one network on one cluster
 ├─ models: ModelCosts    one for each kind of device
 │   └─ elements          stem, blocks, head: ElementCost
 │       └─ Work          a part of it (replicated, or branches) forward and backward: Curves over samples
 └─ groups: GroupCost     collectives, for sizes of groups: Curves over bytes
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.model_spec import BlockSpec, ModelSpec
from anabranch.schedulers.wording import did_you_mean, first_few, quote

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]
PREDICTED = "predicted, not calibrated"  # the label of figures that nobody measured


@dataclass(frozen=True)
class Curve:
    """A number over x: straight between measured points, the end pieces go on outside, never below 0.

    points: (x, y), x ascending. One point is a constant, none is 0.
    """

    points: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        xs = [x for x, _ in self.points]
        if any(a >= b for a, b in pairwise(xs)):
            raise PlanError(f"a cost curve has points at {xs}: give each x once, ascending")

    @classmethod
    def line(cls, start: float, slope: float) -> Curve:
        """start + slope · x."""
        return cls(((0.0, start), (1.0, start + slope)))

    def __call__(self, x: float) -> float:
        points = self.points
        if len(points) < 2:
            return points[0][1] if points else 0.0
        after = min(max(bisect_right(points, (x, float("inf"))), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), 0.0)


ZERO = Curve()


@dataclass(frozen=True)
class Work:
    """One part of an element on one device, over the number of samples that it runs on (of a micro-batch).

    forward_s, backward_s: seconds at `Device.speed` 1. saved_bytes: kept from forward to backward.
    peak_bytes: the most there while it runs, forward or backward, what is kept and its own gradients included.
    """

    forward_s: Curve = ZERO
    backward_s: Curve = ZERO
    saved_bytes: Curve = ZERO
    peak_bytes: Curve = ZERO


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of parameters: what every rank that runs the element holds, and what goes with each branch."""

    replicated: int = 0
    branches: tuple[int, ...] = ()


@dataclass(frozen=True)
class ElementCost:
    """Stem, head or a block.

    replicated: `enter` and `join` of a block; the whole of stem or head.
    branches: of alike branches entry j - 1 is j of them together, as executed; unequal: entry b is branch b
        alone, and a rank's are added. Stem and head: ().
    sum_bytes, hidden_bytes: a sample's partial sums (reduced forward), gradients with respect to h (reduced
        backward), over all of the block's sums. input_bytes: a sample's input (gathered where splits change).
    parameters: without those that other elements use too (see ModelCosts.shared).
    """

    replicated: Work
    branches: tuple[Work, ...] = ()
    unequal: bool = False
    sum_bytes: float = 0
    hidden_bytes: float = 0
    input_bytes: float = 0
    parameters: ParameterBytes = ParameterBytes()


@dataclass(frozen=True)
class ModelCosts:
    """A network on one kind of device (`Device.kind`).

    elements: "stem", every block and "head" by name. shared: parameters that several elements use, by the
    names in ModelSpec. step_s: what every step costs besides (input, launch gaps, votes).
    optimizer_s_per_byte: by parameter byte. parameter_copies: live bytes for a parameter's byte (itself and the
    optimizer's state: gradients and buckets come on top); update_copies: more while the optimizer runs.
    label: "measured", "extrapolated", "predicted, not calibrated".
    key: what the figures hold for (hardware, versions, shapes), by name.
    """

    kind: str
    elements: Mapping[str, ElementCost]
    shared: Mapping[str, ParameterBytes] = field(default_factory=dict)
    step_s: float = 0.0
    optimizer_s_per_byte: float = 0.0
    parameter_copies: float = 2.0
    update_copies: float = 0.0
    batch_sizes: tuple[int, ...] = ()
    label: str = "measured"
    key: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupCost:
    """One collective over groups of one size, measured while all such groups of the cluster ran it.

    across: the groups span hosts. seconds: over bytes (all_reduce: the buffer; all_gather, reduce_scatter:
    the whole that is gathered or reduced). occupancy: the part of an overlapped transfer's time that is taken
    from compute, in [0, 1].
    """

    collective: Collective
    size: int
    across: bool
    seconds: Curve
    occupancy: float = 0.0


@dataclass(frozen=True)
class Batch:
    """A step's samples: how many, how many of them share a BatchNorm statistic, micro-batches.

    bucket_bytes, first_bucket_bytes: gradients travel in pieces of this size.
    """

    num_samples: int
    bn_batch_size: int
    accumulation: int = 1
    bucket_bytes: int = 25 * 2**20
    first_bucket_bytes: int = 2**20


@dataclass(frozen=True)
class Costs:
    """All that is known: a cost file's content. Sizes of groups not in `groups` follow the cluster's links."""

    models: tuple[ModelCosts, ...]
    groups: tuple[GroupCost, ...] = ()

    @property
    def label(self) -> str:
        """The weakest label of the figures."""
        labels = {model.label for model in self.models}
        order = (PREDICTED, "extrapolated", "measured")
        return next((label for label in order if label in labels), "measured")

    def of(self, kind: str) -> ModelCosts:
        """The costs on a kind of device; PlanError when there are none."""
        for model in self.models:
            if model.kind == kind:
                return model
        kinds = [model.kind for model in self.models]
        raise PlanError(
            f"the costs are for {first_few(kinds)}, a device is {quote(kind)}{did_you_mean(kind, kinds)}: "
            "measure on the devices of this cluster"
        )

    def check(self, model: ModelSpec, kinds: frozenset[str], source: str = "the costs") -> None:
        """Raise PlanError, naming `source`, when these are another network's or another cluster's costs."""
        have = [costs.kind for costs in self.models]
        if missing := sorted(kinds - {*have}):
            raise PlanError(
                f"{source}: measured on {first_few(have)}, the cluster has {first_few(missing)}: measure there"
            )
        for costs in self.models:
            names = ["stem", *model.by_name, "head"]
            absent = [name for name in names if name not in costs.elements]
            extra = [name for name in costs.elements if name not in names]
            if absent or extra:
                what = f"no cost of {first_few(absent)}" if absent else f"a cost of {first_few(extra)}"
                raise PlanError(
                    f"{source}: there is {what}, which the network {'has' if absent else 'has not'}: "
                    "they are the costs of another network; measure this one"
                )
            for block in model.blocks:
                _check_block(block, costs.elements[block.name], source)
            if lost := [name for name in model.users if name not in costs.shared]:
                raise PlanError(
                    f"{source}: no size of {first_few(lost)}, which several blocks of the network share: "
                    "they are the costs of another network; measure this one"
                )

    def check_key(self, wanted: Mapping[str, str], source: str = "the costs") -> None:
        """Raise PlanError, naming the first entry that differs, unless every key has the wanted entries."""
        for costs in self.models:
            for name, value in wanted.items():
                if costs.key.get(name) != value:
                    raise PlanError(
                        f"{source}: measured with {name} = {quote(costs.key.get(name, 'unknown'))}, "
                        f"this run has {quote(value)}: measure again"
                    )


def _check_block(block: BlockSpec, cost: ElementCost, source: str) -> None:
    for what, found in (("branches", cost.branches), ("branch parameters", cost.parameters.branches)):
        if len(found) not in ({block.num_branches} if what == "branches" else {0, block.num_branches}):
            raise PlanError(
                f"{source}: {block.name} has costs of {len(found)} {what}, the network's has "
                f"{block.num_branches} branches: they are the costs of another network; measure this one"
            )

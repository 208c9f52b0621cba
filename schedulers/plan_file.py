"""A plan as a person writes it: rules over block names, resolved for a network into a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from anabranch.schedulers.cluster import Cluster
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.model_spec import EDGES, BlockSpec, ModelSpec
from anabranch.schedulers.pins import check_pin_rules, check_pins
from anabranch.schedulers.plan import (
    SAMPLE,
    BranchPlacement,
    Devices,
    EdgeSplit,
    Plan,
    check_placement,
    check_placements,
    mesh_name,
    neighbour_split,
)
from anabranch.schedulers.registry import schedule
from anabranch.schedulers.request import Pin, Request
from anabranch.schedulers.wording import did_you_mean, first_few, quote


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put the place in the user's file in front of a PlanError."""
    try:
        yield
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


@dataclass(frozen=True)
class BlockRule:
    """One [[blocks]] table, as written, and the line it starts on.

    With split "branch" exactly one of counts and branches is given; with the others none.
    """

    match: str
    split: Literal["sample", "branch", "replicated"]
    branches: tuple[tuple[int, ...], ...] | Literal["even"] | None = None
    counts: tuple[int, ...] | None = None
    line: int = 0

    def elements(self, names: Sequence[str]) -> list[str]:
        """The names that the rule is for. With split "branch" a wildcard passes over stem and head."""
        found = [name for name in names if fnmatchcase(name, self.match)]
        if self.split == "branch" and self.match not in EDGES:
            found = [name for name in found if name not in EDGES]
        return found

    def placement(self, block: BlockSpec, num_ranks: int) -> BranchPlacement:
        """What the rule says for one block; PlanError when it does not fit the block or the mesh."""
        if self.split == "replicated":
            raise PlanError(
                f'{block.name} has split "replicated", which is for stem and head: write "sample" or "branch"'
            )
        if self.split == "sample":
            return SAMPLE
        if self.counts is not None:
            has = f"{block.name} has {block.num_branches} branches, its counts {list(self.counts)}"
            if len(self.counts) != num_ranks:
                raise PlanError(
                    f"{has} are for {len(self.counts)} ranks, the mesh has {num_ranks}: give {num_ranks} counts"
                )
            if sum(self.counts) != block.num_branches:
                raise PlanError(f"{has} place {sum(self.counts)}: make them sum to {block.num_branches}")
            return BranchPlacement.from_counts(self.counts)
        if self.branches == "even":
            return BranchPlacement.even(block.num_branches, num_ranks)
        placement = BranchPlacement("branch", self.branches)
        check_placement(block, placement, num_ranks)
        return placement

    def edge(self, name: str) -> EdgeSplit:
        """What the rule says for stem or head."""
        if self.split == "branch":
            raise PlanError(f'{name} has no branches: its split is "sample" or "replicated"')
        return self.split


@dataclass(frozen=True)
class PinRule:
    """One [[pins]] table: a branch rank on the host holds that branch of the blocks."""

    match: str
    branch: int
    host: str
    line: int = 0


@dataclass(frozen=True)
class PlanFile:
    """A plan file's content; `source` is its path, for messages.

    filled_in: the devices are where a plan without any was put, and no wish: their hosts are taken where they are.
    """

    data: int
    branch: int
    rules: tuple[BlockRule, ...] = ()
    devices: Devices | None = None
    samples: tuple[int, ...] | None = None
    scheduler: str | None = None
    source: str = "plan"
    pins: tuple[PinRule, ...] = ()
    filled_in: bool = False

    @property
    def asks_devices(self) -> bool:
        """Whether it must run on its devices, and no others."""
        return self.devices is not None and not self.filled_in

    def on(self, cluster: Cluster) -> PlanFile:
        """The same; without the devices that were filled in where the cluster has not all of them."""
        names = {name for row in self.devices or () for name in row}
        return self if self.asks_devices or names <= cluster.by_name.keys() else replace(self, devices=None)

    @property
    def mesh(self) -> tuple[int, int]:
        """(data, branch)."""
        return self.data, self.branch

    def check_mesh(self, mesh: tuple[int, int] | None) -> None:
        """Raise PlanError when a mesh is asked for that is not the file's."""
        if mesh is not None and mesh != self.mesh:
            raise PlanError(
                f"{self.source}: its mesh is {mesh_name(*self.mesh)}, {mesh_name(*mesh)} was asked for "
                "(data x branch): change one of them, or leave the mesh to the file"
            )

    def placements(self, model: ModelSpec) -> tuple[dict[str, BranchPlacement], dict[str, EdgeSplit]]:
        """What the rules place: blocks in the network's order, and stem and head where a rule is for them.

        Raises PlanError, with file and line, when an element is matched twice, when a rule matches none, or
        does not fit what it matches.
        """
        names = ["stem", *model.by_name, "head"]
        rule_of: dict[str, BlockRule] = {}
        for rule in self.rules:
            found = rule.elements(names)
            if not found:
                raise PlanError(
                    f"{self._at(rule)}: match = {quote(rule.match)} is for no block"
                    f"{did_you_mean(rule.match, [*names, *globs(names)])}; "
                    f"the blocks are {first_few([*model.by_name])}"
                )
            for name in found:
                if name in rule_of:
                    first = rule_of[name]
                    raise PlanError(
                        f"{self._at(rule)}: {name} is matched twice, by {quote(first.match)} "
                        f"({self._at(first)}) and {quote(rule.match)} ({self._at(rule)}): let one rule match it"
                    )
                rule_of[name] = rule
        blocks: dict[str, BranchPlacement] = {}
        edges: dict[str, EdgeSplit] = {}
        for name in [name for name in names if name in rule_of]:
            with located(self._at(rule_of[name])):
                if name in EDGES:
                    edges[name] = rule_of[name].edge(name)
                else:
                    blocks[name] = rule_of[name].placement(model.by_name[name], self.branch)
        with located(self.source):
            check_placements(model, self.branch, blocks, edges)
        return blocks, edges

    def resolve(
        self,
        model: ModelSpec,
        cluster: Cluster | None = None,
        *,
        mesh: tuple[int, int] | None = None,
        costs: Costs | None = None,
        batch: Batch | None = None,
    ) -> Plan:
        """The plan for a network; with a cluster, its devices are checked or filled in (again, see `on`).

        Blocks that no rule matches go to the file's scheduler, which is asked only then and needs the
        cluster. A mesh, when given, must be the file's. Raises PlanError, with the file, for the first rule
        broken.
        """
        self.check_mesh(mesh)
        blocks, edges = self.placements(model)
        devices = self.devices
        if cluster is not None:
            devices = self.on(cluster).devices
            with located(self.source):
                devices = devices or cluster.place(self.data, self.branch)
                cluster.check(devices)
        missing = [name for name in model.by_name if name not in blocks]
        if missing:
            if self.scheduler is None:
                raise PlanError(
                    f"{self.source}: no rule matches {first_few(missing)}: add [[blocks]] rules, "
                    'or name a scheduler for the rest in [mesh], as in scheduler = "even"'
                )
            if cluster is None:
                raise PlanError(
                    f"{self.source}: {first_few(missing)} are left to the scheduler {quote(self.scheduler)}, "
                    "which needs a cluster: give one, or match every block"
                )
            return schedule(self.scheduler, model, cluster, partial=self, costs=costs, batch=batch)
        first, last = model.blocks[0].name, model.blocks[-1].name
        plan = Plan(
            self.data,
            self.branch,
            blocks,
            stem=edges.get("stem", neighbour_split(blocks[first])),
            head=edges.get("head", neighbour_split(blocks[last])),
            devices=devices,
            samples=self.samples,
            scheduler=self.scheduler,
        )
        with located(self.source):
            plan.check(model)
        if cluster is not None and self.pins:
            check_pins(plan, Request(model, cluster, pins=self.pinned(model, cluster)))
        return plan

    def pinned(self, model: ModelSpec, cluster: Cluster) -> tuple[Pin, ...]:
        """The pins, block by block. Raises PlanError, with file and line, where they cannot hold together."""
        found: list[Pin] = []
        for rule in self.pins:
            names = [name for name in model.by_name if fnmatchcase(name, rule.match)]
            if not names:
                raise PlanError(
                    f"{self._at(rule)}: the pin's match = {quote(rule.match)} is for no block"
                    f"{did_you_mean(rule.match, [*model.by_name, *globs([*model.by_name])])}"
                )
            found += [Pin(name, rule.branch, rule.host, self._at(rule)) for name in names]
        check_pin_rules(
            found, model, cluster, self.data, self.branch, self.devices, self.placements(model)[0]
        )
        return tuple(found)

    def _at(self, rule: BlockRule | PinRule) -> str:
        return f"{self.source}:{rule.line}"


def globs(names: Sequence[str]) -> list[str]:
    """The globs over the groups of the names: "stage1.*" for stage1.block1, stage1.block2."""
    return list(dict.fromkeys(name.rpartition(".")[0] + ".*" for name in names if "." in name))

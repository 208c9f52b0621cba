"""What a scheduler is asked, and help to answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from anabranch.schedulers.cluster import Cluster
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.model_spec import EDGES, BlockSpec, ModelSpec
from anabranch.schedulers.plan import SAMPLE, BranchPlacement, Devices, EdgeSplit, Plan, neighbour_split


@dataclass(frozen=True)
class Pin:
    """A branch of a block that a branch rank on a host must hold. where: the place in the plan file."""

    block: str
    branch: int
    host: str
    where: str = "a pin"


@dataclass(frozen=True)
class Request:
    """A network, a cluster, and what a plan file has settled.

    mesh: (data, branch); None: the scheduler's choice. fixed, edges: blocks, and stem and head, as placed.
    devices, samples: the plan's; None: open. costs: what was measured. batch: a step's samples.
    pins: branches that hosts must hold. standing: devices of workers that run already, by rank; None: any order.
    """

    model: ModelSpec
    cluster: Cluster
    mesh: tuple[int, int] | None = None
    fixed: Mapping[str, BranchPlacement] = field(default_factory=dict)
    edges: Mapping[str, EdgeSplit] = field(default_factory=dict)
    devices: Devices | None = None
    samples: tuple[int, ...] | None = None
    costs: Costs | None = None
    batch: Batch | None = None
    pins: tuple[Pin, ...] = ()
    standing: tuple[str, ...] | None = None

    def place(self, data: int, branch: int) -> Devices:
        """Devices for a mesh: those settled, else the workers' as they stand, else as the cluster deals them."""
        if self.devices is not None:
            return self.devices
        if self.standing is None:
            return self.cluster.place(data, branch)
        return tuple(self.standing[d * branch : (d + 1) * branch] for d in range(data))

    def complete(self, data: int, branch: int, place: Callable[[BlockSpec], BranchPlacement]) -> Plan:
        """The plan on a mesh in which `place` decides for the blocks that are not fixed.

        It decides once for blocks that share a parameter; they follow a fixed one among them, and are split
        "sample" where their sharing allows nothing else. Stem and head get their neighbour's split. Devices
        are filled in.
        """
        by_name = self.model.by_name
        blocks, edges = dict(self.fixed), dict(self.edges)
        for unit in self.model.units:
            members = [by_name[name] for name in unit if name in by_name]
            given = [blocks[block.name] for block in members if block.name in blocks]
            alike = len(members) == len(unit) and len({block.num_branches for block in members}) == 1
            for block in members:
                if not given:
                    given = [place(block) if alike else SAMPLE]
                blocks.setdefault(block.name, given[0])
        blocks = {name: blocks[name] for name in by_name}
        ends = blocks[self.model.blocks[0].name], blocks[self.model.blocks[-1].name]
        for edge, neighbour in zip(EDGES, ends, strict=True):
            unit = next(unit for unit in self.model.units if edge in unit)
            tied: list[EdgeSplit] = [edges[name] for name in unit if name in edges] or ["sample"]
            edges.setdefault(edge, tied[0] if len(unit) > 1 else neighbour_split(neighbour))
        return Plan(
            data,
            branch,
            blocks,
            stem=edges["stem"],
            head=edges["head"],
            devices=self.place(data, branch),
            samples=self.samples,
        )

"""The plan: a mesh, its devices, and where each block's branches run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.model_spec import EDGES, BlockSpec, ModelSpec
from anabranch.schedulers.wording import did_you_mean, first_few, lists, quote

Split = Literal["sample", "branch"]
EdgeSplit = Literal["sample", "replicated"]
Devices = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class BranchPlacement:
    """How a block uses its branch group.

    split "sample": every rank runs all branches on its part of the samples; branches is None.
    split "branch": branches[r] are those of branch rank r, ascending; a rank may have none.
    """

    split: Split
    branches: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if (
            self.branches is not None
        ):  # a rank's branches are a set: one spelling makes equal placements equal
            object.__setattr__(self, "branches", tuple(tuple(sorted(held)) for held in self.branches))

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> BranchPlacement:
        """Split "branch" in which branch rank r has the next counts[r] branches."""
        ends = accumulate(counts)
        return cls("branch", tuple(tuple(range(e - c, e)) for e, c in zip(ends, counts, strict=True)))

    @classmethod
    def even(cls, num_branches: int, num_ranks: int) -> BranchPlacement:
        """Split "branch", neighbouring branches together, counts that differ by at most one, larger first."""
        each, more = divmod(num_branches, num_ranks)
        return cls.from_counts([each + (rank < more) for rank in range(num_ranks)])

    def __str__(self) -> str:
        return quote(self.split) + (f" {lists(self.branches)}" if self.branches is not None else "")


SAMPLE = BranchPlacement("sample")


@dataclass(frozen=True)
class Plan:
    """Where everything runs: `data` replicas, each on a branch group of `branch` ranks.

    blocks: every block's placement, in the network's order.
    devices: [data][branch] = "host:index"; None until a cluster is known.
    samples: BN groups per data replica and step, as a ratio; None: even.
    scheduler: who placed; None: a person.
    """

    data: int
    branch: int
    blocks: dict[str, BranchPlacement]
    stem: EdgeSplit
    head: EdgeSplit
    devices: Devices | None = None
    samples: tuple[int, ...] | None = None
    scheduler: str | None = None

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data * self.branch

    def held(self, block: BlockSpec, branch_rank: int) -> tuple[int, ...]:
        """The branches of the block that a branch rank holds, ascending; under split "sample" all of them."""
        branches = self.blocks[block.name].branches
        return tuple(range(block.num_branches)) if branches is None else branches[branch_rank]

    def on_ranks(self, ranks: Sequence[int]) -> Plan:
        """The same placement on some of its ranks: whole branch groups in a row, as a run has that lost or found some.

        A replica made of several ranks' rows counts for as many samples as its first rank's did.
        """
        data = len(ranks) // self.branch
        rows = [ranks[d * self.branch : (d + 1) * self.branch] for d in range(data)]
        names = [name for row in self.devices or () for name in row]
        devices = tuple(tuple(names[rank] for rank in row) for row in rows) if names else None
        samples = tuple(self.samples[row[0] // self.branch] for row in rows) if self.samples else None
        return replace(self, data=data, devices=devices, samples=samples)

    def check(self, model: ModelSpec) -> None:
        """Raise PlanError with the first rule that the plan breaks for this network."""
        check_mesh(self.data, self.branch)
        if self.devices is not None:
            check_devices(self.devices, self.data, self.branch)
        if self.samples is not None:
            check_samples(self.samples, self.data)
        for name in self.blocks:
            if name not in model.by_name:
                raise PlanError(f"the network has no block {quote(name)}{did_you_mean(name, model.by_name)}")
        missing = [name for name in model.by_name if name not in self.blocks]
        if missing:
            raise PlanError(f"no placement for {first_few(missing)}: place every block")
        check_placements(model, self.branch, self.blocks, {"stem": self.stem, "head": self.head})


def neighbour_split(block: BranchPlacement) -> EdgeSplit:
    """The split of a stem or head that nobody chose: no exchange between it and the block next to it."""
    return "replicated" if block.split == "branch" else "sample"


def mesh_name(data: int, branch: int) -> str:
    """The mesh as a person writes it: 2x4 is data x branch."""
    return f"{data}x{branch}"


def check_mesh(data: int, branch: int) -> None:
    """Both axes have at least one rank."""
    if data < 1 or branch < 1:
        raise PlanError(f"the mesh is {mesh_name(data, branch)} (data x branch): both axes need at least 1")


def check_devices(devices: Sequence[Sequence[str]], data: int, branch: int) -> None:
    """One row a replica, one "host:index" a branch rank, none twice."""
    shape = [len(row) for row in devices]
    if shape != [branch] * data:
        raise PlanError(
            f"devices has rows of {shape} devices, the mesh is {mesh_name(data, branch)} (data x branch): "
            f"give {data} rows of {branch}"
        )
    names = [name for row in devices for name in row]
    for name in names:
        if not re.fullmatch(r".+:\d+", name):
            raise PlanError(f'device {quote(name)} is not "host:index": write it as "a:0"')
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise PlanError(f"devices names {first_few(twice)} more than once: a device runs one rank")


def check_samples(samples: Sequence[int], data: int) -> None:
    """One positive number a replica."""
    if len(samples) != data or min(samples, default=0) < 1:
        raise PlanError(
            f"samples is {list(samples)}, the mesh has {data} replicas: give {data} numbers, each at least 1"
        )


def check_placement(block: BlockSpec, placement: BranchPlacement, num_ranks: int) -> None:
    """Every branch of the block is on exactly one branch rank."""
    branches = placement.branches
    if placement.split not in ("sample", "branch"):
        raise PlanError(f'{block.name} has split {quote(placement.split)}: blocks have "sample" or "branch"')
    if placement.split == "sample":
        if branches is not None:
            raise PlanError(
                f'{block.name} has split "sample" and branches {lists(branches)}: under it all ranks have all'
            )
        return
    if branches is None:
        raise PlanError(f'{block.name} has split "branch" and no branches: say which rank has which')
    has = f"{block.name} has {block.num_branches} branches, its branches {lists(branches)}"
    if len(branches) != num_ranks:
        raise PlanError(
            f"{has} are for {len(branches)} branch ranks, the mesh has {num_ranks}: give {num_ranks} lists"
        )
    placed = Counter(index for held in branches for index in held)
    remedy = f"place each of 0 to {block.num_branches - 1} exactly once"
    for indices, what in (
        ([index for index in placed if not 0 <= index < block.num_branches], "place {}, which it has not"),
        ([index for index, times in placed.items() if times > 1], "place {} more than once"),
        ([index for index in range(block.num_branches) if index not in placed], "leave out {}"),
    ):
        if indices:
            raise PlanError(
                f"{has} {what.format(first_few([str(index) for index in sorted(indices)]))}: {remedy}"
            )


def check_placements(
    model: ModelSpec, num_ranks: int, blocks: Mapping[str, BranchPlacement], edges: Mapping[str, EdgeSplit]
) -> None:
    """Every placement given is right by itself, and elements that share a parameter are placed alike.

    Those not given are left out: a part of a plan can be checked too.
    """
    for name, placement in blocks.items():
        check_placement(model.by_name[name], placement, num_ranks)
    for name, split in edges.items():
        if split not in ("sample", "replicated"):
            raise PlanError(f'{name} has split {quote(split)}: it can be "sample" or "replicated"')
    if num_ranks > 1:  # one rank has all branches and all samples: every split is the same
        _check_shared(model, blocks, edges)


def _check_shared(
    model: ModelSpec, blocks: Mapping[str, BranchPlacement], edges: Mapping[str, EdgeSplit]
) -> None:
    for parameter, users in model.users.items():
        shown = {user: quote(edges[user]) for user in users if user in edges}
        shown |= {user: str(blocks[user]) for user in users if user in blocks}
        apart = [user for user in users if user in shown and shown[user] != quote("sample")]
        other = _unlike(model, users, apart[0]) if apart else None
        if other is not None:
            raise PlanError(
                f"{apart[0]} and {other[0]} share the parameter {parameter}, and {other[1]}: "
                f'make both "sample" ({apart[0]} is {shown[apart[0]]})'
            )
        placed = list(shown)
        for user in placed[1:]:
            if shown[user] != shown[placed[0]]:
                raise PlanError(
                    f"{placed[0]} and {user} share the parameter {parameter}, and are placed apart "
                    f"({shown[placed[0]]} and {shown[user]}): give both the same split and the same branches"
                )


def _unlike(model: ModelSpec, users: Sequence[str], user: str) -> tuple[str, str] | None:
    """A user of the same parameter with which `user` can only agree on "sample", and why."""
    for other in users:
        if (other in EDGES) != (user in EDGES):
            edge = other if other in EDGES else user
            return other, f"{edge} has no branches"
        if other not in EDGES and (mine := model.by_name[user].num_branches) != (
            theirs := model.by_name[other].num_branches
        ):
            return other, f"have {mine} and {theirs} branches"
    return None

"""What a scheduler knows of a network: its blocks, their numbers of branches, the parameters they share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from anabranch.schedulers.errors import PlanError

EDGES = ("stem", "head")  # the elements of a network that are not blocks


@dataclass(frozen=True)
class BlockSpec:
    """One block: the plan's unit.

    num_branches: terms of its sum; num_sums: sums in a row (each costs its own reduction).
    shares: names of its parameters that other elements (blocks, stem, head) use too.
    ends_in_sum: its output is its last sum and what is added to it: each rank can receive its own rows only.
    """

    name: str
    num_branches: int
    num_sums: int = 1
    shares: frozenset[str] = frozenset()
    ends_in_sum: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise PlanError("a block has no name: plan files find blocks by name")
        if self.num_branches < 1 or self.num_sums < 1:
            raise PlanError(
                f"{self.name} has {self.num_branches} branches, {self.num_sums} sums: give at least 1 of each"
            )


@dataclass(frozen=True)
class ModelSpec:
    """A network: stem, blocks in order, head. Raises PlanError when it has no block or two of one name."""

    blocks: tuple[BlockSpec, ...]
    stem_shares: frozenset[str] = frozenset()
    head_shares: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        seen = set(EDGES)
        for block in self.blocks:
            if block.name in seen:
                raise PlanError(f"two elements of the network are named {block.name}: rename the block")
            seen.add(block.name)
        if not self.blocks:
            raise PlanError("the network has no blocks: nothing is there to place")

    @cached_property
    def by_name(self) -> dict[str, BlockSpec]:
        """The blocks by name, in order."""
        return {block.name: block for block in self.blocks}

    @cached_property
    def users(self) -> dict[str, tuple[str, ...]]:
        """Each parameter that several elements use, with those elements in the network's order."""
        found: dict[str, list[str]] = {}
        elements = [
            ("stem", self.stem_shares),
            *((b.name, b.shares) for b in self.blocks),
            ("head", self.head_shares),
        ]
        for name, shares in elements:
            for parameter in sorted(shares):
                found.setdefault(parameter, []).append(name)
        return {parameter: tuple(names) for parameter, names in found.items() if len(names) > 1}

    @cached_property
    def units(self) -> tuple[tuple[str, ...], ...]:
        """Placement units: elements tied by shared parameters, directly or through others; most are alone.

        Units, and the elements in them, come in the network's order.
        """
        unit_of = {name: [name] for name in ("stem", *self.by_name, "head")}
        for first, *others in self.users.values():
            for other in others:
                if unit_of[first] is not unit_of[other]:
                    unit_of[first].extend(unit_of[other])
                    for name in unit_of[other]:
                        unit_of[name] = unit_of[first]
        order = {name: index for index, name in enumerate(unit_of)}
        distinct = {id(unit): unit for unit in unit_of.values()}.values()
        return tuple(tuple(sorted(unit, key=order.__getitem__)) for unit in distinct)

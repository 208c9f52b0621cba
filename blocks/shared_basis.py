"""Which parameters of a network form its shared filter bases, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.filter_sum import FilterSum
from anabranch.blocks.network import named_blocks


@dataclass(frozen=True)
class BasisGroup:
    """A basis matrix B_g of Equation 7: the rows (dim 0, flattened) of these parameters, one element each.

    name: "stage2.basis". kind: the name without the stage; groups of a kind are one mean of the regularizer.
    shared, own: full parameter names, each parameter once.
    """

    name: str
    kind: str
    shared: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """All names, shared ones first."""
        return self.shared + self.own


def basis_groups(network: nn.Module, *, joint: bool = True) -> list[BasisGroup]:
    """The shared bases of a network (or of a rank's part of it), stage by stage.

    joint: the two bases of basic blocks ("double") are one matrix, "stage2.basis"; else "stage2.basis1" and
        "stage2.basis2". Convolutions of different places (a bottleneck's 3×3 and 1×1) always are apart.
    """
    found: dict[tuple[str, str], dict[int, tuple[str, dict[int, str]]]] = {}
    for block_name, block in named_blocks(network):
        for path, block_sum in branch_sums(block):
            if not isinstance(block_sum, FilterSum):
                continue
            held = dict(block_sum.named_parameters(remove_duplicate=False))
            prefix = ".".join(name for name in ("blocks", block_name, path) if name)
            for part, (shared, *own) in block_sum.bases():
                bases = found.setdefault((block_name.rpartition(".")[0], str(part)), {})
                _, rows = bases.setdefault(id(held[shared]), (f"{prefix}.{shared}", {}))
                for name in own:
                    rows.setdefault(id(held[name]), f"{prefix}.{name}")
    groups = []
    for (stage, place), bases in found.items():
        members = [([shared], list(own.values())) for shared, own in bases.values()]
        if joint:
            members = [([n for shared, _ in members for n in shared], [n for _, own in members for n in own])]
        for number, (shared_rows, own_rows) in enumerate(members, 1):
            kind = place if len(members) == 1 else f"{place}{number}"
            name = f"{stage}.{kind}".lstrip(".")
            groups.append(BasisGroup(name, kind, tuple(shared_rows), tuple(own_rows)))
    return groups

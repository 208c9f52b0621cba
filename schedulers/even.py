"""The scheduler "even": every block's branches spread evenly over the branch group."""

from __future__ import annotations

from anabranch.schedulers.model_spec import BlockSpec
from anabranch.schedulers.plan import SAMPLE, BranchPlacement, Plan
from anabranch.schedulers.registry import register
from anabranch.schedulers.request import Request


@register("even")
def even(request: Request) -> Plan:
    """Split "branch" everywhere, counts as even as possible (5 over 2 is 3 + 2).

    Without a mesh all devices are one branch group. Blocks that share a parameter with the stem, the head or
    a block of another number of branches are split "sample"; so are all where a branch group is one rank.
    """
    data, branch = request.mesh or (1, len(request.cluster.devices))

    def place(block: BlockSpec) -> BranchPlacement:
        return SAMPLE if branch == 1 else BranchPlacement.even(block.num_branches, branch)

    return request.complete(data, branch, place)

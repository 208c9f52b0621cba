"""The scheduler "manual": a plan file that places every block; nothing is decided."""

from __future__ import annotations

from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.model_spec import BlockSpec
from anabranch.schedulers.plan import BranchPlacement, Plan
from anabranch.schedulers.registry import register
from anabranch.schedulers.request import Request
from anabranch.schedulers.wording import quote


@register("manual")
def manual(request: Request) -> Plan:
    """The file's placements. Raises PlanError for the first block that it leaves open."""
    if request.mesh is None:
        raise PlanError(
            'the scheduler "manual" places what a plan file says, there is none: give a plan file'
        )

    def refuse(block: BlockSpec) -> BranchPlacement:
        raise PlanError(
            f'the scheduler "manual" places only what the plan file says, {quote(block.name)} is in no rule: '
            'add a [[blocks]] rule, or name another scheduler, as in scheduler = "optimal"'
        )

    return request.complete(*request.mesh, refuse)

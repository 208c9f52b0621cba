"""Plans: where each block's branches run. Plain data and pure functions; no torch, no ray."""

from anabranch.schedulers import data, even, greedy, manual, optimal  # noqa: F401  (they register themselves)
from anabranch.schedulers.cluster import Cluster, Device, Link
from anabranch.schedulers.costs import Batch, Costs
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.model_spec import BlockSpec, ModelSpec
from anabranch.schedulers.plan import BranchPlacement, Plan
from anabranch.schedulers.plan_file import PlanFile
from anabranch.schedulers.plan_reader import parse_plan, read_plan
from anabranch.schedulers.plan_writer import format_plan, write_plan
from anabranch.schedulers.predict import Prediction, predict
from anabranch.schedulers.registry import register, schedule, schedulers
from anabranch.schedulers.request import Request

__all__ = [
    "Batch",
    "BlockSpec",
    "BranchPlacement",
    "Cluster",
    "Costs",
    "Device",
    "Link",
    "ModelSpec",
    "Plan",
    "PlanError",
    "PlanFile",
    "Prediction",
    "Request",
    "format_plan",
    "parse_plan",
    "predict",
    "read_plan",
    "register",
    "schedule",
    "schedulers",
    "write_plan",
]

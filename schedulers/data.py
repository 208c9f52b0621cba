"""The scheduler "data": plain data parallelism."""

from __future__ import annotations

from anabranch.schedulers.plan import SAMPLE, Plan
from anabranch.schedulers.registry import register
from anabranch.schedulers.request import Request


@register("data")
def data(request: Request) -> Plan:
    """Split "sample" everywhere; every device its own replica, unless a mesh is asked for."""
    num_replicas, branch = request.mesh or (len(request.cluster.devices), 1)
    return request.complete(num_replicas, branch, lambda block: SAMPLE)

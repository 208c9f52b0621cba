"""Ray, and what every way to start workers shares: the cluster's devices, a worker's context, what can go wrong."""

from anabranch.cluster.errors import ClusterError, StoppedError, WorkerError
from anabranch.cluster.ray_calls import ray_calls
from anabranch.cluster.ray_session import connect, discover, load_ray
from anabranch.cluster.recovery import Recovery
from anabranch.cluster.run import RayRequest, run_on_ray
from anabranch.cluster.supervisor import Stop
from anabranch.cluster.worker_context import WorkerContext

__all__ = [
    "ClusterError",
    "RayRequest",
    "Recovery",
    "Stop",
    "StoppedError",
    "WorkerContext",
    "WorkerError",
    "connect",
    "discover",
    "load_ray",
    "ray_calls",
    "run_on_ray",
]

"""Run a target as one Ray actor per rank: place, start, watch once a second, end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from anabranch.cluster.actors import Target
from anabranch.cluster.errors import ClusterError, StoppedError
from anabranch.cluster.placement import Devices, Host, place, place_spares
from anabranch.cluster.ray_calls import counted
from anabranch.cluster.ray_session import connect, hosts
from anabranch.cluster.recovery import Recovery
from anabranch.cluster.stop_signals import stop_signals
from anabranch.cluster.supervisor import WATCH_S, Stop, Supervisor, Watch
from anabranch.cluster.worker_group import WorkerGroup


@dataclass(frozen=True)
class RayRequest:
    """What to run on: a data × branch mesh of workers, each with a GPU or only with CPUs.

    devices: [data][branch] "host:index", None: free ones. any_gpu: of these only the hosts count, whose GPUs are Ray's
    choice: those that other jobs hold are not missed. address: the cluster's, "" for RAY_ADDRESS or a private
    one. backend: "gloo", "nccl", or "" for nccl on GPUs. port: rank 0's for the process group, 0 for a free one.
    timeout_s: until the workers must have started.
    """

    mesh: tuple[int, int]
    use_gpu: bool = False
    devices: Devices | None = None
    any_gpu: bool = False
    address: str = ""
    backend: str = ""
    port: int = 0
    cpus_per_worker: float = 1.0
    timeout_s: float = 60.0


def run_on_ray(
    target: Target,
    request: RayRequest,
    watch: Watch,
    recovery: Recovery | None = None,
    stop: Stop | None = None,
) -> list[dict[str, Any]]:
    """Run `target` on every rank of the request's mesh; what it returned, by rank.

    `watch` is called about once a second and once at the end. On the first Ctrl-C or SIGTERM the workers are asked to
    stop and their results returned as usual; a second one ends them at once (KeyboardInterrupt). recovery: replaces
    lost ranks; the target must then quiesce (`WorkerContext.await_order`) where it loses another. None: it is an error.
    stop: where the reason to end early is noted, also where it came too late for the targets.

    Raises ClusterError before any target starts when the cluster cannot run this; WorkerError when a worker failed;
    StoppedError when the workers did not end in time after being asked to.
    """
    backend = request.backend or ("nccl" if request.use_gpu else "gloo")
    stop = stop or Stop()
    with connect(request.address), stop_signals(stop):
        group = _start(request, backend, stop, recovery.spares if recovery else 0)
        try:
            refs = group.run(target, backend, request.use_gpu, recovery is not None)
            with group.reassured():
                return Supervisor(group, refs, watch, stop, recovery, request.mesh).supervise()
        finally:
            group.end()


def _start(request: RayRequest, backend: str, stop: Stop, num_spares: int) -> WorkerGroup:
    """The actors, each on the device that it should have, rank 0 with the port for the process group."""
    found = hosts()
    if backend == "nccl" and not (request.use_gpu and any(host.gpus for host in found)):
        raise ClusterError(
            f"launch.backend is nccl, which needs CUDA GPUs: the workers asked for have none "
            f"({', '.join(f'{host.name}: {host.gpus} GPUs' for host in found)}); make it gloo"
        )
    seats = place(
        found,
        request.mesh,
        use_gpu=request.use_gpu,
        cpus_per_worker=request.cpus_per_worker,
        devices=request.devices,
        any_gpu=request.any_gpu,
    )
    spares = place_spares(found, seats, num_spares, request.use_gpu, request.cpus_per_worker)
    reserved: dict[Host, int] = {}
    while True:
        group = WorkerGroup(seats, request.use_gpu, request.cpus_per_worker, reserved, spares)
        try:
            misplaced = _await_start(group, request, stop)
        except BaseException:
            group.end()
            raise
        if not misplaced:
            return group
        # Ray chose other GPUs of these hosts than the plan. Once the job holds all of a host's, Ray can give none of
        # the plan's to another job, and which of them a rank uses is ours to say.
        group.end()
        for host in misplaced:
            if host.free_gpus < host.gpus:
                raise ClusterError(
                    f"mesh.devices names GPUs of {host.name} that Ray did not give: other jobs hold "
                    f"{host.gpus - host.free_gpus} of its {host.gpus}; leave devices out of the plan, or wait for them"
                )
            reserved[host] = host.gpus - sum(seat.host == host for seat in seats) - spares.count(host)


def _await_start(group: WorkerGroup, request: RayRequest, stop: Stop) -> list[Host]:
    import ray

    refs = group.probe(request.port)
    deadline = time.monotonic() + request.timeout_s
    waiting = refs
    while waiting:
        _, waiting = counted("start_wait", ray.wait, refs, num_returns=len(refs), timeout=WATCH_S)
        if stop.reason:
            raise StoppedError(f"stopped ({stop.reason}) before the workers started", stop.reason)
        if waiting and time.monotonic() > deadline:
            raise ClusterError(
                f"{len(waiting)} of {len(refs)} workers did not start in {request.timeout_s:g} s: "
                "other jobs may hold the cluster (see `ray status`); ask for fewer workers or a longer timeout_s"
            )
    misplaced = group.take_seats(refs)
    if group.first.port is None:
        raise ClusterError(
            f"port {request.port} is in use on {group.seats[0].host.name} ({group.first.address}), where rank 0 "
            "runs: choose another launch.port, or 0 for a free one"
        )
    return misplaced

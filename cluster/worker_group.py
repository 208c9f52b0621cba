"""The actors of one run, seen from the driver: created together, asked about once a second, ended together."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from anabranch.cluster.actors import Probe, Target, Worker
from anabranch.cluster.environment import thread_variables
from anabranch.cluster.errors import ClusterError
from anabranch.cluster.failures import Failure
from anabranch.cluster.placement import Host, Seat
from anabranch.cluster.ray_calls import counted
from anabranch.cluster.ray_session import note_given_back

_NODE_LABEL = "ray.io/node-id"
_STDERR_LINES = 20
# Threads of an actor: the target's, and some for what the controller asks meanwhile.
_ACTOR_THREADS = 4


class WorkerGroup:
    """One placement group with a bundle for each rank on its host, and an actor in each.

    reserved: GPUs to hold besides, by host, so that every one of the host's GPUs is this group's.
    """

    def __init__(
        self, seats: tuple[Seat, ...], use_gpu: bool, cpus_per_worker: float, reserved: dict[Host, int]
    ) -> None:
        from ray.util.placement_group import placement_group

        self.seats = seats
        hosts = [seat.host for seat in seats] + list(reserved)
        share = {"CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        bundles = [share] * len(seats) + [{"GPU": float(num)} for num in reserved.values()]
        self._placement = counted(
            "placement_group",
            placement_group,
            bundles,
            strategy="PACK",
            bundle_label_selector=[{_NODE_LABEL: host.node_id} for host in hosts],
        )
        threads = [seat.num_threads for seat in seats] + [1] * len(reserved)
        actors = [self._create(index, bundle, threads[index]) for index, bundle in enumerate(bundles)]
        self._actors, self._holders = actors[: len(seats)], actors[len(seats) :]
        self._hosts = hosts
        self._probes: list[Probe] = []
        self._gpus: list[str | None] = [None] * len(seats)
        self._status_refs: list[Any] = [None] * len(seats)
        self._statuses: list[dict[str, Any]] = []
        self._answered = [time.monotonic()] * len(seats)

    def _create(self, index: int, bundle: dict[str, float], num_threads: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        create = ray.remote(Worker).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=_ACTOR_THREADS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
        )
        return counted("create_actor", create.remote, thread_variables(num_threads))

    def probe(self, port: int) -> list[Any]:
        """Ask every actor where it is (rank 0 holds `port`); refs that are ready once the actors live."""
        actors = self._actors + self._holders
        return [
            counted("probe", actor.probe.remote, port if rank == 0 else 0)
            for rank, actor in enumerate(actors)
        ]

    def take_seats(self, probe_refs: list[Any]) -> list[Host]:
        """Give every rank the GPU that the plan names; the hosts on which Ray gave others and holds some back.

        A plan's index counts the host's GPUs in the order of Ray's numbers for them, which are known where this
        group holds all of them, and are else taken to begin at 0. Raises ClusterError when an actor did not start.
        """
        import ray
        from ray.exceptions import RayError

        for host, ref in zip(self._hosts, probe_refs, strict=True):
            try:
                probe: Any = counted("probe_result", ray.get, ref)
            except RayError as error:
                raise ClusterError(f"a worker on host {host.name} did not start: {error}") from error
            self._probes.append(probe)
        given: dict[Host, list[str]] = {}
        for host, probe in zip(self._hosts, self._probes, strict=True):
            given.setdefault(host, []).extend(probe.gpus)
        planned: dict[Host, set[str]] = {}
        for rank, seat in enumerate(self.seats):
            ids = sorted(given[seat.host], key=lambda id: (len(id), id))
            if seat.gpu is None:
                self._gpus[rank] = next(iter(self._probes[rank].gpus), None)
            else:
                self._gpus[rank] = ids[seat.gpu] if len(ids) == seat.host.gpus else str(seat.gpu)
                planned.setdefault(seat.host, set()).add(str(self._gpus[rank]))
        self._statuses = [
            {"rank": seat.rank, "host": seat.host.name, "device": self._device(seat), "phase": "starting"}
            for seat in self.seats
        ]
        return [host for host, ids in planned.items() if not ids <= set(given[host])]

    def _device(self, seat: Seat) -> str:
        gpu = self._gpus[seat.rank]
        return f"{seat.host.name}:{seat.local_rank if gpu is None else gpu}"

    @property
    def first(self) -> Probe:
        """What rank 0 found."""
        return self._probes[0]

    def run(self, target: Target, backend: str, use_gpu: bool) -> list[Any]:
        """Start the target on every rank; refs to results or Failures, by rank."""
        from ray import cloudpickle

        pickled = cloudpickle.dumps(target)  # type: ignore[no-untyped-call]
        world_size = len(self.seats)
        return [
            counted(
                "run",
                self._actors[seat.rank].run.remote,
                pickled,
                {
                    "rank": seat.rank,
                    "world_size": world_size,
                    "local_rank": seat.local_rank,
                    "host": seat.host.name,
                    "device": "cuda:0" if use_gpu else "cpu",
                    "num_threads": seat.num_threads,
                    "init_method": f"tcp://{self.first.address}:{self.first.port}" if world_size > 1 else "",
                    "backend": backend,
                },
                self._gpus[seat.rank],
            )
            for seat in self.seats
        ]

    def statuses(self, wait_s: float) -> list[dict[str, Any]]:
        """What each worker last told, by rank; slow ones are not waited for longer than `wait_s` altogether.

        Each has `device` as "host:index" and `seen_s`, the seconds since that worker last answered.
        """
        import ray
        from ray.exceptions import RayError

        for rank, actor in enumerate(self._actors):
            if self._status_refs[rank] is None:
                self._status_refs[rank] = counted("watch_status", actor.status.remote)
        refs = list(self._status_refs)
        ready, _ = counted("watch_wait", ray.wait, refs, num_returns=len(refs), timeout=wait_s)
        now = time.monotonic()
        for rank, ref in enumerate(refs):
            if ref not in ready:
                continue
            self._status_refs[rank] = None
            with suppress(RayError):  # a dead actor's end arrives as its result
                self._statuses[rank] |= counted("watch_result", ray.get, ref)
                self._answered[rank] = now
        return [
            status | {"seen_s": now - answered}
            for status, answered in zip(self._statuses, self._answered, strict=True)
        ]

    def request_stop(self, reason: str) -> None:
        """Ask every worker to save and return."""
        for actor in self._actors:
            counted("request_stop", actor.request_stop.remote, reason)

    def result(self, rank: int, ref: Any) -> dict[str, Any] | Failure:
        """What is behind a ready ref of `run`; a Failure too where the process or its answer is lost."""
        import ray
        from ray.exceptions import RayActorError, RayError

        try:
            result: Any = counted("result", ray.get, ref)
            return result  # type: ignore[no-any-return]
        except RayActorError as error:
            # The first lines name Ray's objects; the last says how it ended, and then what that may come from.
            how = str(error).strip().splitlines()[-1].partition("Worker exit detail: ")
            text = f"the worker's process died: {how[2] or how[0]}{self._last_words(rank)}"
        except RayError as error:
            text = str(error)
        return Failure(rank, self.seats[rank].host.name, text, in_collective=False)

    def _last_words(self, rank: int) -> str:
        log = Path(self._probes[rank].stderr)  # is here where the worker ran on this machine
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        own = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
        return "\n".join(["\nIts last words:", *own[-_STDERR_LINES:]]) if own else ""

    def end(self) -> None:
        """Kill every actor and give the resources back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors + self._holders:
            counted("kill", ray.kill, actor)
        counted("remove_placement_group", remove_placement_group, self._placement)
        note_given_back()

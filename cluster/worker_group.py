"""The actors of one run, seen from the driver: created together, asked about once a second, ended together."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anabranch.cluster.actors import Probe, Target, Worker
from anabranch.cluster.environment import thread_variables
from anabranch.cluster.errors import ClusterError
from anabranch.cluster.failures import Failure
from anabranch.cluster.placement import Host, Seat, place_spares
from anabranch.cluster.ray_calls import counted
from anabranch.cluster.ray_session import hosts, note_given_back

_NODE_LABEL = "ray.io/node-id"
_STDERR_LINES = 20
_MEET_S = 5.0
# Threads of an actor: the target's, and some for what the controller asks meanwhile.
_ACTOR_THREADS = 6


@dataclass
class _Spare:
    """A process that has loaded all but its place, in a bundle of its own."""

    bundle: int
    host: Host
    num_threads: int
    actor: Any
    ref: Any


class WorkerGroup:
    """One placement group with a bundle for each rank on its host, and an actor in each.

    reserved: GPUs to hold besides, by host, so that every one of the host's GPUs is this group's. spares: hosts with
    room for one more actor each, which waits to replace a lost one.
    """

    def __init__(
        self,
        seats: tuple[Seat, ...],
        use_gpu: bool,
        cpus_per_worker: float,
        reserved: dict[Host, int],
        spares: tuple[Host, ...] = (),
    ) -> None:
        from ray.util.placement_group import placement_group

        self.seats = list(seats)
        hosts = [seat.host for seat in seats] + list(reserved) + list(spares)
        share = {"CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        bundles = [share] * len(seats) + [{"GPU": float(num)} for num in reserved.values()]
        first_spare = len(bundles)
        bundles += [share] * len(spares)
        self._share, self._spare_places = share, list(enumerate(spares, first_spare))
        self._spares: list[_Spare] = []
        self._bundles = list(range(len(seats)))
        self._placement = counted(
            "placement_group",
            placement_group,
            bundles,
            strategy="PACK",
            bundle_label_selector=[{_NODE_LABEL: host.node_id} for host in hosts],
        )
        threads = [seat.num_threads for seat in seats] + [1] * len(reserved)
        actors = [self._create(index, bundles[index], num) for index, num in enumerate(threads)]
        self._actors, self._holders = actors[: len(seats)], actors[len(seats) :]
        self._hosts = hosts[:first_spare]
        self._probes: list[Probe] = []
        self._stderr: list[str] = []
        self._gpus: list[str | None] = [None] * len(seats)
        self._status_refs: list[Any] = [None] * len(seats)
        self._statuses: list[dict[str, Any]] = []
        self._answered = [time.monotonic()] * len(seats)

    def _create(
        self, index: int, bundle: dict[str, float], num_threads: int, elsewhere: Host | None = None
    ) -> Any:
        import ray
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        strategy = (
            NodeAffinitySchedulingStrategy(elsewhere.node_id, soft=False)
            if elsewhere
            else PlacementGroupSchedulingStrategy(self._placement, index)
        )
        create = ray.remote(Worker).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=_ACTOR_THREADS,
            scheduling_strategy=strategy,
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
            self._stderr.append(probe.stderr)
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
        self._statuses = [self._starting(seat) for seat in self.seats]
        return [host for host, ids in planned.items() if not ids <= set(given[host])]

    def _starting(self, seat: Seat) -> dict[str, Any]:
        return {"rank": seat.rank, "host": seat.host.name, "device": self._device(seat), "phase": "starting"}

    def _device(self, seat: Seat) -> str:
        gpu = self._gpus[seat.rank]
        return f"{seat.host.name}:{seat.local_rank if gpu is None else gpu}"

    @property
    def first(self) -> Probe:
        """What rank 0 found."""
        return self._probes[0]

    def run(self, target: Target, backend: str, use_gpu: bool, recovers: bool = False) -> list[Any]:
        """Start the target on every rank, and on the spares; refs to results or Failures, by rank.

        recovers: whether a rank that loses another waits for an order.
        """
        from ray import cloudpickle

        self._target = cloudpickle.dumps(target)  # type: ignore[no-untyped-call]
        world_size = len(self.seats)
        self._place = {
            "world_size": world_size,
            "device": "cuda:0" if use_gpu else "cpu",
            "init_method": f"tcp://{self.first.address}:{self.first.port}" if world_size > 1 else "",
            "backend": backend,
            "recovers": recovers,
        }
        refs = [
            self._run(
                self._actors[seat.rank],
                seat.host,
                seat.num_threads,
                rank=seat.rank,
                local_rank=seat.local_rank,
            )
            for seat in self.seats
        ]
        for bundle, host in self._spare_places:
            self._add_spare(bundle, host)
        return refs

    def _run(self, actor: Any, host: Host, num_threads: int, **place: Any) -> Any:
        place = {**self._place, "host": host.name, "num_threads": num_threads, **place}
        return counted("run", actor.run.remote, self._target, place, self._gpu_of(place["rank"]))

    def _gpu_of(self, rank: int) -> str | None:
        return self._gpus[rank] if rank >= 0 else None

    def _newcomer(self, bundle: int, host: Host, num_threads: int, *, may_be_gone: bool = False) -> _Spare:
        """A process without a place: it loads what it can, then waits for an order.

        Where the host is gone with its bundle it is on another. Raises ClusterError when none has room.
        """
        found = hosts() if may_be_gone else (host,)
        elsewhere = None
        if host.node_id not in {each.node_id for each in found}:
            use_gpu = "GPU" in self._share
            host = elsewhere = place_spares(
                found, (), 1, use_gpu, self._share["CPU"], "to replace a lost one"
            )[0]
        actor = self._create(bundle, self._share, num_threads, elsewhere)
        ref = self._run(actor, host, num_threads, rank=-1, local_rank=0, generation=-1, init_method="")
        return _Spare(bundle, host, num_threads, actor, ref)

    def _add_spare(self, bundle: int, host: Host) -> None:
        num_threads = next((seat.num_threads for seat in self.seats if seat.host == host), 1)
        self._spares.append(self._newcomer(bundle, host, num_threads))

    def replace(self, rank: int) -> tuple[Any, bool]:
        """Give up a rank's process and let a spare or a new one take its seat: its run's ref, whether it is a spare.

        A new one starts where the lost one was, or on another host where that one is gone; behind a spare that is used
        another is started there. Raises ClusterError when no host has room.
        """
        self.kill(rank)
        lost, seat = self._bundles[rank], self.seats[rank]
        spare = next((spare for spare in self._spares if not self._is_over(spare.ref)), None)
        if spare:
            self._spares.remove(spare)
            new = spare
        else:
            new = self._newcomer(lost, seat.host, seat.num_threads, may_be_gone=True)
        self._bundles[rank], self._actors[rank] = new.bundle, new.actor
        self.seats[rank] = replace(seat, host=new.host, num_threads=new.num_threads)
        self._statuses[rank], self._status_refs[rank] = self._starting(self.seats[rank]), None
        self._answered[rank] = time.monotonic()
        if spare:
            self._add_spare(lost, seat.host)
        return new.ref, spare is not None

    def _is_over(self, ref: Any) -> bool:
        import ray

        return bool(counted("watch_wait", ray.wait, [ref], timeout=0)[0])

    def kill(self, rank: int) -> None:
        """End a rank's process."""
        import ray

        counted("kill", ray.kill, self._actors[rank])

    def quiesce(self, rank: int, generation: int, wait_s: float) -> Any:
        """Ask a rank to leave its process groups: a ref to its state, None if it does not within `wait_s`."""
        return counted("quiesce", self._actors[rank].quiesce.remote, generation, wait_s)

    def whereabouts(self, rank: int, wait_s: float) -> dict[str, Any] | None:
        """A rank's stack and whether it waits for others there; None if it does not answer."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        ref = counted("whereabouts", self._actors[rank].whereabouts.remote)
        with suppress(RayError, GetTimeoutError):
            found: dict[str, Any] = counted("result", ray.get, ref, timeout=wait_s)
            return found
        return None

    def give_orders(self, order: dict[str, Any], generation: int, states: list[dict[str, Any]]) -> None:
        """Send every rank, all quiesced, into the next generation. Raises RayError when rank 0 does not answer."""
        import ray

        self._stderr[: len(self.seats)] = [state["stderr"] for state in states]
        world_size = len(self.seats)
        meeting: Any = ""
        if world_size > 1:
            meeting = counted("result", ray.get, self._actors[0].meeting_point.remote(), timeout=_MEET_S)
        for seat in self.seats:
            place = {
                "rank": seat.rank,
                "local_rank": seat.local_rank,
                "world_size": world_size,
                "generation": generation,
                "init_method": meeting,
            }
            counted("order", self._actors[seat.rank].give_order.remote, {**order, "place": place})

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
        return Failure(rank, self.seats[rank].host.name, text, in_collective=False, died=True)

    def _last_words(self, rank: int) -> str:
        log = Path(self._stderr[rank])  # is here where the worker ran on this machine
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        own = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
        return "\n".join(["\nIts last words:", *own[-_STDERR_LINES:]]) if own else ""

    def end(self) -> None:
        """Kill every actor and give the resources back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors + self._holders + [spare.actor for spare in self._spares]:
            counted("kill", ray.kill, actor)
        counted("remove_placement_group", remove_placement_group, self._placement)
        note_given_back()

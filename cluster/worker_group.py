"""The actors of one run, seen from the driver: created together, asked about once a second, ended together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from anabranch.cluster.actors import ORPHANED_S, Probe, Target, Worker
from anabranch.cluster.environment import thread_share, thread_variables
from anabranch.cluster.errors import ClusterError
from anabranch.cluster.failures import Failure
from anabranch.cluster.member import Member
from anabranch.cluster.placement import Host, Seat, place_more, place_spares
from anabranch.cluster.ray_calls import counted
from anabranch.cluster.ray_session import hosts, living, look, note_given_back

_NODE_LABEL = "ray.io/node-id"
_STDERR_LINES = 20
_MEET_S = 5.0
_REASSURE_S = ORPHANED_S / 4
# Threads of an actor: the target's, and some for what the controller asks meanwhile.
_ACTOR_THREADS = 6


class WorkerGroup:
    """One placement group with a bundle for each rank on its host, and an actor in each.

    members: the ranks' processes, in order. joining: processes for more ranks, until they have loaded (`enlist`).
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

        hosts = [seat.host for seat in seats] + list(reserved) + list(spares)
        share = {"CPU": cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}
        bundles = [share] * len(seats) + [{"GPU": float(num)} for num in reserved.values()]
        first_spare = len(bundles)
        bundles += [share] * len(spares)
        self._share = share
        self.joining: list[Member] = []
        # bundles of ours that nobody is in, and the GPU that was used there
        self._idle: list[tuple[int, Host, str | None]] = []
        self._placement = counted(
            "placement_group",
            placement_group,
            bundles,
            strategy="PACK",
            bundle_label_selector=[{_NODE_LABEL: host.node_id} for host in hosts],
        )
        self.members = [
            Member(seat, index, self._create(index, share, seat.num_threads))
            for index, seat in enumerate(seats)
        ]
        self._holders = [self._create(i, bundles[i], 1) for i in range(len(seats), first_spare)]
        self._spares = [self._waiting(host, bundle) for bundle, host in enumerate(spares, first_spare)]
        self._hosts = hosts
        self._probes: list[Probe] = []
        self._port = 0

    @property
    def seats(self) -> list[Seat]:
        """The ranks' places, in order."""
        return [member.seat for member in self.members]

    def _create(
        self, bundle: int | None, share: dict[str, float], num_threads: int, host: Host | None = None
    ) -> Any:
        """An actor in a bundle of the group, or (None) on a host beside it."""
        import ray
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        if bundle is None:
            assert host is not None, "somewhere"
            strategy: Any = NodeAffinitySchedulingStrategy(host.node_id, soft=False)
        else:
            strategy = PlacementGroupSchedulingStrategy(self._placement, bundle)
        create = ray.remote(Worker).options(
            num_cpus=share.get("CPU", 0),
            num_gpus=share.get("GPU", 0),
            max_concurrency=_ACTOR_THREADS,
            scheduling_strategy=strategy,
        )
        return counted("create_actor", create.remote, thread_variables(num_threads))

    def probe(self, port: int) -> list[Any]:
        """Ask every actor where it is (rank 0 holds `port`); refs that are ready once the actors live."""
        self._port = port
        spares = [spare.actor for spare in self._spares]
        actors = [member.actor for member in self.members] + self._holders + spares
        return [
            counted("probe", actor.probe.remote, port if rank == 0 else 0)
            for rank, actor in enumerate(actors)
        ]

    def take_seats(self, probe_refs: list[Any]) -> list[Host]:
        """Give every rank the GPU that the plan names; the hosts on which Ray gave others and holds some back.

        A plan's index counts the host's GPUs in the order of Ray's numbers for them, which are known where this
        group holds all of them, and are else taken to begin at 0. Spares have those that are left. Raises ClusterError
        when an actor did not start.
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
        for member, probe in zip(self.members, self._probes, strict=False):
            seat, member.stderr = member.seat, probe.stderr
            ids = sorted(given[seat.host], key=lambda id: (len(id), id))
            if seat.gpu is None:
                member.gpu = next(iter(probe.gpus), None)
            else:
                member.gpu = ids[seat.gpu] if len(ids) == seat.host.gpus else str(seat.gpu)
                planned.setdefault(seat.host, set()).add(member.gpu)
            member.begin()
        for spare in self._spares:
            if taken := planned.get(spare.seat.host):
                spare.gpu = next(id for id in given[spare.seat.host] if id not in taken)
                taken.add(spare.gpu)
        return [host for host, ids in planned.items() if not ids <= set(given[host])]

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
        world_size = len(self.members)
        self._place = {
            "world_size": world_size,
            "device": "cuda:0" if use_gpu else "cpu",
            "init_method": f"tcp://{self.first.address}:{self.first.port}" if world_size > 1 else "",
            "backend": backend,
            "recovers": recovers,
        }
        for member in self.members:
            self._run(member)
        for spare in self._spares:
            self._run_waiting(spare)
        return [member.ref for member in self.members]

    def _run(self, member: Member, **place: Any) -> None:
        seat = member.seat
        place = {
            **self._place,
            "rank": seat.rank,
            "local_rank": seat.local_rank,
            "host": seat.host.name,
            "num_threads": seat.num_threads,
            **place,
        }
        member.ref = counted("run", member.actor.run.remote, self._target, place, member.gpu)

    def _run_waiting(self, member: Member) -> None:
        self._run(member, generation=-1, init_method="")

    def _waiting(self, host: Host, bundle: int | None, num_threads: int = 0) -> Member:
        """A process without a place."""
        alike = (seat.num_threads for seat in self.seats if seat.host.node_id == host.node_id)
        num_threads = num_threads or next(alike, 1)
        seat = Seat(-1, host, 0, num_threads)
        return Member(seat, bundle, self._create(bundle, self._share, num_threads, host))

    def _newcomer(
        self, host: Host, bundle: int | None, num_threads: int = 0, gpu: str | None = None
    ) -> Member:
        """One that loads what it can, then waits for an order. gpu: of whom it follows there."""
        member = self._waiting(host, bundle, num_threads)
        member.gpu = gpu
        self._run_waiting(member)
        return member

    def _elsewhere(self) -> Host:
        """A living host with room for one process more. Raises ClusterError when none has any."""
        use_gpu = "GPU" in self._share
        return place_spares(living(hosts()), (), 1, use_gpu, self._share["CPU"], "to replace a lost one")[0]

    def lives(self, rank: int) -> bool:
        """Whether the rank's host is there still."""
        node_id = self.seats[rank].host.node_id
        return bool(living(tuple(host for host in look() if host.node_id == node_id)))

    def replace(self, rank: int, is_there: bool) -> tuple[Any, bool]:
        """Give up a rank's process and let a spare or a new one take its seat: its run's ref, whether it is a spare.

        A new one starts where the lost one was, or on another host where that one is not there; behind a spare that is
        used another is started there. Raises ClusterError when no host has room.
        """
        self.kill(rank)
        lost = self.members[rank]
        seat = lost.seat
        spare = next((spare for spare in self._spares if not self._is_over(spare.ref)), None)
        if spare:
            self._spares.remove(spare)
            new = spare
        elif is_there:
            new = self._newcomer(seat.host, lost.bundle, seat.num_threads, lost.gpu)
        else:
            try:
                host = self._elsewhere()
            except ClusterError as error:
                here = sum(each.host.node_id == seat.host.node_id for each in self.seats)
                ranks = f"{here} rank{'s' if here > 1 else ''}"
                raise ClusterError(
                    f"host {seat.host.name} was lost; no other host has room for its {ranks}"
                ) from error
            new = self._newcomer(host, None, seat.num_threads)
        new.seat = replace(seat, host=new.seat.host, num_threads=new.seat.num_threads)
        self.members[rank] = new
        new.begin()
        if spare and is_there:
            self._spares.append(self._newcomer(seat.host, lost.bundle, gpu=lost.gpu))
        return new.ref, spare is not None

    def room(self, branch: int, most: int) -> int:
        """Whole branch groups more, up to `most`, for which living hosts have room now."""
        return min(most, len(self._places(branch, most)) // branch)

    def _places(self, branch: int, most: int) -> list[Host]:
        found = living(tuple(host for host in look() if self._may_have_room(host)))
        idle = [host.node_id for _, host, _ in self._idle]
        return place_more(found, idle, branch, most, "GPU" in self._share, self._share["CPU"])

    def _may_have_room(self, host: Host) -> bool:
        idle = any(where.node_id == host.node_id for _, where, _ in self._idle)
        return idle or host.free_cpus >= self._share["CPU"]

    def enlist(self, branch: int, num_groups: int) -> list[Any]:
        """Start processes for whole branch groups more, `joining` until they are seated; refs of their runs."""
        places = self._places(branch, num_groups)
        for host in places:
            found = next((idle for idle in self._idle if idle[1].node_id == host.node_id), None)
            self._idle = [idle for idle in self._idle if idle is not found]
            bundle, _, gpu = found or (None, host, None)
            here = sum(each.node_id == host.node_id for each in places)
            self.joining.append(self._newcomer(host, bundle, thread_share(host.cpus, here), gpu))
        return [member.ref for member in self.joining]

    def dismiss(self) -> None:
        """End those who were to join."""
        for member in self.joining:
            self._end(member)
        self.joining = []

    def seat(self) -> list[int]:
        """Those who were to join have the next ranks from now on."""
        first = len(self.members)
        for rank, member in enumerate(self.joining, first):
            here = sum(seat.host.node_id == member.seat.host.node_id for seat in self.seats)
            member.seat = replace(member.seat, rank=rank, local_rank=here)
            member.begin()
            self.members.append(member)
        self.joining = []
        return list(range(first, len(self.members)))

    def keep(self, ranks: Sequence[int]) -> None:
        """Go on with these ranks, in this order: they are 0, 1, … from now on. The others' processes are ended."""
        if list(ranks) == list(range(len(self.members))):
            return
        for rank, member in enumerate(self.members):
            if rank not in ranks:
                self._end(member)
        self.members = [self.members[rank] for rank in ranks]
        for rank, member in enumerate(self.members):
            member.seat = replace(member.seat, rank=rank)

    def _end(self, member: Member) -> None:
        import ray

        counted("kill", ray.kill, member.actor)
        if member.bundle is not None:
            self._idle.append((member.bundle, member.seat.host, member.gpu))

    def _is_over(self, ref: Any) -> bool:
        import ray

        return bool(counted("watch_wait", ray.wait, [ref], timeout=0)[0])

    def kill(self, rank: int) -> None:
        """End a rank's process."""
        import ray

        counted("kill", ray.kill, self.members[rank].actor)

    def quiesce(self, member: Member, generation: int, wait_s: float) -> Any:
        """Ask a process to leave its process groups: a ref to its state, None if it does not within `wait_s`."""
        return counted("quiesce", member.actor.quiesce.remote, generation, wait_s)

    def whereabouts(self, ranks: Iterable[int], wait_s: float) -> dict[int, dict[str, Any] | None]:
        """Each rank's stack and whether it waits for others there; None where it does not answer in time."""
        import ray
        from ray.exceptions import RayError

        refs = {rank: counted("whereabouts", self.members[rank].actor.whereabouts.remote) for rank in ranks}
        found: dict[int, dict[str, Any] | None] = dict.fromkeys(refs)
        ready, _ = counted("watch_wait", ray.wait, list(refs.values()), num_returns=len(refs), timeout=wait_s)
        for rank, ref in refs.items():
            with suppress(RayError):
                place: Any = counted("result", ray.get, ref) if ref in ready else None
                found[rank] = place
        return found

    def give_orders(self, order: dict[str, Any], generation: int) -> None:
        """Send every rank, all quiesced, into the next generation. Raises RayError when rank 0 does not answer."""
        import ray

        world_size = len(self.members)
        meeting: Any = ""
        if world_size > 1:
            first = self.members[0].actor
            asked = first.meeting_point.remote(self._port)
            meeting = counted("result", ray.get, asked, timeout=_MEET_S)
        for member in self.members:
            place = {
                "rank": member.seat.rank,
                "local_rank": member.seat.local_rank,
                "world_size": world_size,
                "generation": generation,
                "init_method": meeting,
            }
            counted("order", member.actor.give_order.remote, {**order, "place": place})

    def statuses(self, wait_s: float, *, anew: bool = False) -> list[dict[str, Any]]:
        """What each worker last told, by rank; slow ones are not waited for longer than `wait_s` altogether.

        anew: a worker that has not answered the question before is asked again, as that answer may be an old one.
        Each has `device` as "host:index" and `seen_s`, the seconds since that worker last answered.
        """
        import ray
        from ray.exceptions import RayError

        for member in self.members:
            if anew or member.status_ref is None:
                member.status_ref = counted("watch_status", member.actor.status.remote)
        for waiting in self._spares + self.joining:
            counted("watch_status", waiting.actor.status.remote)  # for it to know that it is not forgotten
        refs = [member.status_ref for member in self.members]
        ready, _ = counted("watch_wait", ray.wait, refs, num_returns=len(refs), timeout=wait_s)
        for member in self.members:
            if member.status_ref not in ready:
                continue
            ref, member.status_ref = member.status_ref, None
            with suppress(RayError):  # a dead actor's end arrives as its result
                member.told(counted("watch_result", ray.get, ref))
        now = time.monotonic()
        return [member.status | {"seen_s": now - member.answered} for member in self.members]

    @contextmanager
    def reassured(self) -> Iterator[None]:
        """Within the context every process is asked now and then by another thread, whatever this one is at: a file
        system that stands still, a long look at a checkpoint. Else they would take themselves for orphans."""
        from ray.exceptions import RayError

        over = threading.Event()

        def ask() -> None:
            while not over.wait(_REASSURE_S):
                for member in [*self.members, *self._spares, *self.joining]:
                    with suppress(RayError):
                        counted("watch_status", member.actor.status.remote)

        thread = threading.Thread(target=ask, name="reassure workers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def excuse(self, seconds: float) -> None:
        """So long nobody asked the ranks: they were not silent."""
        now = time.monotonic()
        for member in self.members:
            member.answered = min(member.answered + seconds, now)

    def request_stop(self, reason: str) -> None:
        """Ask every worker to save and return."""
        for member in self.members:
            counted("request_stop", member.actor.request_stop.remote, reason)

    def settle(self, wait_s: float) -> None:
        """Lets every worker that lives end what it does beside its target."""
        import ray

        refs = [counted("settle", member.actor.settle.remote, wait_s) for member in self.members]
        counted("watch_wait", ray.wait, refs, num_returns=len(refs), timeout=wait_s)

    def result(self, rank: int, ref: Any) -> dict[str, Any] | Failure:
        """What is behind a ready ref of a rank's run; a Failure too where the process or its answer is lost."""
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
        return Failure(rank, self.members[rank].seat.host.name, text, in_collective=False, died=True)

    def _last_words(self, rank: int) -> str:
        log = Path(self.members[rank].stderr)  # is here where the worker ran on this machine
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        own = [line for line in lines if not line.startswith((":job_id:", ":actor_name:"))]
        return "\n".join(["\nIts last words:", *own[-_STDERR_LINES:]]) if own else ""

    def end(self) -> None:
        """Kill every actor and give the resources back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        actors = [member.actor for member in self.members + self._spares + self.joining] + self._holders
        for actor in actors:
            counted("kill", ray.kill, actor)
        counted("remove_placement_group", remove_placement_group, self._placement)
        note_given_back()

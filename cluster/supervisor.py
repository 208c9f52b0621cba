"""Watching the ranks of a run, replacing those that are lost, going on with fewer where they cannot be.

    rank 1 dies ─► seen (ray.wait)  ─► a newcomer starts, or a spare is taken ────────► it waits for an order
                                    │  (no host has room: its place is vacant)
                                    └► the others are asked to quiesce (groups given up) ─► they wait too
                   all wait: decide, a new meeting point, generation + 1, orders ─► they join, fill the newcomer, go on

Whatever fails in between (a survivor, the newcomer, rank 0 with its meeting point) is replaced as well, and asked
again: only when every rank waits is anything decided. Newcomers for more branch groups (`Growth`) begin such a round
when they have loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from anabranch.cluster.errors import ClusterError, StoppedError
from anabranch.cluster.failures import Failure, worker_error
from anabranch.cluster.growth import Growth
from anabranch.cluster.ray_calls import counted
from anabranch.cluster.recovery import Recovery
from anabranch.cluster.round import Round
from anabranch.cluster.stall import Stall, step_of
from anabranch.cluster.stop_signals import REASONS
from anabranch.cluster.worker_group import WorkerGroup

Watch = Callable[[list[dict[str, Any]]], str | None]
"""Gets the workers' statuses, by rank. Returns None, or the reason for which they should save and end."""

WATCH_S = 1.0
STATUS_WAIT_S = 0.2
LAST_STATUS_WAIT_S = 5.0  # at the end, when all that is left is to hear how it went
# From Ctrl-C: the workers save; with Ray's own end (1.5 s) all processes are gone in ten seconds.
STOP_S = 6.5
# After a failure, for the others' to arrive: a dead process is noticed later than its peers' lost connections.
MORE_FAILURES_S = 1.0
CAUSE_S = 5.0
# Then for saves that were begun before: what is on its way to a disk or a store is not lost with the run.
SETTLE_S = 30.0
# A rank that trains and does not answer for so long is lost: stopped, or its host or network is gone.
LOST_S = 8.0
# The same before the first step: imports hold the interpreter's lock for seconds, on a busy machine for many.
LOST_LOADING_S = 60.0
# Ranks that lost a connection wait so long for word of a death before the controller takes it for a broken network.
CUT_S = 3.0
# A controller that has not looked for so long was stopped itself (Ctrl-Z, a machine that slept), its ranks perhaps too.
STOPPED_S = 5.0
QUIESCE_S = 5.0
NEWCOMER_S = 120.0


class Stop:
    """Why the run should end early, the first reason; set by a signal or the watch."""

    reason: str | None = None

    def __call__(self, reason: str) -> None:
        self.reason = self.reason or reason


class Supervisor:
    """Watches the running ranks of a group to their end. refs: of their runs, by rank. mesh: data, branch."""

    def __init__(
        self,
        group: WorkerGroup,
        refs: list[Any],
        watch: Watch,
        stop: Stop,
        recovery: Recovery | None,
        mesh: tuple[int, int],
    ) -> None:
        self.group, self.watch, self.stop, self.recovery = group, watch, stop, recovery
        self.running = dict(zip(refs, range(len(refs)), strict=True))
        self.results: dict[int, dict[str, Any]] = {}
        self.failures: list[Failure] = []  # those that end the run
        self.deadline = float("inf")
        self.generation, self.num_failures = 0, 0
        self._branch, self._data = mesh[1], mesh[0]  # of the generation
        self._newcomers: set[int] = set()
        self._given_up: dict[int, str] = {}  # rank → why we killed it
        self._stacks: dict[int, str] = {}  # of those that hang
        self._raised: set[tuple[int, str]] = set()  # (step, text) of exceptions that were recovered from
        self._round: Round | None = None
        self._pending: list[tuple[Round, int]] = []  # recovered, until their ranks step in that generation
        self._statuses: list[dict[str, Any]] = []
        self._stall = Stall(recovery.hang_s if recovery else 0.0)
        self._growth = Growth(group, mesh, self._tell_not_grown)
        self._fewest = mesh[0] if recovery is None or recovery.min_replicas is None else recovery.min_replicas
        self._cut_at = self._looked_at = time.monotonic()

    def supervise(self) -> list[dict[str, Any]]:
        """What the targets returned, by rank. Raises WorkerError and StoppedError."""
        import ray

        asked = False
        next_watch = time.monotonic() + WATCH_S
        while self.running and time.monotonic() < self.deadline:
            self._excuse()
            round_refs = [ref for ref, _ in self._round.asked.values()] if self._round else []
            soonest = min([next_watch, self.deadline, *self._limits()])
            pause = max(0.0, soonest - time.monotonic())
            done, _ = counted("watch_wait", ray.wait, [*self.running, *round_refs], timeout=pause)
            for ref in done:
                if ref in self.running:
                    self._ended(self.running.pop(ref), ref)
            if self._round:
                self._go_on(self._round)
            if time.monotonic() >= next_watch:
                next_watch = time.monotonic() + WATCH_S
                self._look(STATUS_WAIT_S)
            if self.stop.reason and not asked:
                asked = True
                self.group.request_stop(self.stop.reason)
                if (
                    self.stop.reason in REASONS.values()
                ):  # whoever asked in another way waits for the checkpoint
                    self.deadline = min(self.deadline, time.monotonic() + STOP_S)
        if self.failures or self.running:
            self._tell_open()
        if self.failures:
            self.group.settle(SETTLE_S)
            raise worker_error(self.failures)
        if self.running:
            ranks = ", ".join(map(str, sorted(self.running.values())))
            raise StoppedError(
                f"stopped ({self.stop.reason}): rank {ranks} did not end within {STOP_S:g} s and was killed",
                str(self.stop.reason),
            )
        self._look(LAST_STATUS_WAIT_S, anew=True)
        self._tell_open()
        # A rank that was lost after another had returned: that one has passed everything that all do together.
        first = self.results[min(self.results)]
        return [self.results.get(rank, first) for rank in range(len(self.group.members))]

    def _limits(self) -> list[float]:
        return [until for _, until in self._round.asked.values()] if self._round else []

    def _excuse(self) -> None:
        """The ranks, for what they did not answer while this process was stopped itself."""
        before, self._looked_at = self._looked_at, time.monotonic()
        if (stopped_s := self._looked_at - before) > STOPPED_S:
            self.group.excuse(stopped_s)
            self._stall.excuse(stopped_s)
            self._cut_at = self._looked_at
            if self._round:
                asked = self._round.asked
                asked |= {rank: (ref, until + stopped_s) for rank, (ref, until) in asked.items()}

    def _look(self, wait_s: float, *, anew: bool = False) -> None:
        """Once a second: what the ranks tell."""
        self._statuses = statuses = self.group.statuses(wait_s, anew=anew)
        stop_asked = self.watch(statuses)
        if stop_asked:
            self.stop(stop_asked)
        for round, generation in list(self._pending):
            resumed = [status.get("resumed") or {0: 0.0} for status in statuses]
            if all(max(each) >= generation for each in resumed):
                self._pending.remove((round, generation))
                stepped = [each[generation] for each in resumed if generation in each]
                self._tell(round, max(stepped) - round.began if stepped else None)
        if self.recovery and not self._round and not self.failures:
            self._find_lost(statuses)
            self._find_cut(statuses)
            self._find_hang(statuses)
            self._grow()

    def _ended(self, rank: int, ref: Any) -> None:
        """A rank's target has returned, raised, or died."""
        result = self.group.result(rank, ref)
        if not isinstance(result, Failure):
            self.results[rank] = result
        elif self.recovery and self.results:
            return  # the run's work is done, whatever became of this rank since
        elif self.recovery and self._is_recoverable(rank, result):
            self._lose(rank, result)
        else:
            self.failures.append(self._explained(rank, result))
            patience = CAUSE_S if all(failure.in_collective for failure in self.failures) else MORE_FAILURES_S
            self.deadline = min(self.deadline, time.monotonic() + patience)

    def _explained(self, rank: int, failure: Failure) -> Failure:
        """The end of a process that we killed has our reason for it, and where it hung, before its last words."""
        if not (why := self._given_up.pop(rank, "")):
            return failure
        parts = (f"{why}; it was killed", self._stacks.pop(rank, ""), failure.text.partition("\n")[2])
        return replace(failure, text="\n".join(filter(None, parts)))

    def _is_recoverable(self, rank: int, failure: Failure) -> bool:
        assert self.recovery is not None, "asked where there is one"
        if self.failures or self.stop.reason:
            return False
        if self.num_failures >= self.recovery.max_failures and self._counts(rank):
            return False
        if failure.died:
            return True
        # An exception: once more, unless another try could not help: it came again, or on several ranks at once.
        # Not where a process was lost too: who loses a peer in the middle of something may fail in ways of its own.
        key, events = (failure.step, failure.text), self._round.events if self._round else []
        follows = any(event["died"] for event in events)
        again = not follows and (key in self._raised or any(event["raised"] for event in events))
        self._raised.add(key)
        return not again and self.recovery.retries(failure)

    def _counts(self, rank: int) -> bool:
        """Whether a loss counts: whatever is lost with a host, in one round, does once."""
        if rank in self._newcomers:
            return self.group.lives(rank)
        return self._round is None or self.group.seats[rank].host.node_id not in self._round.counted

    def _lose(self, rank: int, failure: Failure) -> None:
        """Replace a rank, and ask all others to quiesce."""
        round = self._round
        if round is None:
            round = self._round = Round()
            for other in self.running.values():
                self._ask(round, other, QUIESCE_S)
        self.num_failures += self._counts(rank)
        is_there = self.group.lives(rank)
        round.counted.add(self.group.seats[rank].host.node_id)
        cause = self._given_up.pop(rank, "") or failure.short
        event = {**self._event(rank, cause), "spare": None, "replaced": False}
        event |= {"raised": not failure.died, "died": failure.died}
        if not is_there:
            event["cause"] = f"host {event['host']} was lost"
            if rank in self._newcomers:  # it was to come there, before this was known
                round.events = [each for each in round.events if each["rank"] != rank]
        if rank in self._stacks:
            event["stack"] = self._stacks.pop(rank)
        round.states.pop(rank, None)
        round.asked.pop(rank, None)
        round.events.append(event)
        try:
            ref, event["spare"] = self.group.replace(rank, is_there)
        except ClusterError as error:
            round.vacant[rank] = replace(failure, text=str(error))
            if self._num_left(round) < self._fewest * self._branch:
                self._end_of(round)
            return
        event |= {"replaced": True, "now_on": self.group.seats[rank].host.name}
        self.running[ref] = rank
        self._newcomers.add(rank)
        self._ask(round, rank, NEWCOMER_S)

    def _num_left(self, round: Round) -> int:
        return len(self.group.members) - len(round.vacant)

    def _end_of(self, round: Round) -> None:
        """The run ends: too few ranks are left."""
        remedy = "start it again, or let the run go on with fewer replicas (launch.min_replicas)"
        self.failures += [replace(each, text=f"{each.text}: {remedy}") for each in round.vacant.values()]
        self.deadline = time.monotonic()

    def _ask(self, round: Round, rank: int, wait_s: float) -> None:
        generation = -2 if rank in self._newcomers else self.generation
        # Long steps are waited for: a rank that computes hears of it at its next collective.
        wait_s = max(wait_s, 3 * self._stall.step_s)
        ref = self.group.quiesce(self.group.members[rank], generation, wait_s)
        round.asked[rank] = ref, time.monotonic() + wait_s + 1.0

    def _go_on(self, round: Round) -> None:
        """Take the answers; when every rank waits, decide and order."""
        import ray
        from ray.exceptions import RayError

        refs = {ref: rank for rank, (ref, _) in round.asked.items()}
        done = (
            counted("watch_wait", ray.wait, list(refs), num_returns=len(refs), timeout=0)[0] if refs else []
        )
        for ref in done:
            rank = refs[ref]
            del round.asked[rank]
            state = None
            with suppress(RayError):  # its death arrives as its result
                state = counted("result", ray.get, ref)
                if state is None:
                    self._give_up(rank, f"did not leave its process group within {QUIESCE_S:g} s")
            if state is not None:
                round.states[rank] = state
        for rank, (_, until) in list(round.asked.items()):
            if time.monotonic() > until:
                del round.asked[rank]
                self._give_up(rank, "does not answer")
        if self.results:  # the run's work is done: nothing is left to wait for
            for rank in {*round.states, *self._newcomers} & set(self.running.values()):
                self._give_up(rank, "the run is over")
            self._round = None
            return
        if len(round.states) < self._num_left(round):
            return
        assert self.recovery is not None, "there is a round"
        states = [round.states.get(rank) for rank in range(len(self.group.members))]
        order = self.recovery.decide(states)
        data = len(order["ranks"]) // self._branch
        if data < self._fewest:
            self._end_of(round)
            return
        round.decided(order, max((s and s["committed"]) or 0 for s in states) + 1)
        for rank, state in round.states.items():
            self.group.members[rank].stderr = state["stderr"]
        self._keep(round, order["ranks"])
        try:
            self.group.give_orders(order, self.generation + 1)
        except RayError:
            self._give_up(0, "does not answer")
            del round.states[0]
            return
        if data != self._data:
            meshes = [f"{num}x{self._branch}" for num in (self._data, data)]
            round.mesh = meshes[0], meshes[1]
        self.generation, self._data = self.generation + 1, data
        self._round, self._newcomers = None, set()
        self._stall.begin()
        self._pending.append((round, self.generation))

    def _keep(self, round: Round, ranks: list[int]) -> None:
        """Only these go on, as ranks 0, 1, …; what is known by rank moves with them."""
        self.group.keep(ranks)
        round.why += dict.fromkeys(failure.text for failure in round.vacant.values())
        round.vacant = {}
        new = {old: rank for rank, old in enumerate(ranks)}
        self.running = {ref: new[rank] for ref, rank in self.running.items() if rank in new}
        self._newcomers = {new[rank] for rank in self._newcomers if rank in new}
        round.states = {new[rank]: state for rank, state in round.states.items() if rank in new}

    def _grow(self) -> None:
        """Begin a round with those who wait to join, once they all do."""
        if self.stop.reason or self.results or self._given_up or self._pending:
            return
        states = self._growth.look()
        if not states:
            return
        self._round = round = Round()
        for other in self.running.values():
            self._ask(round, other, QUIESCE_S)
        for rank, state in zip(self.group.seat(), states, strict=True):
            member = self.group.members[rank]
            self.running[member.ref] = rank
            self._newcomers.add(rank)
            round.states[rank] = state
            round.found = sorted({*round.found, member.seat.host.name})

    def _give_up(self, rank: int, why: str) -> None:
        """End a process that is of no use any more; its end is seen as any other."""
        self._given_up[rank] = why
        self.group.kill(rank)

    def _find_lost(self, statuses: list[dict[str, Any]]) -> None:
        # No rank tells of a step before all have formed groups: then all have loaded, also who has told of none yet.
        limit = LOST_S if any("step" in status for status in statuses) else LOST_LOADING_S
        for rank, status in enumerate(statuses):
            if status["seen_s"] > limit and rank in self.running.values():
                self._give_up(rank, f"no answer for {status['seen_s']:.0f} s")

    def _find_cut(self, statuses: list[dict[str, Any]]) -> None:
        """Ranks wait for an order though all live: a connection broke, or the groups could not be formed in time."""
        waiting = [rank for rank, status in enumerate(statuses) if status.get("waits") == self.generation]
        now = time.monotonic()
        if not waiting or self._given_up:
            self._cut_at = now
        elif self.results:
            for rank in waiting:
                self._give_up(rank, "the run is over")
        elif now - self._cut_at > CUT_S and self.recovery:
            if self.num_failures >= self.recovery.max_failures:
                for rank in waiting:  # its end is the run's
                    why = statuses[rank].get("not_joined") or "lost its connections to the others"
                    self._give_up(rank, why)
                return
            self.num_failures += 1
            self._round = round = Round()
            told = (statuses[rank].get("not_joined") for rank in waiting)
            event = self._event(waiting[0], next(filter(None, told), "lost its connections to the others"))
            event |= {"spare": None, "replaced": True, "raised": False, "died": False}
            round.events.append(event)
            for rank in self.running.values():
                self._ask(round, rank, QUIESCE_S)

    def _event(self, rank: int, cause: str) -> dict[str, Any]:
        return {
            "rank": rank,
            "host": self.group.seats[rank].host.name,
            "cause": cause,
            "step": step_of(self._statuses) + 1,
        }

    def _find_hang(self, statuses: list[dict[str, Any]]) -> None:
        """All answer, none steps."""
        stood = self._stall.hangs_for(statuses)
        if not stood or self._given_up:
            return
        places = self.group.whereabouts(self.running.values(), QUIESCE_S)
        stuck = [rank for rank, place in places.items() if place is None or not place["waits"]]
        for rank in stuck or list(places):
            place = places[rank]
            self._stacks[rank] = place["stack"] if place else ""
            where = f", {place['where']}" if place else ", and it does not answer"
            self._give_up(rank, f"hangs: no step for {stood:.0f} s{where}")

    def _tell_not_grown(self, host: str, why: str) -> None:
        assert self.recovery is not None, "it has become smaller"
        text = f"{host} has room for workers, which did not come: {why}; the run goes on without them"
        self.recovery.told({"host": host, "cause": why, "at": time.time(), "text": text})

    def _tell_open(self) -> None:
        """What nobody will see the outcome of."""
        for round in [*(round for round, _ in self._pending), *filter(None, [self._round])]:
            self._tell(round, None)

    def _tell(self, round: Round, seconds: float | None) -> None:
        assert self.recovery is not None, "there was a round"
        for event in round.told(seconds):
            self.recovery.told(event)

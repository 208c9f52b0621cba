"""Watching the ranks of a run, and replacing those that are lost.

    rank 1 dies ─► seen (ray.wait)  ─► a newcomer starts, or a spare is taken ────────► it waits for an order
                                    └► the others are asked to quiesce (groups given up) ─► they wait too
                   all wait: decide, a new meeting point, generation + 1, orders ─► they join, fill the newcomer, go on

Whatever fails in between (a survivor, the newcomer, rank 0 with its meeting point) is replaced as well, and asked
again: only when every rank waits is anything decided.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from anabranch.cluster.errors import ClusterError, StoppedError
from anabranch.cluster.failures import Failure, worker_error
from anabranch.cluster.ray_calls import counted
from anabranch.cluster.recovery import Recovery
from anabranch.cluster.worker_group import WorkerGroup

Watch = Callable[[list[dict[str, Any]]], str | None]
"""Gets the workers' statuses, by rank. Returns None, or the reason for which they should save and end."""

WATCH_S = 1.0
STATUS_WAIT_S = 0.2
# From Ctrl-C: the workers save; with Ray's own end (1.5 s) all processes are gone in ten seconds.
STOP_S = 6.5
# After a failure, for the others' to arrive: a dead process is noticed later than its peers' lost connections.
MORE_FAILURES_S = 1.0
CAUSE_S = 5.0
# A rank that trains and does not answer for so long is lost: stopped, or its host or network is gone.
LOST_S = 8.0
# Ranks that lost a connection wait so long for word of a death before the controller takes it for a broken network.
CUT_S = 3.0
QUIESCE_S = 5.0
NEWCOMER_S = 120.0
_HANG_STEPS = 10


class Stop:
    """Why the run should end early; set by a signal or the watch."""

    reason: str | None = None

    def __call__(self, reason: str) -> None:
        self.reason = self.reason or reason


@dataclass
class _Round:
    """One recovery under way. states: of the ranks that wait. asked: rank → (ref, until when)."""

    events: list[dict[str, Any]] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    asked: dict[int, tuple[Any, float]] = field(default_factory=dict)
    began: float = field(default_factory=time.time)


class Supervisor:
    """Watches the running ranks of a group to their end. refs: of their runs, by rank."""

    def __init__(
        self, group: WorkerGroup, refs: list[Any], watch: Watch, stop: Stop, recovery: Recovery | None
    ) -> None:
        self.group, self.watch, self.stop, self.recovery = group, watch, stop, recovery
        self.running = dict(zip(refs, range(len(refs)), strict=True))
        self.results: dict[int, dict[str, Any]] = {}
        self.failures: list[Failure] = []  # those that end the run
        self.deadline = float("inf")
        self.generation, self.num_failures = 0, 0
        self._newcomers: set[int] = set()
        self._given_up: dict[int, str] = {}  # rank → why we killed it
        self._stacks: dict[int, str] = {}  # of those that hang
        self._raised: set[tuple[int, str]] = set()  # (step, text) of exceptions that were recovered from
        self._round: _Round | None = None
        self._pending: list[
            tuple[_Round, int]
        ] = []  # recovered, until their ranks have stepped in that generation
        self._statuses: list[dict[str, Any]] = []
        self._steps = (-1, time.monotonic())
        self._cut_at = time.monotonic()
        self._step_times: deque[float] = deque(maxlen=25)

    def supervise(self) -> list[dict[str, Any]]:
        """What the targets returned, by rank. Raises WorkerError and StoppedError."""
        import ray

        asked = False
        next_watch = time.monotonic() + WATCH_S
        while self.running and time.monotonic() < self.deadline:
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
                self.deadline = min(self.deadline, time.monotonic() + STOP_S)
        if self.failures:
            raise worker_error(self.failures)
        if self.running:
            ranks = ", ".join(map(str, sorted(self.running.values())))
            raise StoppedError(
                f"stopped ({self.stop.reason}): rank {ranks} did not end within {STOP_S:g} s and was killed",
                str(self.stop.reason),
            )
        self._look(WATCH_S)
        for round, _ in self._pending:
            self._tell(round, None)
        # A rank that was lost after another had returned: that one has passed everything that all do together.
        first = self.results[min(self.results)]
        return [self.results.get(rank, first) for rank in range(len(self.group.seats))]

    def _limits(self) -> list[float]:
        return [until for _, until in self._round.asked.values()] if self._round else []

    def _look(self, wait_s: float) -> None:
        """Once a second: what the ranks tell."""
        self._statuses = statuses = self.group.statuses(wait_s)
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
            self._find_hang(statuses, self.recovery.hang_s)

    def _ended(self, rank: int, ref: Any) -> None:
        """A rank's target has returned, raised, or died."""
        result = self.group.result(rank, ref)
        if not isinstance(result, Failure):
            self.results[rank] = result
        elif self.recovery and self.results:
            return  # the run's work is done, whatever became of this rank since
        elif self.recovery and self._is_recoverable(result):
            self._lose(rank, result)
        else:
            self.failures.append(result)
            patience = CAUSE_S if all(failure.in_collective for failure in self.failures) else MORE_FAILURES_S
            self.deadline = min(self.deadline, time.monotonic() + patience)

    def _is_recoverable(self, failure: Failure) -> bool:
        assert self.recovery is not None, "asked where there is one"
        if self.failures or self.num_failures >= self.recovery.max_failures or self.stop.reason:
            return False
        if failure.died:
            return True
        # An exception: once more, unless another try could not help: it came again, or on several ranks at once.
        key = failure.step, failure.text
        again = key in self._raised or (self._round and any(e["raised"] for e in self._round.events))
        self._raised.add(key)
        return not again and self.recovery.retries(failure)

    def _step(self) -> int:
        return max([int(status.get("step", 0)) for status in self._statuses], default=0)

    def _lose(self, rank: int, failure: Failure) -> None:
        """Replace a rank, and ask all others to quiesce."""
        self.num_failures += 1
        cause = self._given_up.pop(rank, "") or _first_line(failure)
        round = self._round
        if round is None:
            round = self._round = _Round()
            for other in self.running.values():
                self._ask(round, other, QUIESCE_S)
        event = self._event(rank, cause)
        if rank in self._stacks:
            event["stack"] = self._stacks.pop(rank)
        try:
            ref, is_spare = self.group.replace(rank)
        except ClusterError as error:
            self.failures.append(replace(failure, text=f"{failure.text}\n{error}"))
            self.deadline = time.monotonic()
            return
        self.running[ref] = rank
        round.events.append({**event, "spare": is_spare, "raised": not failure.died})
        self._newcomers.add(rank)
        round.states.pop(rank, None)
        self._ask(round, rank, NEWCOMER_S)

    def _ask(self, round: _Round, rank: int, wait_s: float) -> None:
        generation = -2 if rank in self._newcomers else self.generation
        # Long steps are waited for: a rank that computes hears of it at its next collective.
        wait_s = max(wait_s, 3 * median(self._step_times) if self._step_times else 0.0)
        ref = self.group.quiesce(rank, generation, wait_s)
        round.asked[rank] = ref, time.monotonic() + wait_s + 1.0

    def _go_on(self, round: _Round) -> None:
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
        if set(round.states) != set(range(len(self.group.seats))) or self.results:
            return
        assert self.recovery is not None, "there is a round"
        states = [round.states[rank] for rank in sorted(round.states)]
        under_way = max(state["committed"] or 0 for state in states) + 1
        for event in round.events:
            event["step"] = max(event["step"], under_way)  # statuses are a second old
        order = self.recovery.decide(states)
        try:
            self.group.give_orders(order, self.generation + 1, states)
        except RayError:
            self._give_up(0, "does not answer")
            del round.states[0]
            return
        self.generation += 1
        self._round, self._newcomers = None, set()
        self._steps = (-1, time.monotonic())
        for event in round.events:
            lost = max(event["step"] - 1 - order["step"], 0)
            event |= {"action": order["action"], "resumed_from": order["step"], "lost_steps": lost}
        self._pending.append((round, self.generation))

    def _give_up(self, rank: int, why: str) -> None:
        """End a process that is of no use any more; its end is seen as any other."""
        self._given_up[rank] = why
        self.group.kill(rank)

    def _find_lost(self, statuses: list[dict[str, Any]]) -> None:
        for rank, status in enumerate(statuses):
            if "step" in status and status["seen_s"] > LOST_S and rank in self.running.values():
                self._give_up(rank, f"no answer for {status['seen_s']:.0f} s")

    def _find_cut(self, statuses: list[dict[str, Any]]) -> None:
        """Ranks wait for an order though all live: a connection broke, or the groups could not be formed in time."""
        waiting = [rank for rank, status in enumerate(statuses) if status.get("waits") == self.generation]
        now = time.monotonic()
        if not waiting or self._given_up:
            self._cut_at = now
        elif now - self._cut_at > CUT_S and self.recovery and not self.results:
            if self.num_failures >= self.recovery.max_failures:
                for rank in waiting:  # its end is the run's
                    self._give_up(rank, "lost its connections to the others")
                return
            self.num_failures += 1
            self._round = round = _Round()
            event = self._event(waiting[0], "lost its connections to the others")
            round.events.append({**event, "spare": None, "raised": False})
            for rank in self.running.values():
                self._ask(round, rank, QUIESCE_S)

    def _event(self, rank: int, cause: str) -> dict[str, Any]:
        return {
            "rank": rank,
            "host": self.group.seats[rank].host.name,
            "cause": cause,
            "step": self._step() + 1,
        }

    def _find_hang(self, statuses: list[dict[str, Any]], hang_s: float) -> None:
        """All answer, none steps."""
        step, now = self._step(), time.monotonic()
        if step != self._steps[0] or any(status.get("phase") != "training" for status in statuses):
            self._steps = (step, now)
            self._step_times.extend(s["step_time_s"] for s in statuses[:1] if "step_time_s" in s)
            return
        limit = max(hang_s, _HANG_STEPS * median(self._step_times) if self._step_times else 0.0)
        if now - self._steps[1] < limit or self._given_up:
            return
        places = {rank: self.group.whereabouts(rank, QUIESCE_S) for rank in self.running.values()}
        stuck = [rank for rank, place in places.items() if place is None or not place["waits"]]
        for rank in stuck or list(places):
            place = places[rank]
            self._stacks[rank] = place["stack"] if place else ""
            where = f", {place['where']}" if place else ", and it does not answer"
            self._give_up(rank, f"hangs: no step for {now - self._steps[1]:.0f} s{where}")

    def _tell(self, round: _Round, seconds: float | None) -> None:
        assert self.recovery is not None, "there was a round"
        for event in round.events:
            by = {None: "connected again", True: "replaced by a spare", False: "replaced by a new process"}
            took = f" in {seconds:.1f} s" if seconds is not None else ""
            where = f", all went on from step {event['resumed_from']}" if event["action"] == "rewind" else ""
            text = (
                f"rank {event['rank']} on {event['host']} failed in step {event['step']} ({event['cause']}), "
                f"{by[event['spare']]}{took}{where}; {event['lost_steps']} steps lost"
            )
            self.recovery.told({**event, "seconds": seconds, "text": text})


def _first_line(failure: Failure) -> str:
    """What happened, short: how the process ended, or the exception itself."""
    lines = [line for line in failure.text.splitlines() if line.strip()]
    if not failure.died:
        return lines[-1]
    # Ray sees the end of a connection, and guesses long
    return "its process was killed or crashed" if "End of file" in lines[0] else lines[0].partition(". ")[0]

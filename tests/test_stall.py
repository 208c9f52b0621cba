"""How long a run may stand still before that is a hang: tables over a clock that the test moves. Which ranks hang."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from anabranch.cluster import stall
from anabranch.cluster.failures import gpu_works, waits_for_others
from anabranch.cluster.stall import Stall, step_of
from anabranch.runtime import exchange, process_group

HANG_S = 30.0


class Clock:
    """`time.monotonic` as far as `Stall` asks it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stall, "time", clock)
    return clock


def told(step: int, *phases: str, step_time_s: float | None = None) -> list[dict[str, Any]]:
    """The statuses of ranks in these phases, after a step."""
    measured = {} if step_time_s is None else {"step_time_s": step_time_s}
    return [{"step": step, "phase": phase, **measured} for phase in phases]


@pytest.mark.parametrize(
    ("phases", "step_times", "limit"),
    [
        (("training", "training"), [1.0] * 5, HANG_S),  # ten steps are less
        (("training", "training"), [5.0] * 5, 50.0),  # ten median steps
        (("training", "training"), [1.0, 1.0, 1.0, 500.0, 500.0], HANG_S),  # the median, not the mean
        (("training", "training"), [9.0] * 30 + [4.0] * 25, 40.0),  # of the last 25
        (("training", "training"), [], HANG_S),  # none is known
        (("evaluating", "evaluating"), [1.0] * 5, 300.0),
        (("saving", "saving"), [5.0] * 5, 500.0),
        (("training", "saving"), [1.0] * 5, 300.0),  # one is still at it
        (("loading", "training"), [1.0] * 5, None),  # what is not training has no limit here
        (("starting", "starting"), [], None),
        (("waiting for a lost rank", "training"), [1.0] * 5, None),
    ],
)
def test_how_long_is_too_long(
    clock: Clock, phases: tuple[str, ...], step_times: list[float], limit: float | None
) -> None:
    watched = Stall(HANG_S)
    for step, seconds in enumerate(step_times, 1):
        assert watched.hangs_for(told(step, *["training"] * len(phases), step_time_s=seconds)) == 0
        clock.now += 1.0
    statuses = told(len(step_times) + 1, *phases)
    assert watched.hangs_for(statuses) == 0, "it has just come here"
    clock.now += limit - 1.0 if limit else 1e6
    assert watched.hangs_for(statuses) == 0
    clock.now += 1.0
    assert watched.hangs_for(statuses) == (limit or 0)


def test_a_step_or_a_phase_begins_anew(clock: Clock) -> None:
    watched = Stall(HANG_S)
    for statuses in (
        told(7, "training", "training"),
        told(8, "training", "training"),
        told(8, "training", "evaluating"),
        told(8, "evaluating", "evaluating"),
        told(8, "training", "training"),
    ):
        assert watched.hangs_for(statuses) == 0
        clock.now += HANG_S - 1.0
    clock.now += 1.0
    assert watched.hangs_for(told(8, "training", "training")) == HANG_S


def test_a_rank_that_waits_for_what_it_writes_lives(clock: Clock) -> None:
    """However long its store takes; a second rank waits for it in a collective."""
    watched = Stall(HANG_S)
    for waited_s in range(0, 2000, 100):
        statuses = told(8, "saving", "saving")
        statuses[0]["store_wait_s"] = float(waited_s)
        assert watched.hangs_for(statuses) == 0
        clock.now += 100.0
    clock.now += 9 * HANG_S
    assert watched.hangs_for(statuses) > 9 * HANG_S


def test_orders_begin_anew_and_keep_the_step_times(clock: Clock) -> None:
    """After a recovery the same step and phases count from the order; ten of the steps before still do."""
    watched = Stall(HANG_S)
    statuses = told(3, "training", "training", step_time_s=4.0)
    assert watched.hangs_for(statuses) == 0
    clock.now += 100.0
    watched.begin()
    assert watched.hangs_for(statuses) == 0
    clock.now += 39.0
    assert watched.hangs_for(statuses) == 0
    clock.now += 1.0
    assert watched.hangs_for(statuses) == 40.0
    assert watched.step_s == 4.0


def test_while_nobody_looked_nothing_stood_still(clock: Clock) -> None:
    watched = Stall(HANG_S)
    statuses = told(3, "training", "training")
    assert watched.hangs_for(statuses) == 0
    clock.now += HANG_S - 1.0 + 500.0
    watched.excuse(500.0)
    assert watched.hangs_for(statuses) == 0
    clock.now += 1.0
    assert watched.hangs_for(statuses) == HANG_S


def test_the_step_is_the_furthest_rank_s() -> None:
    assert step_of([{"step": 3}, {"step": 4}, {}]) == 4
    assert step_of([]) == 0
    assert Stall(HANG_S).step_s == 0.0


WAITING = ("gloo", "shared", "barrier")


def stands(rank: int, world_size: int, how: str, looked: Path) -> bool:
    """Rank 1 comes when `looked` is there; what is made of rank 0's stack meanwhile."""
    group = dist.group.WORLD
    assert group is not None
    if how == "shared":
        process_group.share_memory(group)
        assert exchange.shares_memory(group)
    seen = False
    main = threading.get_ident()

    def look() -> None:
        """Until it waits: on a busy machine it comes to that late."""
        nonlocal seen
        deadline = time.monotonic() + 60
        while not (seen := waits_for_others(traceback.extract_stack(sys._current_frames()[main]))):
            if how not in WAITING or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        looked.touch()

    if rank == 0:
        threading.Timer(0.3, look).start()
        while how == "slept" and not looked.exists():
            time.sleep(0.5)
        while how == "event" and not looked.exists():
            threading.Event().wait(0.5)
    else:
        while not looked.exists():
            time.sleep(0.02)
    if how == "barrier":
        dist.barrier()
    else:
        exchange.all_reduce(torch.ones(10), group).wait()
    return seen


@pytest.mark.parametrize(
    ("how", "waits"),
    [("gloo", True), ("shared", True), ("barrier", True), ("slept", False), ("event", False)],
)
def test_who_waits_for_another_rank_does_not_hang(how: str, waits: bool, tmp_path: Path) -> None:
    assert run_ranks(2, stands, how, tmp_path / "looked")[0] is waits


def test_a_gpu_with_work_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its host may be anywhere: in a convolution that finds the GPU's queue full."""
    asked: list[str] = []

    class Stream:
        answers: ClassVar[list[bool]] = [False, True]

        def query(self) -> bool:
            if not self.answers:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return self.answers.pop(0)

    def current_stream(device: str) -> Stream:
        asked.append(device)
        return Stream()

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert gpu_works("cuda:1")
    assert asked == ["cuda:1"]
    assert not gpu_works("cpu")
    assert not gpu_works("cuda:1"), "its queue is empty"
    assert not gpu_works("cuda:1"), "it is lost and waits for nobody"

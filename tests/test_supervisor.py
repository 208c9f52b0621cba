"""What the controller makes of a rank's end."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from anabranch.cluster import worker_group
from anabranch.cluster.errors import WorkerError
from anabranch.cluster.failures import Failure
from anabranch.cluster.member import Member
from anabranch.cluster.placement import Host, Seat
from anabranch.cluster.round import Round
from anabranch.cluster.supervisor import LOST_LOADING_S, LOST_S, SETTLE_S, Stop, Supervisor


def raised(rank: int, text: str = "RuntimeError: odd") -> Failure:
    return Failure(rank, "host", text, in_collective=False, step=7)


@pytest.mark.parametrize(
    ("lost", "goes_on"),
    [
        ([], True),
        (["died"], True),
        (["raised"], False),
        (["raised", "died"], True),
        (["raised", "cut"], False),
    ],
)
def test_exceptions_of_several_ranks_end_the_run_unless_a_process_was_lost(
    lost: list[str], goes_on: bool
) -> None:
    """lost: for each of this round, what it did."""
    recovery = SimpleNamespace(hang_s=30.0, min_replicas=None, max_failures=9, retries=lambda _: True)
    supervisor = Supervisor(
        cast(Any, SimpleNamespace()), [], lambda _: None, Stop(), cast(Any, recovery), (2, 2)
    )
    supervisor._round = (
        Round(events=[{"raised": one == "raised", "died": one == "died"} for one in lost]) if lost else None
    )
    assert supervisor._is_recoverable(2, raised(2)) is goes_on


def test_the_same_exception_again_ends_the_run() -> None:
    recovery = SimpleNamespace(hang_s=30.0, min_replicas=None, max_failures=9, retries=lambda _: True)
    supervisor = Supervisor(
        cast(Any, SimpleNamespace()), [], lambda _: None, Stop(), cast(Any, recovery), (2, 2)
    )
    assert supervisor._is_recoverable(2, raised(2))
    assert not supervisor._is_recoverable(2, raised(2))
    assert supervisor._is_recoverable(2, raised(2, "RuntimeError: another"))


@pytest.mark.parametrize(
    ("steps", "seen_s", "given_up"),
    [
        ((None, None), (0.0, LOST_S + 1), []),
        ((None, None), (0.0, LOST_LOADING_S + 1), [1]),
        ((0, None), (0.0, LOST_S + 1), [1]),  # stopped before it could tell of its first step: it has loaded
        ((0, 0), (LOST_S + 1, LOST_S - 1), [0]),
    ],
)
def test_a_silent_rank_is_lost_soon_once_any_has_stepped(
    steps: tuple[int | None, int | None], seen_s: tuple[float, float], given_up: list[int]
) -> None:
    killed: list[int] = []
    recovery = SimpleNamespace(hang_s=30.0, min_replicas=None)
    group = SimpleNamespace(kill=killed.append)
    refs = ["ref 0", "ref 1"]
    supervisor = Supervisor(cast(Any, group), refs, lambda _: None, Stop(), cast(Any, recovery), (2, 1))
    told = [{} if step is None else {"step": step} for step in steps]
    supervisor._find_lost([{**one, "seen_s": s} for one, s in zip(told, seen_s, strict=True)])
    assert killed == given_up


def test_who_waits_for_a_file_system_has_forgotten_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor's own thread may read a checkpoint for minutes, or wait for a file server."""
    monkeypatch.setattr(worker_group, "_REASSURE_S", 0.01)
    asked, group = set[str](), worker_group.WorkerGroup.__new__(worker_group.WorkerGroup)

    def member(name: str) -> Any:
        return SimpleNamespace(actor=SimpleNamespace(status=SimpleNamespace(remote=lambda: asked.add(name))))

    group.members, group._spares, group.joining = [member("rank 0")], [member("spare")], [member("newcomer")]
    with group.reassured():
        until = time.monotonic() + 30
        while len(asked) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    assert asked == {"rank 0", "spare", "newcomer"}


def test_what_a_rank_tells_no_more_is_no_longer_so() -> None:
    member = Member(Seat(1, Host("a", "1", 2, 2), 0, 1), None, None)
    member.begin()
    member.told({"phase": "training", "step_time_s": 0.5})
    member.told({"phase": "fitting"})
    assert member.status == {"rank": 1, "host": "a", "device": "a:0", "phase": "fitting"}


def test_why_a_rank_was_killed_is_the_error_where_that_ends_the_run() -> None:
    """And what was under way is told, though nobody sees its outcome."""
    told: list[dict[str, Any]] = []
    settled: list[float] = []
    recovery = SimpleNamespace(hang_s=30.0, min_replicas=None, max_failures=0, told=told.append)
    died = Failure(
        1, "b", "the worker's process died: killed by ray.kill\nIts last words:\nhm", False, died=True
    )
    host = Host("b", "1", 2, 2)
    group = SimpleNamespace(
        kill=lambda rank: None,
        result=lambda rank, ref: died,
        settle=settled.append,
        seats=[Seat(rank, host, 0, 1) for rank in (0, 1)],
    )
    supervisor = Supervisor(cast(Any, group), [], lambda _: None, Stop(), cast(Any, recovery), (2, 1))
    begun = Round(
        events=[{"rank": 0, "host": "b", "cause": "no answer for 9 s", "step": 4, "replaced": True}]
    )
    supervisor._round = begun
    supervisor._stacks[1] = "line 7, in forward"
    supervisor._give_up(1, "hangs: no step for 31 s, in forward")
    supervisor._ended(1, "ref")
    with pytest.raises(WorkerError) as caught:
        supervisor.supervise()
    assert str(caught.value).splitlines() == [
        "rank 1 on host b failed:",
        "hangs: no step for 31 s, in forward; it was killed",
        "line 7, in forward",
        "Its last words:",
        "hm",
    ]
    assert settled == [SETTLE_S], "saves that were begun end before the processes do"
    text = "rank 0 on b failed in step 4 (no answer for 9 s); the run ended before it was made good"
    assert [(each["action"], each["at"], each["text"]) for each in told] == [("ended", begun.began, text)]

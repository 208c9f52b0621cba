"""Exchanges through shared memory: right, in any order of waiting, with memory that is used again, and never a hang."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import threading
import time
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
from privileges import may_become
from ranks import run_ranks
from torch import Tensor

from anabranch.runtime import exchange, process_group, shared_memory
from anabranch.runtime.shared_memory import SharedMemory


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def joined(timeout_s: float = 30.0) -> SharedMemory:
    process_group.share_memory(world())
    exchange._shared[world()].timeout_s = timeout_s
    return exchange._shared[world()]


def part(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(numel, generator=generator, dtype=torch.float64)
    return (x * 1000).to(dtype)


def sums(rank: int, size: int) -> list[Tensor]:
    """Of many sizes and types; the whole list is begun before anything is waited for, and waited for backwards."""
    joined()
    kinds = [(n, t) for n in (0, 1, 7, 1000, 300_000) for t in (torch.float32, torch.float64, torch.int64)]
    results = [part(rank, numel, dtype) for numel, dtype in kinds]
    works = [exchange.all_reduce(x, world()) for x in results]
    for work in reversed(works):
        work.wait()
    for (numel, dtype), found in zip(kinds, results, strict=True):
        parts = [part(r, numel, dtype) for r in range(size)]
        expected = parts[0].clone()
        for one in parts[1:]:
            expected += one
        assert torch.equal(found, expected)  # to the bit: added in the order of the ranks
    x = part(rank, 10, torch.float32)[rank]  # no dimension
    exchange.all_reduce(x, world()).wait()
    results.append(x)
    for sizes in ([2, 3, 4][:size], [0, 5, 1][:size], [0, 0, 0][:size]):
        rows = part(rank, sizes[rank] * 6, torch.float32).view(sizes[rank], 2, 3)
        got = exchange.all_gather(rows, sizes, world())
        everyone = [part(r, sizes[r] * 6, torch.float32).view(sizes[r], 2, 3) for r in range(size)]
        assert torch.equal(got, torch.cat(everyone))
        everyone = [part(r, sum(sizes) * 6, torch.float32).view(sum(sizes), 2, 3) for r in range(size)]
        mine = everyone[rank].clone()
        exchange.reduce_scatter(mine, sizes, world()).wait()
        expected = everyone[0].clone()
        for one in everyone[1:]:
            expected += one
        rows = exchange.own_rows(mine, sizes, rank)
        assert torch.equal(rows, exchange.own_rows(expected, sizes, rank))  # to the bit
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_rows_are_the_same_on_all_ranks(size: int) -> None:
    first, *others = run_ranks(size, sums)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def steps(rank: int, size: int) -> tuple[int, int]:
    """Segments after 3 and after 50 steps, each with a large sum that is waited for at its end."""
    group, counts = joined(), []
    generator = torch.Generator().manual_seed(rank)
    for step in range(50):
        bucket = torch.full((100_000,), float(step))
        work = exchange.all_reduce(bucket, world())
        for numel in (1000, 2000, 1000):
            x = torch.ones(numel)
            if torch.rand((), generator=generator) < 0.1:
                time.sleep(0.002)  # ranks run ahead of each other
            exchange.all_reduce(x, world()).wait()
            assert torch.equal(x, torch.full((numel,), float(size)))
        work.wait()
        assert torch.equal(bucket, torch.full((100_000,), float(step * size)))
        counts.append(group._num_segments)
    return counts[2], counts[-1]


def test_memory_is_used_again() -> None:
    for early, late in run_ranks(3, steps):
        assert late <= early + 4, "a few more while ranks run ahead, not some more a step"


def kept_until_read(rank: int, size: int) -> None:
    """A rank that begins many exchanges while the other has read none of them overwrites nothing."""
    joined()
    if rank == 1:
        time.sleep(0.3)
    xs = [torch.full((5000,), float(i)) for i in range(100)]
    works = [exchange.all_reduce(x, world()) for x in xs]
    works[-1].wait()
    assert [float(x[0]) for x in xs] == [size * float(i) for i in range(100)]
    assert all(bool((x == x[0]).all()) for x in xs)


def test_what_is_not_read_yet_is_not_overwritten() -> None:
    run_ranks(2, kept_until_read)


def lost(rank: int, size: int, how: str) -> float:
    """Seconds until the others' exchange failed."""
    group = joined(timeout_s=1.0 if how == "stop" else 60.0)
    x = torch.ones(10)
    exchange.all_reduce(x, world()).wait()
    pids = process_group.gather_json(os.getpid(), "cpu")
    if rank == 1:
        if how == "leave":
            exchange.close()
            return 0.0
        if how == "stop":
            time.sleep(3)
            return 0.0
        threading.Timer(0.2, exchange.shut_down).start()
    begun = time.monotonic()
    words = {"stop": "rank 1 of this host gave nothing for 1 s"}.get(how, "connection closed by peer, rank")
    if how == "abort" and rank == 0:
        time.sleep(0.5)  # shut down by the other before this one begins
    with pytest.raises(ConnectionError, match=words):
        exchange.all_reduce(x, world()).wait()
    assert len(pids) == size
    assert group.rank == rank
    return time.monotonic() - begun


@pytest.mark.parametrize("how", ["leave", "abort", "stop"])
def test_a_lost_rank_is_an_error_at_once(how: str) -> None:
    assert max(run_ranks(2, lost, how)) < 60


def waits(pipe: Connection) -> None:
    """Rank 1 of two: joins, and does nothing more."""
    SharedMemory.join(1, 2, partial(talk, pipe, 1), 60.0)
    pipe.send("joined")
    signal.pause()


def talk(pipe: Connection, rank: int, value: Any) -> list[Any]:
    pipe.send(value)
    other = pipe.recv()
    return [other, value] if rank else [value, other]


def test_a_killed_rank_is_seen_at_once() -> None:
    mine, theirs = mp.Pipe()
    process = mp.get_context("forkserver").Process(target=waits, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    group = SharedMemory.join(0, 2, partial(talk, mine, 0), 60.0)
    assert group is not None
    assert mine.recv() == "joined"
    assert process.pid is not None
    threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL)).start()
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match="connection closed by peer, rank 1"):
        group.sum(torch.ones(10)).wait()
    assert time.monotonic() - begun < 60
    process.join()
    group.close()


NOBODY = 65_534


def meddles(names: Connection, user: int) -> None:
    """A process of another user: takes rank 1's place before rank 1 does, if it is let."""
    os.setuid(user)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(f"\0{names.recv()}")
        names.send("connected")
        try:
            stranger.send((1).to_bytes(4, "little"))
            names.send(stranger.recv(1))
        except ConnectionError:  # closed before it was sent, or with what was sent unread
            names.send(b"")


@pytest.mark.skipif(not may_become(NOBODY), reason="becomes another user: needs root")
def test_another_users_process_is_refused() -> None:
    pipes = [mp.Pipe() for _ in range(2)]
    context = mp.get_context("forkserver")
    rank_1 = context.Process(target=waits, args=(pipes[0][1],), daemon=True)
    stranger = context.Process(target=meddles, args=(pipes[1][1], NOBODY), daemon=True)
    for process, (_, theirs) in zip((rank_1, stranger), pipes, strict=True):
        process.start()
        theirs.close()

    def told(value: Any) -> list[Any]:
        pipes[1][0].send(value[1])
        assert pipes[1][0].recv() == "connected"  # the first
        return talk(pipes[0][0], 0, value)

    group = SharedMemory.join(0, 2, told, 60.0)
    assert group is not None
    assert pipes[1][0].recv() == b""
    assert pipes[0][0].recv() == "joined"
    rank_1.kill()
    with pytest.raises(ConnectionError, match="rank 1"):  # it was rank 1 that joined
        group.sum(torch.ones(10)).wait()
    rank_1.join()
    stranger.join()
    group.close()


def test_a_rank_lost_while_the_others_join_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_JOIN_S", 0.2)
    host = shared_memory._host()
    with pytest.raises(ConnectionError, match="process group: connection closed by peer, rank 1"):
        SharedMemory.join(0, 2, lambda value: [value, [host, "gone"]], 60.0)
    with pytest.raises(ConnectionError, match="process group: connection closed by peer, rank 0"):
        SharedMemory.join(1, 2, lambda value: [[host, "gone"], value], 60.0)

    def comes_and_goes(value: Any) -> list[Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as rank_1:
            rank_1.connect(f"\0{value[1]}")
        return [value, value]

    with pytest.raises(ConnectionError, match="process group: connection closed by peer, rank 1"):
        SharedMemory.join(0, 2, comes_and_goes, 60.0)


def on_two_hosts(rank: int, size: int) -> bool:
    shared_memory._host = lambda: f"host {rank // 2}"
    process_group.share_memory(world())
    x = torch.ones(3)
    exchange.all_reduce(x, world()).wait()
    assert x.tolist() == [size] * 3
    return exchange.shares_memory(world())


def test_ranks_of_several_hosts_use_the_network() -> None:
    assert run_ranks(3, on_two_hosts) == [False] * 3

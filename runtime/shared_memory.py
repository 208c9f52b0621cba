"""Sums and gathers among CPU ranks of one host through memory that they share.

gloo sends tensors from socket to socket through threads of its own, which wait for a core where the ranks compute on
all of them: a quarter of a MiB takes two ranks 2.1 ms, through shared memory and autograd 1.0 (`bench collectives`). A
rank *publishes*: it copies its part into a segment of its own and tells the others where. To *complete* the exchange it
waits until all have told it, and adds the parts up (or copies them) itself. Nothing runs beside the ranks, and
publishing waits for nobody: what was begun goes on while a rank computes.

    rank 0   copy ─► segment ─┐ tell        ... compute ...      wait ─► add parts 0, 1, … in this order
    rank 1   copy ─► segment ─┘ tell        ... compute ...      wait ─► the same sum, to the bit

Segments are anonymous memory (memfd), sent as file descriptors, and the ranks talk over Unix sockets without a name in
the file system: a rank that is killed leaves nothing behind, and the others see the end of its connection at once. They
are no tensors of the program (`no_dispatch`), as the buffers of gloo and NCCL are none: who counts live tensors, as
`predict`'s memory does, counts none of them.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

_PUBLISHED = struct.Struct("<4q")  # exchange, segment, bytes, the last exchange that the sender has completed
_CREDENTIALS = struct.Struct("3i")  # of the process at the other end: pid, uid, gid
_PAGE = 2**12
_JOIN_S = 15.0  # all ranks have just told their names
_LOOSE = 4  # a segment may be this many times larger than what it is used for

Talk = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Pending:
    """An exchange that this rank has begun; `wait` ends it, and all that the group began before."""

    group: SharedMemory
    number: int

    def wait(self) -> None:
        """Until the result is there. Raises ConnectionError where a rank is lost or silent for too long."""
        self.group.complete(self.number)


@dataclass
class _Segment:
    number: int
    memory: Tensor  # bytes
    descriptor: int
    told: set[int] = field(default_factory=set)  # ranks that have it


@dataclass
class _Peer:
    """Another rank: its segments by number, what it has published and completed."""

    connection: socket.socket
    segments: dict[int, Tensor] = field(default_factory=dict)
    published: dict[int, tuple[int, int]] = field(default_factory=dict)  # exchange: (segment, bytes)
    completed: int = -1


class SharedMemory:
    """One group of ranks, all of them on this host. `join` makes it; every rank begins the same exchanges in the
    same order."""

    def __init__(self, rank: int, connections: dict[int, socket.socket], timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._peers = {peer: _Peer(connection) for peer, connection in connections.items()}
        for connection in connections.values():
            connection.setblocking(False)
        self._size = len(connections) + 1
        self._next, self._completed = 0, -1
        self._free: list[_Segment] = []
        self._used: deque[tuple[int, _Segment]] = deque()  # by exchange; others may still read them
        self._num_segments = 0
        self._waiting: deque[tuple[int, Tensor, Callable[[list[Tensor]], None]]] = deque()

    @classmethod
    def join(cls, rank: int, size: int, talk: Talk, timeout_s: float) -> SharedMemory | None:
        """This rank's end of a new group; None, on all ranks, where they are not all on one host. Collective.

        talk: gives every rank's plain data to all, by rank.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            name = f"anabranch-{secrets.token_hex(16)}"
            listener.bind(f"\0{name}")
            listener.listen(size)
            listener.settimeout(min(timeout_s, _JOIN_S))
            told = talk([_host(), name])
            if any(host != told[rank][0] or not host for host, _ in told):
                return None
            connections: dict[int, socket.socket] = {}
            try:
                cls._connect(rank, size, [name for _, name in told], listener, connections)
            except OSError as error:
                for connection in connections.values():
                    connection.close()
                if not isinstance(error, ConnectionError | TimeoutError):
                    raise  # of this rank itself
                missing = next(peer for peer in range(size) if peer not in (rank, *connections))
                raise _lost(missing, error) from error
        return cls(rank, connections, timeout_s)

    @staticmethod
    def _connect(
        rank: int,
        size: int,
        names: Sequence[str],
        listener: socket.socket,
        connections: dict[int, socket.socket],
    ) -> None:
        """Fills `connections`: to the ranks before this one, which listen by now, and from those behind it."""
        for peer in range(rank):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(f"\0{names[peer]}")
                connection.send(rank.to_bytes(4, "little"))
            except OSError:
                connection.close()
                raise
            connections[peer] = connection
        while len(connections) < size - 1:
            connection, _ = listener.accept()
            found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(found)[1] != os.getuid():
                connection.close()  # any user of the host can reach the socket
                continue
            connection.settimeout(listener.gettimeout())
            try:
                told = connection.recv(4)
            except OSError:
                connection.close()
                raise
            if not told:
                connection.close()
                raise ConnectionResetError("it went away as it came")
            connections[int.from_bytes(told, "little")] = connection

    def sum(self, x: Tensor, rows: Tensor | None = None) -> Pending:
        """Begins the sum of all ranks' x, which replaces x: (…), without gaps, of one shape and type on all ranks.

        rows: a part of x without gaps, another on each rank: of the sum this rank wants only that.
        """
        mine = (x if rows is None else rows).view(-1)
        start = mine.storage_offset() - x.storage_offset()

        def add(parts: list[Tensor]) -> None:
            first, second, *others = (part[start : start + len(mine)] for part in parts)
            torch.add(first, second, out=mine)
            for part in others:
                mine.add_(part)

        return self._begin(x, add)

    def all_gather(self, x: Tensor, sizes: Sequence[int], into: Tensor) -> Pending:
        """Begins to fill `into` (the sum of sizes, …) with sizes[i] rows of each rank i; x: (sizes[rank], …)."""

        def copy(parts: list[Tensor]) -> None:
            for rows, part in zip(into.split(list(sizes)), parts, strict=True):
                rows.view(-1).copy_(part)

        return self._begin(x, copy)

    def _begin(self, x: Tensor, finish: Callable[[list[Tensor]], None]) -> Pending:
        number, self._next = self._next, self._next + 1
        segment = self._segment(x.nbytes)
        with no_dispatch():
            mine = segment.memory[: x.nbytes].view(x.dtype)
            mine.copy_(x.detach().view(-1))
        self._used.append((number, segment))
        self._waiting.append((number, mine, finish))
        message = _PUBLISHED.pack(number, segment.number, x.nbytes, self._completed)
        for rank in self._peers:
            new = [] if rank in segment.told else [segment.descriptor]
            segment.told.add(rank)
            self._tell(rank, message, new)
        return Pending(self, number)

    def _tell(self, rank: int, message: bytes, descriptors: list[int]) -> None:
        connection = self._peers[rank].connection
        while True:
            try:
                if descriptors:
                    socket.send_fds(connection, [message], descriptors)
                else:
                    connection.send(message)
                return
            except BlockingIOError:  # full: it may be telling us as much, so that both must listen
                self._await(rank, write=True)
            except OSError as error:
                raise _lost(rank, error) from error

    def _await(self, rank: int, *, write: bool = False) -> None:
        """Until this rank has told something; write: until it can be told something, hearing all ranks meanwhile."""
        poll = select.poll()
        for peer, other in self._peers.items():
            if write or peer == rank:
                poll.register(
                    other.connection, select.POLLIN | (select.POLLOUT if write and peer == rank else 0)
                )
        ready = poll.poll(1000 * self.timeout_s)
        if not ready:
            raise ConnectionError(
                f"process group: rank {rank} of this host gave nothing for {self.timeout_s:g} s"
            )
        if write:
            came = {number for number, event in ready if event & select.POLLIN}
            for peer, other in self._peers.items():
                if other.connection.fileno() in came:
                    self._hear(peer, other)

    def complete(self, number: int) -> None:
        """Ends all exchanges up to this one, in order."""
        with no_dispatch():
            while self._waiting and self._waiting[0][0] <= number:
                begun, mine, finish = self._waiting[0]
                ranks = range(self._size)
                finish([mine if r == self.rank else self._part(r, begun, mine.dtype) for r in ranks])
                self._waiting.popleft()
                self._completed = begun

    def _part(self, rank: int, number: int, dtype: torch.dtype) -> Tensor:
        peer = self._peers[rank]
        while number not in peer.published:
            self._hear(rank, peer)
        segment, num_bytes = peer.published.pop(number)
        return peer.segments[segment][:num_bytes].view(dtype)

    def _hear(self, rank: int, peer: _Peer) -> None:
        """Take the next message of a rank, if one is there; segments that all have read are free again."""
        try:
            message, descriptors, _, _ = socket.recv_fds(peer.connection, _PUBLISHED.size, 1)
        except BlockingIOError:
            self._await(rank)
            return
        except OSError as error:
            raise _lost(rank, error) from error
        if not message:
            raise _lost(rank)
        number, segment, num_bytes, peer.completed = _PUBLISHED.unpack(message)
        for descriptor in descriptors:
            peer.segments[segment] = _mapped(descriptor, os.fstat(descriptor).st_size)
            os.close(descriptor)
        peer.published[number] = segment, num_bytes
        read = min(other.completed for other in self._peers.values())
        while self._used and self._used[0][0] <= read:
            self._free.append(self._used.popleft()[1])

    def _segment(self, num_bytes: int) -> _Segment:
        """One that nobody reads any more, else a new one."""
        fitting = [s for s in self._free if num_bytes <= len(s.memory) <= max(_LOOSE * num_bytes, _PAGE)]
        if fitting:
            best = min(fitting, key=lambda segment: len(segment.memory))
            self._free.remove(best)
            return best
        size = max(-(-num_bytes // _PAGE), 1) * _PAGE
        descriptor = os.memfd_create("anabranch", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, size)  # too little memory is an error here, and not a signal later
        self._num_segments += 1
        return _Segment(self._num_segments, _mapped(descriptor, size), descriptor)

    def shut_down(self) -> None:
        """Every exchange that waits fails at once, here and on the other ranks. From any thread."""
        for peer in self._peers.values():
            with suppress(OSError):  # closed, or the other end is
                peer.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leaves the group."""
        for peer in self._peers.values():
            peer.connection.close()
        for segment in [*self._free, *(segment for _, segment in self._used)]:
            os.close(segment.descriptor)
        self._free.clear()
        self._used.clear()


def _mapped(descriptor: int, size: int) -> Tensor:
    """A segment's bytes; the mapping lasts as long as a tensor of it."""
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


def _host() -> str:
    """The same for processes that can share memory: one kernel, one network namespace, one user; "" where none can.

    A namespace counts as a host: who put ranks into two of them wants the network between.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not hasattr(os, "memfd_create") or not boot.exists():
        return ""
    network = Path("/proc/self/ns/net").readlink()
    return f"{boot.read_text().strip()} {network} {os.getuid()}"


def _lost(rank: int, error: OSError | None = None) -> ConnectionError:
    return ConnectionError(
        f"process group: connection closed by peer, rank {rank} of this host{f' ({error})' if error else ''}"
    )

"""Process groups that a controller can give up and form anew, without the process.

Where a rank is lost, the others must leave their groups at once: gloo (torch 2.13) has no abort, and a rank whose own
connections are sound may wait for one that waits for it until the timeout. So the groups' connections are shut down,
from another thread too, whereupon every collective on them fails within milliseconds. NCCL's groups are aborted.
"""

from __future__ import annotations

import os
import socket
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from anabranch.cluster import WorkerContext
from anabranch.runtime import exchange
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.process_group import gather_json, process_group

_JOIN_S = 15.0  # for ranks that are known to be ready


class _Socket(NamedTuple):
    """One of this process's; remote: None where it listens."""

    number: int
    inode: int
    local: tuple[str, int]
    remote: tuple[str, int] | None


class Generation:
    """The process groups of one generation, within its context.

    Under a launcher that replaces no ranks it is `process_group`.
    """

    def __init__(self, context: WorkerContext, timeout_s: float, precision: str = "fp32") -> None:
        self.context, self.timeout_s, self.precision = context, timeout_s, precision
        self._before: set[int] = set()  # listeners

    @contextmanager
    def groups(self) -> Iterator[None]:
        """Forms the default group; at the end it is left, after an error without waiting for anybody."""
        if not self.context.recovers:
            with process_group(self.context, self.timeout_s, self.precision):
                yield
            return
        self._before = {each.inode for each in _tcp_sockets() if each.remote is None}
        self.context.on_abort(lambda: _abort(self._connections(set())))
        if self.context.aborted:
            raise ConnectionError("process group: given up before it was formed")
        try:
            later = self.context.generation > 0
            join_s = _JOIN_S if later else None
            with process_group(self.context, self.timeout_s, self.precision, join_s):
                try:
                    yield
                except BaseException:
                    self.abort()
                    raise
        finally:
            self.context.on_abort(None)

    def formed(self, mesh: Mesh) -> None:
        """All groups stand: from now on these connections, and no later ones, are theirs."""
        if not self.context.recovers:
            return
        told = gather_json(sorted(self._listeners()), self.context.device)
        connections = self._connections({(address, port) for ports in told for address, port in ports})
        self.context.on_abort(lambda: _abort(connections))
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), mesh.world_group)

    def _listeners(self) -> set[tuple[str, int]]:
        """Addresses at which the groups' connections are accepted: everything else that listens was there before."""
        return {
            each.local for each in _tcp_sockets() if each.remote is None and each.inode not in self._before
        }

    def _connections(self, remote: set[tuple[str, int]]) -> list[_Socket]:
        """Those of the groups, and no others (Ray has its own): accepted here or at `remote`, or to the store."""
        ports = {port for _, port in self._listeners()}
        store = int(self.context.init_method.rpartition(":")[2] or 0)
        return [
            each
            for each in _tcp_sockets()
            if each.remote and (each.local[1] in ports or each.remote in remote or each.remote[1] == store)
        ]

    def abort(self) -> None:
        """Ends every collective of this process, and with them those of the others."""
        self.context.abort()


def _abort_group(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError):  # it may have failed by itself
        group.abort()


def _abort(connections: Iterable[_Socket]) -> None:
    """Only connected sockets: gloo's listener ends the process where it is shut down."""
    exchange.shut_down()
    if torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        # all at once: one's end may wait for what another still runs on the GPU
        groups = list(dist.distributed_c10d._world.pg_names)
        threads = [threading.Thread(target=_abort_group, args=(group,), daemon=True) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for each in connections:
        with suppress(OSError):  # closed meanwhile
            if os.fstat(each.number).st_ino == each.inode:
                with socket.socket(fileno=os.dup(each.number)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


def _tcp_sockets() -> Iterator[_Socket]:
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or not connected
            number = int(path.name)
            found = os.stat(number)
            if not stat.S_ISSOCK(found.st_mode):
                continue
            with socket.socket(fileno=os.dup(number)) as one:
                if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                    continue
                listens = bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                remote = None if listens else one.getpeername()[:2]
                yield _Socket(number, found.st_ino, one.getsockname()[:2], remote)

"""Process groups that a controller can give up and form anew, without the process.

Where a rank is lost, the others must leave their groups at once: gloo (torch 2.13) has no abort, and a rank whose own
connections are sound may wait for one that waits for it until the timeout. So the groups' connections are shut down,
from another thread too, whereupon every collective on them fails within milliseconds. NCCL's groups are aborted.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from anabranch.cluster import WorkerContext
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.process_group import process_group

_JOIN_S = 30.0  # for ranks that are known to be ready


class Generation:
    """The process groups of one generation, within its context.

    Under a launcher that replaces no ranks it is `process_group`.
    """

    def __init__(self, context: WorkerContext, timeout_s: float) -> None:
        self.context, self.timeout_s = context, timeout_s
        self._before: set[tuple[int, int]] = set()

    @contextmanager
    def groups(self) -> Iterator[None]:
        """Forms the default group; at the end it is left, after an error without waiting for anybody."""
        if not self.context.recovers:
            with process_group(self.context, self.timeout_s):
                yield
            return
        self._before = _connections()
        self.context.on_abort(lambda: _abort(_connections() - self._before))
        if self.context.aborted:
            raise ConnectionError("process group: given up before it was formed")
        try:
            later = self.context.generation > 0
            with process_group(self.context, _JOIN_S if later else self.timeout_s):
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
        mine = _connections() - self._before
        self.context.on_abort(lambda: _abort(mine))
        for group in {mesh.world_group, mesh.data_group, mesh.branch_group}:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_s), group)

    def abort(self) -> None:
        """Ends every collective of this process, and with them those of the others."""
        self.context.abort()


def _abort(connections: set[tuple[int, int]]) -> None:
    if torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
        for group in list(dist.distributed_c10d._world.pg_names):
            with suppress(RuntimeError):  # it may have failed by itself
                group.abort()
    for number, inode in connections:
        with suppress(OSError):  # closed meanwhile
            if os.fstat(number).st_ino == inode:
                with socket.socket(fileno=os.dup(number)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


def _connections() -> set[tuple[int, int]]:
    """(descriptor, inode) of this process's connected TCP sockets. Those that listen are left out: gloo's listener
    ends the process where it is shut down."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or no socket, or not connected
            number = int(path.name)
            with socket.socket(fileno=os.dup(number)) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.getpeername()
                    found.add((number, os.fstat(number).st_ino))
    return found

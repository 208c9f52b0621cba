"""RUN/run.lock: one run at a time in a folder.

The file names its holder: {pid, host, machine, process_start, started}. A holder on this machine counts while its
process lives; one elsewhere while it touches the file. So what a killed run left is taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anabranch.runtime.errors import ConfigError

LOCK = "run.lock"
HEARTBEAT_S = 10.0
STALE_S = 60.0
"""Seconds without a sign of life after which another machine's holder counts for dead."""


class RunLock:
    """Held within its context, from the first `take` on; one program's threads take it once."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._ended = threading.Event()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._path is not None:
            with suppress(OSError), _alone(self._path) as file:
                if _is_me(_holder(file)):
                    self._path.unlink()

    def take(self, run_dir: Path) -> None:
        """Locks the folder, which must exist. Raises ConfigError, naming pid and host, where another run is in it."""
        if self._path == run_dir / LOCK:
            return
        assert self._path is None, "a run has one folder"
        path = run_dir / LOCK
        try:
            with _alone(path) as file:
                holder = _holder(file)
                if holder and not _is_me(holder) and _lives(holder, file, path):
                    raise ConfigError(
                        f"{run_dir} is in use by another run: process {holder['pid']} on host {holder['host']}, since "
                        f"{holder['started']}; wait for it, stop it, or choose another folder"
                    )
                me = {**_me(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(me).encode(), 0)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}; choose another folder with --run-dir"
            ) from error
        self._path = path
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(self._path or "")


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """The open lock file, which nobody else reads or writes meanwhile."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            with suppress(OSError):  # a file system without it: two runs that start at once may both get in
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file), path.stat())
            except FileNotFoundError:  # its holder ended just now
                same = False
            if same:
                yield file
                return
        finally:
            os.close(file)


def _me() -> dict[str, Any]:
    """This process, so that no other one on any host is the same."""
    pid = os.getpid()
    return {
        "pid": pid, "host": socket.gethostname(), "machine": _machine(), "process_start": _process_start(pid)
    }  # fmt: skip


def _is_me(holder: dict[str, Any]) -> bool:
    return {name: value for name, value in holder.items() if name != "started"} == _me()


def _holder(file: int) -> dict[str, Any]:
    """Who the file names; empty if nobody (it is new, or torn)."""
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return found if isinstance(found, dict) and {*_me(), "started"} <= found.keys() else {}
    except (ValueError, RecursionError):
        return {}


def _lives(holder: dict[str, Any], file: int, path: Path) -> bool:
    if holder["machine"] and holder["machine"] == _machine():
        start = _process_start(holder["pid"]) if isinstance(holder["pid"], int) else ""
        return start != "" and start == holder["process_start"]
    now = path.with_name(
        f"{LOCK}.{socket.gethostname()}.{os.getpid()}"
    )  # by the file system's clock, not ours
    now.touch()
    try:
        return now.stat().st_mtime - os.fstat(file).st_mtime < STALE_S
    finally:
        now.unlink()


def _machine() -> str:
    """This boot of this machine, and the numbering of its processes; "" where it cannot be told (no Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process began, in the kernel's own count; "" if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]

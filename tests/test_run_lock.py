"""One run at a time in a folder: the second is refused by name; what a dead one left is taken over."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anabranch.runtime.errors import ConfigError
from anabranch.runtime.run_lock import LOCK, STALE_S, RunLock

HOLD = """
import sys, time
from pathlib import Path
from anabranch.runtime.run_lock import RunLock
with RunLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=280)


def test_in_use_and_free_again(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    in_use = (
        rf"is in use by another run: process {holder.pid} on host {re.escape(socket.gethostname())}, since 2"
    )
    with RunLock() as lock, pytest.raises(ConfigError, match=in_use):
        lock.take(tmp_path)
    assert (tmp_path / LOCK).exists()  # who was refused leaves it
    end(holder)
    assert list(tmp_path.iterdir()) == []
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)  # the same run
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_killed_holder(tmp_path: Path) -> None:
    """Its lock is taken over at once, even where another process has its number by now."""
    holder = hold(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    end(holder)
    left = json.loads((tmp_path / LOCK).read_text())
    assert left["pid"] == holder.pid
    with RunLock() as lock:
        lock.take(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({**left, "pid": os.getppid()}))
    with RunLock() as lock:
        lock.take(tmp_path)


def test_another_host(tmp_path: Path) -> None:
    """Counts by its sign of life."""
    path = tmp_path / LOCK
    body = {"pid": 7, "host": "host-b", "machine": "another", "process_start": "1", "started": "yesterday"}
    path.write_text(json.dumps(body))
    with RunLock() as lock, pytest.raises(ConfigError, match="process 7 on host host-b, since yesterday"):
        lock.take(tmp_path)
    os.utime(path, (time.time() - 2 * STALE_S,) * 2)
    with RunLock() as lock:
        lock.take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 1}', "[" * 3000])
def test_torn(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    with RunLock() as lock:
        lock.take(tmp_path)


def test_symlink_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("x")
    (tmp_path / LOCK).symlink_to(target)
    with RunLock() as lock, pytest.raises(ConfigError, match=r"run\.lock cannot be written"):
        lock.take(tmp_path)
    assert target.read_text() == "x"


def test_second_training_is_refused(tmp_path: Path) -> None:
    """Before anything starts, with exit code 2; the folder is as it was."""
    holder = hold(tmp_path)
    command = [
        sys.executable,
        "-m",
        "anabranch.runtime",
        "train",
        "--launcher",
        "none",
        "--run-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"in use by another run: process {holder.pid} on host" in " ".join(done.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    end(holder)

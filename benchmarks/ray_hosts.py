"""A Ray cluster over two hosts of this machine: a head and a second node, each in its network namespace. Needs root."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from anabranch.benchmarks.fault_runs import python_path
from anabranch.benchmarks.two_hosts import Host, two_hosts

_PORT = 6379
_START_S = 60.0
_OBJECT_STORE_BYTES = 100 * 2**20


class RayHosts:
    """hosts: the head's and the other one, joined by a wire. Each offers `num_cpus`."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path, num_cpus: int) -> None:
        self.hosts, self._folder, self._num_cpus = hosts, folder, num_cpus
        self._environ = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "RAY_AUTH_MODE": os.environ.setdefault("RAY_AUTH_MODE", "token"),
            "RAY_AUTH_TOKEN": os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32)),
        }

    @property
    def address(self) -> str:
        """The cluster's, on the wire."""
        return f"{self.hosts[0].address}:{_PORT}"

    def start(self, index: int, environ: Mapping[str, str] | None = None) -> None:
        """Starts Ray on a host, and waits for it. Raises RuntimeError with what it printed where it does not start.

        environ: what its workers have in their environment besides.
        """
        host = self.hosts[index]
        role = ["--address", self.address]
        if index == 0:
            role = ["--head", "--port", str(_PORT), "--include-dashboard", "false"]
            role += ["--temp-dir", str(self._folder)]
        command = [
            "ip", "netns", "exec", host.namespace, sys.executable, "-m", "ray.scripts.scripts", "start", *role,
            "--node-ip-address", host.address, "--num-cpus", str(self._num_cpus), "--num-gpus", "0",
            "--object-store-memory", str(_OBJECT_STORE_BYTES), "--disable-usage-stats",
        ]  # fmt: skip
        done = subprocess.run(
            command,
            env={**self._environ, **(environ or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=_START_S,
        )
        if done.returncode:
            raise RuntimeError(f"Ray did not start on {host.namespace}:\n{done.stdout}{done.stderr}")

    def lose(self, index: int) -> None:
        """SIGKILL of every process of a host: Ray's, and the workers."""
        while pids := self.pids(index):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def has_ray(self, index: int) -> bool:
        """Whether a host's raylet lives."""
        with suppress(OSError):
            return any("raylet" in Path(f"/proc/{pid}/comm").read_text() for pid in self.pids(index))
        return False

    def pids(self, index: int) -> list[int]:
        """The processes of a host."""
        command = ["ip", "netns", "pids", self.hosts[index].namespace]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return [pid for pid in map(int, found) if _is_alive(pid)]


@contextmanager
def ray_hosts(num_cpus: int, mbit_per_s: float = 1000.0) -> Iterator[RayHosts]:
    """Both hosts with Ray started; all their processes are ended afterwards. Raises RuntimeError: `why_not`."""
    folder = Path(tempfile.mkdtemp(prefix="rh-", dir="/tmp"))  # a socket's path must be short
    try:
        with two_hosts(mbit_per_s) as hosts:
            cluster = RayHosts(hosts, folder, num_cpus)
            try:
                cluster.start(0)
                cluster.start(1)
                yield cluster
            finally:
                cluster.lose(1)
                cluster.lose(0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False

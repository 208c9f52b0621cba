"""Two hosts on one machine: network namespaces joined by a wire of a stated rate. Needs root, `ip` and `tc` (Linux)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anabranch.runtime.errors import ConfigError

_NETWORK = 0x40000000  # CLONE_NEWNET of <sched.h>; os.setns is Python 3.12's
_BURST = "32kb"  # what may leave at once; small, so that the rate holds for small messages too


@dataclass(frozen=True)
class Host:
    """One of the two. address: on the wire between them. device: its end of the wire."""

    namespace: str
    address: str
    device: str

    def popen(
        self, command: Sequence[str], environ: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command on this host, its output piped."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            env={**os.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def enter(self) -> None:
        """From now on the network of the calling thread, and of those that it starts, is this host's."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/run/netns", self.namespace).open("rb") as namespace:
            if libc.setns(namespace.fileno(), _NETWORK):
                raise OSError(ctypes.get_errno(), f"entering the network namespace {self.namespace}")

    def cut(self) -> None:
        """Takes this end of the wire down."""
        _run("ip", "-n", self.namespace, "link", "set", self.device, "down")

    def heal(self) -> None:
        """Puts it up again."""
        _run("ip", "-n", self.namespace, "link", "set", self.device, "up")

    def limit(self, mbit_per_s: float) -> None:
        """Sets the rate at which this host sends."""
        _run(
            "tc", "-n", self.namespace, "qdisc", "replace", "dev", self.device, "root", "tbf",
            "rate", f"{mbit_per_s:g}mbit", "burst", _BURST, "latency", "500ms",
        )  # fmt: skip

    @contextmanager
    def blocking(self, port: int) -> Iterator[None]:
        """This host refuses to send to a TCP port, as behind a firewall."""
        rule = ("rule", "add", "ipproto", "tcp", "dport", str(port), "prohibit")
        _run("ip", "-n", self.namespace, *rule)
        try:
            yield
        finally:
            _run("ip", "-n", self.namespace, "rule", "del", *rule[2:])


def why_not() -> str:
    """Why two hosts cannot be made here; "" where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found: install iproute2" if missing else ""


@contextmanager
def two_hosts(mbit_per_s: float) -> Iterator[tuple[Host, Host]]:
    """Two namespaces, a wire of `mbit_per_s` each way between them; gone afterwards. Raises ConfigError: `why_not`."""
    if reason := why_not():
        raise ConfigError(reason)
    key = os.getpid() % 10_000
    hosts = [
        Host(f"anabranch-{key}-{end}", f"10.77.7.{i + 1}", f"ab{key}{end}") for i, end in enumerate("ab")
    ]
    try:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
        _run("ip", "link", "add", hosts[0].device, "type", "veth", "peer", "name", hosts[1].device)
        for host in hosts:
            _run("ip", "link", "set", host.device, "netns", host.namespace)
            _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
            _run("ip", "-n", host.namespace, "link", "set", host.device, "up")
            host.limit(mbit_per_s)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:  # takes the wire along
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")

"""Two hosts as a user meets them: `doctor`, planted network faults, `profile` over a fast and a slow wire, `verify`.

Two namespaces of this machine, a Ray node in each (root only). `python -m anabranch.benchmarks hosts`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from anabranch.benchmarks.fault_runs import CONFIG, python_path
from anabranch.benchmarks.ray_hosts import RayHosts, ray_hosts
from anabranch.benchmarks.record import RESULTS, write_record

_LIMIT_S = 120.0
_PORT = 29_500
_UNROUTABLE = (
    "198.51.100.1:6379"  # an address for documentation (RFC 5737): no route in a namespace leads to it
)


def run(
    *, fast_mbit_per_s: float = 1000.0, slow_mbit_per_s: float = 20.0, folder: Path = RESULTS
) -> dict[str, Any]:
    """Runs all of it and writes the record: doctor, faults, profiles and verify.

    Raises RuntimeError without root, `ip` or `tc`; and where a command does not end with its promise.
    """
    with tempfile.TemporaryDirectory() as place, ray_hosts(1, fast_mbit_per_s) as cluster:
        bench = _Bench(cluster, Path(place))
        healthy = [bench.call("doctor") for _ in range(3)]
        result = {
            "doctor": {
                "seconds": [each["seconds"] for each in healthy],
                "passed": [each["code"] == 0 for each in healthy],
                "checks": healthy[0]["result"].get("checks", [healthy[0]]),
            },
            "profiles": [bench.profile(rate) for rate in (fast_mbit_per_s, slow_mbit_per_s)],
            "verify_without_shared_folder": bench.verify(),
            "faults": bench.faults(),
        }
    record = {"num_hosts": 2, **result}
    return {**record, "path": str(write_record("hosts", record, folder))}


class _Bench:
    def __init__(self, cluster: RayHosts, place: Path) -> None:
        self.cluster, self.place = cluster, place
        (place / "run.toml").write_text(CONFIG)

    def call(self, verb: str, *flags: str, address: str = "") -> dict[str, Any]:
        """A command on the first host: its result, exit code, seconds and standard error."""
        command = [
            "ip", "netns", "exec", self.cluster.hosts[0].namespace,
            sys.executable, "-m", "anabranch.runtime", verb, "run.toml", "--json",
            "--address", address or self.cluster.address, "--launch.cpus-per-worker", "1", *flags,
        ]  # fmt: skip
        environ = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        begun = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self.place,
            env=environ,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        seconds = time.monotonic() - begun
        lines = done.stdout.splitlines()
        result = json.loads(lines[-1]) if lines else {}
        return {"code": done.returncode, "seconds": seconds, "result": result, "stderr": done.stderr}

    def profile(self, mbit_per_s: float) -> dict[str, Any]:
        """`anabranch profile` of one branch group across the wire: each rank's host, and its parts of a step."""
        for host in self.cluster.hosts:
            host.limit(mbit_per_s)
        path = self.place / f"profile-{mbit_per_s:g}"
        told = self.call("profile", "--mesh", "1x2", "--plan", "even", "--steps", "6", "--run-dir", str(path))
        if told["code"]:
            raise RuntimeError(f"profile ended with {told['code']}:\n{told['stderr']}")
        profile = json.loads((path / "profile.json").read_text())
        ranks = [
            {"host": rank["host"], "parts_s": {name: part["p50"] for name, part in rank["parts"].items()}}
            for rank in profile["ranks"]
        ]
        exchanges = [
            [e["transfer_s"] * e["calls"], *(wait for wait in e["wait_s"])] for e in profile["exchanges"]
        ]
        return {
            "mbit_per_s": mbit_per_s,
            "seconds": told["seconds"],
            "step_s": told["result"]["step_s"],
            "ranks": ranks,
            "transfer_s": sum(row[0] for row in exchanges),
            "wait_s": [sum(row[1 + rank] for row in exchanges) for rank in range(len(ranks))],
            "stragglers": [f"rank {one['rank']} on {one['host']}" for one in profile["stragglers"]],
        }

    def verify(self) -> dict[str, Any]:
        """`anabranch verify` where the hosts share no folder: it needs none."""
        told = self.call("verify", "--mesh", "1x2", "--steps", "1", "--run-dir", "/proc/nothing")
        return {
            "code": told["code"],
            "seconds": told["seconds"],
            "error": told["result"].get("error", ""),
        }

    def faults(self) -> list[dict[str, Any]]:
        """Each fault of the network, planted one after another: what `doctor` said of it, and how soon."""
        port = ("--launch.port", str(_PORT))
        found = []
        faults: list[tuple[str, AbstractContextManager[None], tuple[str, ...], str, str]] = [
            ("port in use", self._listening(), port, "", f"{_PORT} is in use"),
            ("port blocked", self.cluster.hosts[1].blocking(_PORT), port, "", "cannot connect to"),
            ("unroutable address", nullcontext(), (), _UNROUTABLE, f"no Ray cluster answers at {_UNROUTABLE}"),
            ("nobody listens", nullcontext(), (), f"{self.cluster.hosts[1].address}:9", "no Ray cluster answers"),
            ("cluster too small", nullcontext(), ("--mesh", "2x4"), "", "the cluster has room for 2"),
            ("wrong interface", self._wrong_interface(), (), "", "no_such0"),
            ("link down", self._cut(), (), "", "no answer"),
        ]  # fmt: skip
        for name, planted, flags, address, named in faults:
            with planted:
                told = self.call("doctor", *flags, address=address)
            failed = [check for check in told["result"].get("checks", []) if not check["ok"]]
            said = [f"{check['host']}: {check['found']} → {check['remedy']}" for check in failed]
            found.append({
                "fault": name,
                "named": told["code"] == 1 and any(named in text for text in said),
                "seconds": told["seconds"],
                "said": said or told["stderr"][-2000:],
            })  # fmt: skip
        return found

    @contextmanager
    def _listening(self) -> Iterator[None]:
        program = f"import socket, time; s = socket.create_server(('', {_PORT})); print(1, flush=True); time.sleep(999)"
        process = self.cluster.hosts[0].popen([sys.executable, "-c", program])
        assert process.stdout is not None, "piped"
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()
            process.communicate()

    @contextmanager
    def _wrong_interface(self) -> Iterator[None]:
        self.cluster.lose(1)
        self.cluster.start(1, {"GLOO_SOCKET_IFNAME": "no_such0"})
        yield
        self.cluster.lose(1)
        self.cluster.start(1)

    @contextmanager
    def _cut(self) -> Iterator[None]:
        self.cluster.hosts[1].cut()
        yield
        self.cluster.hosts[1].heal()

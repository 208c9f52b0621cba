"""What would stop a run: each check by a table, and faults planted on a real second node.

Planted for real, and named by a whole `anabranch doctor` with exit code 1 in less than a minute:

    another version of a package, no anabranch, a GPU that is not there, a missing interface, a port in use, a wrong
    clock, no token, a cluster too small             test_faults_of_a_node_are_named (opt-in), all at once
    a folder that is not shared                      the same, where this user may mount
    a folder that is read-only, a full disk          test_folders_of_a_node_are_named (opt-in; mounts)
    nothing at the address                           test_address_of_nothing
    a GPU that is not there, a port in use           test_cluster.py, by default
    a port that is blocked, an address without a route, a link that is down      test_hosts.py (opt-in; namespaces)
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from privileges import may_mount

from anabranch.cluster import ClusterError, checks, connect
from anabranch.cluster.checks import Check, NodeReport
from anabranch.cluster.doctor import preflight
from anabranch.cluster.node_probe import NodeProbe
from anabranch.cluster.ray_session import hosts
from anabranch.cluster.ward import Ward, rounds
from anabranch.runtime.cli import parse, run

VERSIONS = {
    "python": "3.11.7",
    "ray": "2.60.0",
    "torch": "2.13.0",
    "cuda": "13.0",
    "nccl": "2.29",
    "anabranch": "1",
}
A = NodeReport("a", "192.0.2.1", 2, 2, VERSIONS | {"gpus": "2"}, "eth0", auth_mode="token", free_bytes=2**40)
B = replace(A, name="b", address="192.0.2.2")
GIB = 2**30
NAMED_S = 60.0  # what would stop a run is to be named in less

FAULTS = [
    ("no answer", checks.check_answers([A, replace(B, error="no answer in 20 s")]), "no answer in 20 s", "ray status"),
    (
        "version",
        checks.check_versions(VERSIONS, [A, replace(B, versions={**VERSIONS, "torch": "2.11.0"})]),
        "torch 2.11.0, the driver has 2.13.0",
        "pip install torch==2.13.0",
    ),
    (
        "package",
        checks.check_versions(VERSIONS, [A, replace(B, versions={**VERSIONS, "anabranch": ""})]),
        "no anabranch",
        "install the same version",
    ),
    ("GPU", checks.check_gpus([A, replace(B, gpus=3)]), "Ray offers 3 GPUs, torch sees 2", "--num-gpus 2"),
    (
        "GPU in use",
        checks.check_gpus([A, replace(B, gpu_memory_used=(0, 30 * GIB))]),
        r"\(GPU 1: 30.0 GiB\)",
        "nvidia-smi",
    ),
    ("interface", checks.check_interfaces([A, replace(B, missing_interfaces=["ib7"])]), "names ib7", "unset it"),
    ("address", checks.check_interfaces([A, replace(B, interface="")]), "no interface owns", "--node-ip-address"),
    (
        "loopback",
        checks.check_interfaces([A, replace(B, interface="lo", address="127.0.0.1")]),
        "127.0.0.1 is loopback",
        "--node-ip-address",
    ),
    ("port", checks.check_port(B, 29500, None), "29500 is in use on b", "another launch.port"),
    ("route", checks.check_reach(A, [A, replace(B, reach_error="timed out")]), "192.0.2.1: timed out", "open all TCP"),
    ("clock", checks.check_clocks([A, replace(B, skew_s=-90)]), "90.0 s behind", "NTP"),
    ("shared", checks.check_folder("/r", "", [A, replace(B, folder_error="absent")]), "/r is not shared", "--run-dir"),
    ("unseen", checks.check_folder("/r", "", [A, replace(B, unseen=["a", "b"])]), "what a wrote", "--run-dir"),
    (
        "read-only",
        checks.check_folder("/r", "", [A, replace(B, folder_error="Read-only file system")]),
        "Read-only",
        "mount it for writing",
    ),
    ("disk", checks.check_disk("/r", [A, replace(B, free_bytes=GIB // 2)]), "0.5 GiB free at /r", "free 1 GiB"),
    ("token", checks.check_token([A, replace(B, auth_mode="")]), "anyone who reaches 192.0.2.2", "get-auth-token"),
    ("pair", checks.check_pairs({("a", "b"): "timed out", ("a", "c"): ""}), "timed out", "GLOO_SOCKET_IFNAME"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("found", "text", "remedy"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS]
)
def test_each_fault_is_named_where_it_is(found: list[Check], text: str, remedy: str) -> None:
    (failed,) = [check for check in found if not check.ok]
    assert failed.host in ("b", "a – b")
    assert re.search(text, failed.found), failed.found
    assert remedy in failed.remedy


def test_a_good_cluster_passes() -> None:
    nodes = [A, B]
    found = [
        *checks.check_answers(nodes),
        *checks.check_versions(VERSIONS, nodes),
        *checks.check_gpus(nodes),
        *checks.check_interfaces(nodes),
        *checks.check_port(A, 0, 1024),
        *checks.check_reach(A, nodes),
        *checks.check_clocks(nodes),
        *checks.check_folder("/r", "", nodes),
        *checks.check_disk("/r", nodes),
        *checks.check_token([A, replace(B, auth_mode="disabled")]),
        *checks.check_pairs({("a", "b"): ""}),
    ]
    assert all(check.ok and not check.remedy for check in found)


@pytest.mark.parametrize(
    ("modes", "here", "address", "refused"),
    [
        (["token", "Token"], "", "192.0.2.2", []),
        (["token", ""], "", "192.0.2.2", ["b"]),
        (["", ""], "token", "192.0.2.2", ["a", "b"]),  # the driver offers one, nobody asks for it
        (["disabled", ""], "", "192.0.2.2", ["b"]),
        (["disabled", "disabled"], "", "192.0.2.2", []),
        (["", ""], "disabled", "192.0.2.2", []),
        (["", ""], "", "127.0.0.2", []),
    ],
)
def test_a_run_on_an_open_cluster_is_refused(
    modes: list[str], here: str, address: str, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its workers start, once for all hosts; where nobody else reaches it, or it was asked for, it runs."""
    names = {"a": address if address.startswith("127.") else A.address, "b": address}
    nodes = [replace(A, name=n, address=names[n], auth_mode=m) for n, m in zip(names, modes, strict=True)]

    def look(self: Ward, folder: Path | None, deep: bool) -> dict[str, str]:
        self._nodes = nodes
        return VERSIONS

    monkeypatch.setattr(Ward, "_look", look)
    monkeypatch.setattr("anabranch.cluster.ward._addresses", dict)
    monkeypatch.setattr("anabranch.cluster.doctor.hosts", tuple)
    monkeypatch.setenv("RAY_AUTH_MODE", here)
    if not refused:
        preflight([], None)
        return
    with pytest.raises(ClusterError) as raised:
        preflight([], None)
    _, *lines = str(raised.value).splitlines()
    assert [line.partition(": Ray takes commands from anyone")[0] for line in lines] == refused
    assert str(raised.value).count("RAY_AUTH_MODE=disabled, there or for this command") == 1


@pytest.mark.parametrize("num", [0, 1, 2, 5, 8])
def test_every_pair_of_hosts_meets_once(num: int) -> None:
    games = rounds(range(num))
    assert sorted(tuple(sorted(pair)) for game in games for pair in game) == list(combinations(range(num), 2))
    assert all(len({p for pair in game for p in pair}) == 2 * len(game) for game in games)
    assert len(games) <= max(0, num if num % 2 else num - 1)


def test_address_that_is_not_reached_and_a_port_in_use() -> None:
    probe = NodeProbe()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert probe.reach("127.0.0.1", port, 1.0) == ""
        assert probe.listen(port) is None
    assert "refused" in probe.reach("127.0.0.1", port, 1.0)
    assert probe.listen(0)


def test_address_of_nothing() -> None:
    call = parse(["doctor", "--address", "localhost:1", "--json", "--quiet"])
    assert call is not None
    begun = time.monotonic()
    result, exit_code = run(call)
    assert time.monotonic() - begun < NAMED_S
    assert exit_code == 1
    assert result is not None
    (check,) = result["checks"]
    assert "no Ray cluster answers at localhost:1" in check["found"]
    assert "ray start --head" in check["remedy"]


# A process in which everything is wrong that needs no second node; what it tells, as JSON.
NODE = """
import json, os, sys
from anabranch.cluster.node_probe import NodeProbe
probe, (port, closed) = NodeProbe(), map(int, sys.argv[1:])
print(json.dumps(probe.look("/proc/none", deep=False) | {
    "now": probe.clock(),
    "interface": probe.interface("192.0.2.9"),
    "listen": probe.listen(port),
    "reach_error": probe.reach("127.0.0.1", closed, 1.0),
    "write": [probe.write(folder, "b", "") for folder in ("/proc", "/not/there")],
}))
"""


def test_faults_of_a_process_are_named(tmp_path: Path) -> None:
    """Eleven planted for real, seen by the code that runs on a node, named by the doctor's checks."""
    _plant_packages(tmp_path, torch="0.0.1", ray="0.0.2")
    with socket.create_server(("", 0)) as taken, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ports = [str(each.getsockname()[1]) for each in (taken, closed)]
        environ = {key: value for key, value in os.environ.items() if key != "RAY_AUTH_MODE"}
        paths = os.pathsep.join([str(tmp_path), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", NODE, *ports],
            env={**environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "ib7"},
            capture_output=True,
            text=True,
            timeout=280,
            check=True,
        )
    told = json.loads(done.stdout.splitlines()[-1])
    bad = NodeReport(
        "b",
        "192.0.2.9",
        versions=told["versions"],
        missing_interfaces=told["missing_interfaces"],
        auth_mode=told["auth_mode"],
        free_bytes=told["free_bytes"],
        skew_s=told["now"] - time.time(),
        reach_error=told["reach_error"],
    )
    driver = NodeProbe().look("/", deep=False)["versions"]
    found = [
        *checks.check_versions(driver, [bad]),
        *checks.check_interfaces([A, bad]),
        *checks.check_interfaces([A, replace(bad, missing_interfaces=(), interface=told["interface"])]),
        *checks.check_port(bad, int(ports[0]), told["listen"]),
        *checks.check_reach(A, [A, bad]),
        *checks.check_clocks([bad]),
        *(c for error in told["write"] for c in checks.check_folder("/r", "", [replace(bad, folder_error=error)])),
        *checks.check_disk("/r", [bad]),
        *checks.check_token([bad]),
    ]  # fmt: skip
    said = "\n".join(check.found for check in found if not check.ok and check.remedy)
    for text in (
        "torch 0.0.1, the driver has", "ray 0.0.2, the driver has", "names ib7, not there",
        "no interface owns Ray's address 192.0.2.9", f"{ports[0]} is in use", "Connection refused", "s ahead of",
        "/r: ", "/r is not shared", "0.0 GiB free at /r: the disk is full", "from anyone who reaches 192.0.2.9",
    ):  # fmt: skip
        assert text in said, (text, said)


def _plant_packages(site: Path, **versions: str) -> None:
    """Packages of other versions, and a clock that is an hour fast, for a process with `site` in its path."""
    for name, version in versions.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (site / "sitecustomize.py").write_text(
        "import time\n_now = time.time\ntime.time = lambda: _now() + 3600\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# A second node with everything wrong that one can have, in a file system of its own where this user may make one.

OWN_MOUNTS = may_mount()
MOUNTS = """
mount --make-rprivate /
mount -t tmpfs none "$0/not_shared"
mount --bind "$0/read_only" "$0/read_only"
mount -o remount,bind,ro "$0/read_only"
exec "$@"
"""


@pytest.fixture(scope="module")
def bad_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster of a good node and a bad one; a folder with `not_shared` and `read_only` (there), and `full`."""
    folder = tmp_path_factory.mktemp("hosts")
    for name in ("not_shared", "read_only", "full"):
        (folder / name).mkdir()
    site = folder / "site"
    _plant_packages(site, torch="0.0.1")
    with tempfile.TemporaryDirectory(prefix="ab") as temp, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", temp)
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("HOME", temp)  # no token of the user's
        Path(temp, "ray").mkdir()
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,
                "temp_dir": str(Path(temp, "ray")),
            },
        )
        start = [
            str(Path(sys.executable).with_name("ray")), "start", "--address", cluster.address, "--block",
            "--num-cpus", "1", "--num-gpus", "1", "--object-store-memory", str(80 * 2**20),
        ]  # fmt: skip
        if OWN_MOUNTS:
            start = ["unshare", "--mount", "sh", "-ec", MOUNTS, str(folder), *start]
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder / "full"], check=True)
        node = subprocess.Popen(
            start,
            env={**os.environ, "PYTHONPATH": str(site), "GLOO_SOCKET_IFNAME": "ib7"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with connect(cluster.address):
                deadline = time.monotonic() + 120
                while len(hosts()) < 2:
                    assert node.poll() is None, "the node ended"
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
                yield folder
        finally:
            os.killpg(node.pid, signal.SIGTERM)
            node.wait()
            cluster.shutdown()  # type: ignore[no-untyped-call]
            if OWN_MOUNTS:
                subprocess.run(["umount", folder / "full"], check=True)


def doctored(*flags: str) -> dict[tuple[str, str], str]:
    """What `anabranch doctor` says of the failed checks, by name and host; it does so in time, with exit code 1."""
    call = parse(["doctor", *flags, "--json", "--quiet"])
    assert call is not None
    begun = time.monotonic()
    result, exit_code = run(call)
    seconds = time.monotonic() - begun
    assert exit_code == 1
    assert result is not None
    failed: dict[tuple[str, str], str] = {}
    for check in result["checks"]:
        if not check["ok"]:
            assert check["remedy"], check
            key = check["name"], check["host"]
            failed[key] = f"{failed[key]}\n{check['found']}" if key in failed else check["found"]
    print(f"{seconds:.1f} s: {', '.join(name for name, _ in failed)}")
    assert seconds < NAMED_S, "or it would be named too late"
    return failed


@pytest.mark.slow
@pytest.mark.optin  # Ray keeps the first token of a process: a cluster without one must not share it with other tests
def test_faults_of_a_node_are_named(bad_node: Path) -> None:
    good, bad = sorted(hosts(), key=lambda host: host.gpus)
    with socket.create_server(("", 0)) as taken:
        failed = doctored(
            "--run-dir", str(bad_node / "not_shared" / "run"), "--launch.port", str(taken.getsockname()[1]),
            "--num-workers", "9", "--launch.cpus-per-worker", "1",
        )  # fmt: skip
    wanted = {
        ("room", ""): "room for",
        ("versions", bad.name): "torch 0.0.1, the driver has",
        ("GPUs", bad.name): "Ray offers 1 GPUs, torch sees 0",
        ("interface", bad.name): "names ib7",
        ("port", bad.name): "is in use",
        ("clock", bad.name): "s ahead of the driver's",
        ("token", good.name): "anyone who reaches",
    }
    for key, text in wanted.items():
        assert text in failed.get(key, ""), (key, failed)
    assert "no anabranch, the driver has" in failed["versions", bad.name]
    assert any(name == "all-reduce" and bad.name in pair for name, pair in failed), failed
    assert not [key for key in failed if key[1] == good.name and key[0] != "token"]
    if OWN_MOUNTS:
        assert "is not shared with this host" in failed["run folder", bad.name]


@pytest.mark.slow
@pytest.mark.skipif(not OWN_MOUNTS, reason="needs root for a mount namespace")
@pytest.mark.optin
def test_folders_of_a_node_are_named(bad_node: Path) -> None:
    """And `train` refuses before workers start."""
    bad = max(hosts(), key=lambda host: host.gpus)
    names = [host.name for host in hosts()]
    wanted = r"no anabranch(.|\n)*anyone who reaches(.|\n)*Read-only file system – mount it for writing"
    with pytest.raises(ClusterError, match=wanted):
        preflight(names, bad_node / "read_only")
    failed = doctored("--run-dir", str(bad_node / "read_only"), "--launch.cpus-per-worker", "1")
    assert "Read-only file system" in failed["run folder", bad.name]
    failed = doctored("--run-dir", str(bad_node / "full"), "--launch.cpus-per-worker", "1")
    assert "the disk is full" in "\n".join(failed["disk", host] for host in names if ("disk", host) in failed)

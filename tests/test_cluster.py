"""Placement, the root cause, and real runs on Ray: two nodes of faked GPUs, and a private cluster that is stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from resource import getpagesize
from typing import Any

import pytest

from anabranch.cluster import (
    ClusterError,
    RayRequest,
    Recovery,
    Stop,
    StoppedError,
    WorkerContext,
    WorkerError,
    connect,
    discover,
    ray_calls,
    run_on_ray,
)
from anabranch.cluster.actors import ORPHANED_S, Worker
from anabranch.cluster.environment import hold_port, interface_of, thread_share
from anabranch.cluster.failures import Failure, worker_error
from anabranch.cluster.placement import Host, devices_of, place, place_more, place_spares
from anabranch.cluster.ray_session import _without_gone, gpu_kind, hosts
from anabranch.runtime.cli import parse, run

A = Host("a", "1", 8, 8, 4, 4, "H200")
B = Host("b", "2", 8, 8, 2, 2, "H200")
C = Host("c", "3", 4, 4)


def seated(*args: Any, **kwargs: Any) -> list[str]:
    """Each rank's host, with its GPU where the plan names one."""
    seats = place(*args, **kwargs)
    assert [seat.rank for seat in seats] == list(range(len(seats)))
    return [seat.host.name + ("" if seat.gpu is None else str(seat.gpu)) for seat in seats]


@pytest.mark.parametrize(
    ("mesh", "use_gpu", "cpus", "expected"),
    [
        ((1, 2), True, 1, "bb"),  # the smallest host that holds the branch group
        ((2, 2), True, 1, "bbaa"),
        ((3, 2), True, 1, "bbaaaa"),
        ((4, 1), True, 1, "baba"),  # replicas spread, though b has room for two at once
        ((3, 2), False, 1, "ccaabb"),
        ((5, 2), False, 1, "ccaabbccaa"),
        ((2, 3), True, 1, "aaabba"),  # the second group fits no host
        ((1, 4), False, 1, "cccc"),
        ((1, 8), False, 0.5, "cccccccc"),
        ((2, 2), False, 4, "aabb"),
        ((1, 2), True, 4, "aa"),  # b has the GPUs, but CPUs for two as well: fewest first, ties by order
    ],
)
def test_branch_groups_are_packed(mesh: tuple[int, int], use_gpu: bool, cpus: float, expected: str) -> None:
    assert seated((A, B, C), mesh, use_gpu=use_gpu, cpus_per_worker=cpus) == list(expected)


@pytest.mark.parametrize(
    ("idle", "most", "branch", "use_gpu", "expected"),
    [
        ("", 1, 2, True, "bb"),
        ("", 9, 4, True, "aaaa"),
        ("bb", 9, 4, True, "aaaabbbb"),  # what the run holds there already counts
        ("", 2, 8, False, "aaaaaaaabbbbbbbb"),
        ("", 9, 7, True, ""),  # no whole branch group
        ("z" * 9, 9, 7, True, ""),  # held on a host that is gone
    ],
)
def test_room_for_more_branch_groups(idle: str, most: int, branch: int, use_gpu: bool, expected: str) -> None:
    node = {"a": "1", "b": "2", "z": "9"}
    found = place_more((A, B), [node[name] for name in idle], branch, most, use_gpu, 1.0)
    assert [host.name for host in found] == list(expected)


def test_a_node_that_began_again_is_one() -> None:
    """Ray may take half a minute to miss the one that was killed at the same address."""
    with socket.create_server(("127.0.0.1", 0)) as begun, socket.create_server(("127.0.0.1", 0)) as killed:
        ports = {"begun": begun.getsockname()[1], "killed": killed.getsockname()[1]}
        killed.close()
        nodes = [
            {"NodeID": name, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in ports.items()
        ]
        other = {"NodeID": "other", "NodeManagerAddress": "198.51.100.1", "NodeManagerPort": 1}  # not asked
        assert [node["NodeID"] for node in _without_gone([*nodes, other])] == ["begun", "other"]
    assert len(_without_gone(nodes)) == 1, "of a host that is cut off, which then is told"


@pytest.mark.parametrize(
    ("resources", "labels", "kind"),
    [
        ({"GPU": 4.0, "accelerator_type:H100": 1.0}, {}, "H100"),
        ({"GPU": 4.0}, {"ray.io/accelerator-type": "H200", "ray.io/node-id": "1"}, "H200"),
        ({"accelerator_type:H100": 1.0}, {"ray.io/accelerator-type": "H100-SXM"}, "H100-SXM"),  # said by name
        ({"GPU": 4.0}, {"ray.io/accelerator-type": ""}, "gpu"),
        ({"CPU": 4.0}, {"region": "north"}, "gpu"),
    ],
)
def test_kind_of_a_nodes_gpus(resources: dict[str, float], labels: dict[str, str], kind: str) -> None:
    assert gpu_kind({"Resources": resources, "Labels": labels}) == kind
    if not labels:
        assert gpu_kind({"Resources": resources}) == kind, "a Ray without labels"


def test_planned_devices_are_taken_exactly() -> None:
    devices = (("b:1", "a:3"), ("a:0", "b:0"))
    assert seated((A, B), (2, 2), use_gpu=True, devices=devices) == ["b1", "a3", "a0", "b0"]
    seats = place((A, B), (2, 2), use_gpu=True, devices=devices)
    assert seated((A, B), (2, 2), use_gpu=True, devices=devices, any_gpu=True) == ["b", "a", "a", "b"]
    assert [seat.local_rank for seat in seats] == [0, 0, 1, 1]
    assert {seat.num_threads for seat in seats} == {4}


@pytest.mark.parametrize(
    ("mesh", "options", "message"),
    [
        (
            (4, 2),
            {"use_gpu": True},
            r"8 workers with a bundle of 1 CPUs and 1 GPU each .* room for 6: ask for [^\n]*\n"
            r"  host  CPUs  free  GPUs  free  kind\n  a     8     8     4     4     H200\n"
            r"  b     8     8     2     2     H200\n"
            r"  c     4     4     0     0     –$",
        ),
        ((3, 7), {}, r"21 workers with a bundle of 1 CPUs each .* room for 20: ask for fewer workers"),
        ((1, 2), {"cpus_per_worker": 1.5}, "cpus_per_worker is 1.5, .* make it 1 or 2"),
        ((1, 2), {"use_gpu": True, "devices": (("a:0",),)}, r"rows of \[1\] devices, the mesh is 1x2"),
        (
            (1, 2),
            {"use_gpu": True, "devices": (("a:0", "z:0"),)},
            "names z:0, the cluster's hosts are a, b, c",
        ),
        ((1, 2), {"use_gpu": True, "devices": (("a:0", "b:2"),)}, "names b:2, b has 2 GPUs"),
        ((1, 2), {"use_gpu": True, "devices": (("a:x", "b:1"),)}, "names a:x, a has 4 GPUs"),
        ((1, 2), {"use_gpu": True, "devices": (("a:0", "a:0"),)}, "names a:0 2 times"),
        ((1, 1), {"devices": (("c:4",),)}, "names c:4, c has 4 places of 1 CPUs"),
    ],
)
def test_what_does_not_fit_is_refused(mesh: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        place((A, B, C), mesh, **{"use_gpu": False, **options})


def test_other_jobs_are_named() -> None:
    busy = Host("a", "1", 8, 8, 4, 1)
    with pytest.raises(ClusterError, match="room for 4, 1 of them free"):
        place((busy,), (1, 2), use_gpu=True)
    with pytest.raises(ClusterError, match="2 workers on a, which has room for 1 more"):
        place((busy, B), (1, 2), use_gpu=True, devices=(("a:0", "a:1"),))


def test_no_host_is_left_for_one_more() -> None:
    with pytest.raises(ClusterError, match="the cluster has room for 0"):
        place_spares((), (), 1, False, 1.0)


def test_free_devices() -> None:
    assert devices_of((A, C)).names == ["a:0", "a:1", "a:2", "a:3"]
    assert devices_of((A,)).devices[0].kind == "H200"
    assert devices_of((C,), 0.5).names == [f"c:{index}" for index in range(8)]
    assert devices_of((Host("c", "3", 4, 3.5),), 1).names == ["c:0", "c:1", "c:2"]


def test_root_cause_is_not_the_lost_connection() -> None:
    import torch.distributed as dist

    def failure(rank: int, error: Exception) -> Failure:
        return Failure.of(rank, "a", error)

    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [192.0.2.1]:1024")
    wrapped = RuntimeError("the step's vote failed")
    wrapped.__cause__ = dist.DistNetworkError("timed out")
    error = worker_error([failure(0, lost), failure(2, wrapped), failure(1, ValueError("boom"))])
    assert str(error).startswith("rank 1 on host a failed:")
    assert isinstance(error.__cause__, ValueError)
    assert sorted(error.worker_failures) == [0, 1, 2]
    assert "rank 0" in str(worker_error([failure(0, lost), failure(2, wrapped)]))


def test_environment() -> None:
    assert [thread_share(8, ranks) for ranks in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
    with socket.create_server(("", 0)) as taken:
        assert hold_port(taken.getsockname()[1]) is None


FAULTS = """
import ctypes, sys, threading
from resource import RUSAGE_SELF, getrusage
from anabranch.cluster.environment import keep_freed_memory
PR_SET_THP_DISABLE = 41  # a huge page is one fault
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
def fill():
    for megabytes in (20, 3, 40):
        bytearray(megabytes * 2**20).find(1)  # writes nothing: the system clears each page that is new
def steps():
    fill()
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(5):
        fill()
    print(getrusage(RUSAGE_SELF).ru_minflt - before)
if sys.argv[1] == "keep":
    keep_freed_memory()
thread = threading.Thread(target=steps)  # as in an actor: not in the process's first thread
thread.start()
thread.join()
"""


def test_freed_memory_is_kept() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "")
    )
    pages = 5 * 63 * 2**20 // getpagesize()
    assert kept < 0.01 * pages
    assert given_back > 0.1 * pages, "or this test shows nothing"


def test_no_cluster_at_the_address() -> None:
    with pytest.raises(ClusterError, match="no Ray cluster answers at localhost:1 "), connect("localhost:1"):
        pass
    with pytest.raises(ClusterError, match="Ray Client"), connect("ray://head:10001"):
        pass


def test_later_generations_meet_at_the_port_that_was_asked_for() -> None:
    """Where it is free again; else anywhere, and who is late for an older generation has another name for it."""
    with socket.socket() as held:
        held.bind(("", 0))
        port = held.getsockname()[1]
    worker = Worker({})
    assert worker.meeting_point(port).endswith(f":{port}")
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        busy = listening.getsockname()[1]
        assert not worker.meeting_point(busy).endswith(f":{busy}")
    assert worker._held is not None
    worker._held.close()


def test_only_a_rank_that_runs_and_is_not_asked_is_an_orphan(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped for an hour, its controller with it, goes on; a minute without a question later it ends."""

    class Clock:
        now = slept = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.slept += seconds
            self.now += 3600.0 if self.slept == 120.0 else seconds
            if self.slept % 50.0 == 0 and self.slept <= 200.0:
                worker.status()

    def end(code: int) -> None:
        raise SystemExit(code)

    clock = Clock()
    monkeypatch.setattr("anabranch.cluster.actors.time", clock)
    monkeypatch.setattr(os, "_exit", end)
    worker = Worker({})
    with pytest.raises(SystemExit):
        worker._end_orphaned()
    assert 200 + ORPHANED_S <= clock.slept <= 201 + ORPHANED_S


# ---------------------------------------------------------------------------------------------------------------------
# Real Ray: two nodes on this machine, with 4 CPUs and 4 and 2 faked GPUs.


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ab") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # where Ray's test cluster notes its address
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.delenv(
            "CUDA_VISIBLE_DEVICES", raising=False
        )  # Ray offers no more GPUs than it lists, faked ones too
        temp_dir = Path(folder, "ray")
        temp_dir.mkdir()
        from ray.cluster_utils import Cluster

        node: dict[str, Any] = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                **node,
                "num_gpus": 4,
                "resources": {"accelerator_type:H100": 1},
                "temp_dir": str(temp_dir),
            },
        )
        try:
            cluster.add_node(**node, num_gpus=2, resources={"accelerator_type:A100": 1})
            with connect(cluster.address):
                yield
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def ray_hosts(ray_cluster: None) -> tuple[Host, ...]:
    """The nodes, once what an earlier test held is free again: the one with 4 GPUs, the one with 2."""
    wait_for(lambda: all((host.free_cpus, host.free_gpus) == (host.cpus, host.gpus) for host in hosts()))
    return hosts()


def reduce(context: WorkerContext) -> dict[str, Any]:
    """A worker that joins the process group as the runtime's does, and says what it was given."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        context.backend, init_method=context.init_method, rank=context.rank, world_size=context.world_size
    )
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {
        "host": context.host,
        "local_rank": context.local_rank,
        "total": total.item(),
        "threads": (context.num_threads, os.environ["OMP_NUM_THREADS"]),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
    }


def step(num_steps: int, context: WorkerContext) -> dict[str, Any]:
    """A worker that only counts its steps, and the calls to Ray that its process made in them."""
    before, begun = ray_calls.total(), time.monotonic()
    for number in range(num_steps):
        context.publish(phase="train", step=number)
        time.sleep(0.15)
    return {"ray_calls": ray_calls.total() - before, "seconds": time.monotonic() - begun}


def look(context: WorkerContext) -> dict[str, Any]:
    """A worker that only says where it is."""
    return {"host": context.host, "device": context.device, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}


def look_beside_a_spare(folder: Path, context: WorkerContext) -> dict[str, Any]:
    """`look`, once two ranks and a spare have told of their GPUs there."""
    (folder / str(context.rank)).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    wait_for(lambda: len(list(folder.iterdir())) == 3)
    return look(context)


def no_watch(statuses: list[dict[str, Any]]) -> None:
    """See nothing."""


def wait_for(true: Callable[[], bool]) -> None:
    """Ray does such things a little later."""
    deadline = time.monotonic() + 280
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_hosts_are_told_apart(ray_hosts: tuple[Host, ...]) -> None:
    assert [(host.cpus, host.gpus, host.free_gpus) for host in ray_hosts] == [(4, 4, 4), (4, 2, 2)]
    assert len(set(discover().names)) == 6
    assert [device.kind for device in discover().devices] == ["H100"] * 4 + ["A100"] * 2
    assert all(host.name.startswith(socket.gethostname()) for host in ray_hosts)


def test_ranks_on_two_nodes_reduce(ray_hosts: tuple[Host, ...]) -> None:
    big, small = (host.name for host in ray_hosts)
    found = run_on_ray(reduce, RayRequest((2, 1), devices=((f"{small}:1",), (f"{big}:0",))), no_watch)
    assert [place["host"] for place in found] == [small, big]
    assert all(place["total"] == 2.0 and place["threads"] == (4, "4") for place in found)
    assert all(place["local_rank"] == 0 and place["interface"] for place in found)


def test_ray_is_outside_the_step(ray_hosts: tuple[Host, ...]) -> None:
    """Twice the steps make no more calls, but for the watch's: one a worker and second, and waiting for them."""
    calls = []
    for num_steps in (10, 20):
        seen: list[list[dict[str, Any]]] = []
        ray_calls.clear()
        results = run_on_ray(partial(step, num_steps), RayRequest((2, 1)), seen.append)
        calls.append(dict(ray_calls))
        assert [result["ray_calls"] for result in results] == [0, 0]
        assert ray_calls["watch_status"] <= 2 * len(seen)
        assert [(status["rank"], status["step"]) for status in seen[-1]] == [
            (rank, num_steps - 1) for rank in range(2)
        ]
        assert len({status["pid"] for status in seen[-1]}) == 2
    most = 2 + max(result["seconds"] for result in results)
    stepping = [statuses for statuses in seen if all("step" in status for status in statuses)]
    assert 2 <= len(stepping) <= most, "3 s of steps are watched about once a second, and at the end"
    assert all(status["seen_s"] < most for status in seen[-1])
    once, twice = ({k: v for k, v in made.items() if not k.startswith("watch")} for made in calls)
    for made in (once, twice):
        del made["start_wait"]  # how long the actors take is not the steps' doing
    assert once == twice
    assert once["run"] == once["result"] == 2


def test_ranks_get_the_planned_gpus(ray_hosts: tuple[Host, ...], tmp_path: Path) -> None:
    """Also those that Ray would not have given first; without a plan, each its own."""
    import ray

    big, small = (host.name for host in ray_hosts)
    planned = ((f"{big}:3", f"{big}:1"),)
    request = RayRequest((1, 2), use_gpu=True, backend="gloo", devices=planned, timeout_s=20)
    recovery = Recovery(lambda _: {}, lambda _: False, lambda _: None, spares=1)
    found = run_on_ray(partial(look_beside_a_spare, tmp_path), request, no_watch, recovery)
    assert (tmp_path / "-1").read_text() in ("0", "2"), "a spare has one of those that are left"
    assert found == [{"host": big, "device": "cuda:0", "gpu": gpu} for gpu in ("3", "1")]
    found = run_on_ray(look, RayRequest((1, 2), use_gpu=True, backend="gloo"), no_watch)
    assert [place["host"] for place in found] == [small] * 2
    assert sorted(place["gpu"] for place in found) == ["0", "1"]

    # Another job holds one: those that Ray gives are taken, those that the plan names are not taken from under it.
    @ray.remote(num_gpus=1, num_cpus=0, label_selector={"ray.io/node-id": ray_hosts[0].node_id})
    class Holder:
        def gpu(self) -> str:
            return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])

    holder: Any = Holder.remote()  # type: ignore[attr-defined]
    devices = ((f"{big}:{ray.get(holder.gpu.remote())}",),)
    wait_for(lambda: hosts()[0].free_gpus == 3)
    with pytest.raises(
        ClusterError, match=f"GPUs of {big} that Ray did not give: other jobs hold 1 of its 4"
    ):
        run_on_ray(look, RayRequest((1, 1), use_gpu=True, backend="gloo", devices=devices), no_watch)
    filled_in = RayRequest((1, 1), use_gpu=True, backend="gloo", devices=devices, any_gpu=True)
    assert [place["host"] for place in run_on_ray(look, filled_in, no_watch)] == [big]
    ray.kill(holder)


def test_refused_before_a_worker_starts(ray_hosts: tuple[Host, ...], tmp_path: Path) -> None:
    def touch(context: WorkerContext) -> dict[str, Any]:
        (tmp_path / str(context.rank)).touch()
        return {}

    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            (
                RayRequest((1, 9)),
                "9 workers with a bundle of 1 CPUs each were asked for, the cluster has room for 8",
            ),
            (
                RayRequest((1, 7), use_gpu=True),
                r"7 workers with a bundle of 1 CPUs and 1 GPU each were asked for, the cluster has room for 6: ask for "
                r"[^\n]*\n  host.*\n.* 4     4     4     4     H100\n.* 4     4     2     2     A100$",
            ),
            (RayRequest((1, 2), port=port), f"port {port} is in use on {ray_hosts[0].name}"),
            (RayRequest((1, 2), backend="nccl"), "nccl, which needs CUDA GPUs"),
        ]
        for request, message in cases:
            with pytest.raises(ClusterError, match=message):
                run_on_ray(touch, request, no_watch)
    assert not list(tmp_path.iterdir())


def test_the_doctor_names_what_is_wrong_and_nothing_else(ray_hosts: tuple[Host, ...], tmp_path: Path) -> None:
    """As a user runs it: two hosts that are well, but for GPUs that Ray offers and nobody has, and a port in use."""
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        call = parse(["doctor", "--run-dir", str(tmp_path / "run"), "--launch.port", port, "--quiet"])
        assert call is not None
        result, exit_code = run(call)
        if "no answer" in str(result):  # a node on a busy machine: once more
            result, exit_code = run(call)
    assert exit_code == 1
    assert result is not None
    big, small = (host.name for host in ray_hosts)
    # whether Ray asks for its token depends on what this process did before
    told = {(each["name"], each["host"]): each for each in result["checks"] if each["name"] != "token"}
    failed = {key: check["found"] for key, check in told.items() if not check["ok"]}
    assert failed.keys() == {("GPUs", big), ("GPUs", small), ("port", big)}, failed
    assert failed["GPUs", big].startswith("Ray offers 4 GPUs, torch sees ")
    assert failed["port", big] == f"launch.port {port} is in use on {big}"
    assert all(check["remedy"] for check in told.values() if not check["ok"])
    everywhere = ("answers", "versions", "interface", "clock", "disk", "run folder")
    passed = {(name, host) for name in everywhere for host in (big, small)}
    passed |= {("cluster", ""), ("room", ""), ("route", small), ("all-reduce", "")}
    assert told.keys() - failed.keys() == passed
    assert not list(tmp_path.iterdir()), "it leaves nothing"


def failing(how: str, context: WorkerContext) -> dict[str, Any]:
    """Rank 1 ends in some way while the others wait for it in a collective."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=context.init_method, rank=context.rank, world_size=context.world_size
    )
    context.publish(phase="waiting")
    if context.rank == 1:
        time.sleep(1.2)
        if how == "raise":
            dist.destroy_process_group()  # the other fails first
            time.sleep(1.5)
            raise ValueError("boom")
        print("something on the way down", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    return {}


@pytest.mark.parametrize(
    ("how", "cause", "text"),
    [
        ("raise", ValueError, r"in failing\n(.|\n)*ValueError: boom$"),
        ("kill", type(None), r"process died(.|\n)*something on the way down$"),
    ],
)
def test_the_cause_is_named_once(
    ray_hosts: tuple[Host, ...], how: str, cause: type[BaseException], text: str
) -> None:
    seen: list[list[dict[str, Any]]] = []
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=text) as caught:
        run_on_ray(partial(failing, how), RayRequest((1, 2)), seen.append)
    assert time.monotonic() - begin < 240, "or a collective's timeout was waited for"
    assert str(caught.value).startswith(f"rank 1 on host {ray_hosts[0].name} failed:")
    assert "peer" not in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


def stopped_while_loading(context: WorkerContext) -> dict[str, Any]:
    """Rank 1 is stopped before it has told of a step; the others quiesce, as all do where a rank is lost."""
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    while context.generation == 0 and not context.aborted:
        time.sleep(0.02)
    context.await_order(committed=None)
    return {"rank": context.rank, "generation": context.generation}


def test_a_rank_stopped_before_its_first_step_is_replaced(
    ray_hosts: tuple[Host, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anabranch.cluster.supervisor.WATCH_S", 0.2)
    monkeypatch.setattr("anabranch.cluster.supervisor.LOST_LOADING_S", 4.0)
    told: list[dict[str, Any]] = []
    recovery = Recovery(
        decide=lambda states: {"action": "rewind", "step": 0, "ranks": [0, 1]},
        retries=lambda failure: False,
        told=told.append,
        max_failures=9,  # on a busy machine the other may be silent for as long
    )
    found = run_on_ray(stopped_while_loading, RayRequest((2, 1)), no_watch, recovery)
    assert found == [{"rank": rank, "generation": found[0]["generation"]} for rank in range(2)]
    assert found[0]["generation"] >= 1
    assert 1 in {event["rank"] for event in told}
    assert all(event["replaced"] and event["cause"].startswith("no answer for") for event in told)


def until_told(listens: bool, context: WorkerContext) -> dict[str, Any]:
    """A worker that runs until it is told to stop, or on and on."""
    context.publish(step=1)
    while not (listens and context.stop_requested):
        time.sleep(0.01)
    return {"reason": context.stop_requested}


def test_the_watch_can_stop_a_run(ray_hosts: tuple[Host, ...]) -> None:
    stop = Stop()
    results = run_on_ray(partial(until_told, True), RayRequest((1, 2)), lambda statuses: "enough", stop=stop)
    assert stop.reason == "enough"
    assert results == [{"reason": "enough"}] * 2


def test_who_does_not_stop_is_killed(ray_hosts: tuple[Host, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def terminate(statuses: list[dict[str, Any]]) -> None:
        if not pids and all("step" in status for status in statuses):
            pids.extend(status["pid"] for status in statuses)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("anabranch.cluster.supervisor.STOP_S", 1.0)
    with pytest.raises(StoppedError, match="rank 0, 1 did not end within 1 s and was killed") as caught:
        run_on_ray(partial(until_told, False), RayRequest((1, 2)), terminate)
    assert caught.value.reason == "terminate"
    assert len(pids) == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


# ---------------------------------------------------------------------------------------------------------------------
# A private cluster, in a program of its own that is stopped.

PROGRAM = """
import time
from anabranch.cluster import RayRequest, run_on_ray

def target(context):
    context.publish(step=1)
    while not context.stop_requested:
        time.sleep(0.02)
    return {"saved": context.stop_requested}

def watch(statuses):
    if all("step" in status for status in statuses):
        print("running", flush=True)

print(run_on_ray(target, RayRequest((1, 2), cpus_per_worker=0.5), watch), flush=True)
"""


def marked(mark: str) -> list[int]:
    """Processes that inherited a mark in their environment, dead ones aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it ended meanwhile
                continue
    return found


def test_an_interrupted_program_leaves_nothing() -> None:
    """Ctrl-C reaches the terminal's whole process group, so Ray's processes too."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ANABRANCH_TEST_MARK": mark},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        begin = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=280)
        while marked(mark) and time.monotonic() - begin < 60:
            time.sleep(0.05)
        left = marked(mark)
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0, err
    assert out.strip().split("\n")[-1] == "[{'saved': 'interrupt'}, {'saved': 'interrupt'}]"
    assert err == ""
    assert not left

"""Which launcher is chosen, and the same worker alone, under torchrun and under srun's environment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from anabranch.cluster.environment import hold_port
from anabranch.cluster.errors import ClusterError, WorkerError
from anabranch.cluster.worker_context import WorkerContext
from anabranch.runtime.launch import alone, choose_launcher, from_environment, run_here

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}

# Under any launcher: meet the others, add the ranks, tell what this rank was given.
WORKER = """
import json, os, sys
from pathlib import Path
from anabranch.runtime.launch import choose_launcher, run_here

def target(context):
    import torch
    import torch.distributed as dist
    torch.set_num_threads(context.num_threads)
    dist.init_process_group(context.backend, init_method=context.init_method,
                            rank=context.rank, world_size=context.world_size)
    total = torch.tensor([float(context.rank)])
    dist.all_reduce(total)
    if "raise" in sys.argv:
        if context.rank == 1:
            raise ValueError("boom")
        dist.all_reduce(total)
    dist.destroy_process_group()
    return {"rank": context.rank, "total": total.item(), "threads": context.num_threads,
            "local_rank": context.local_rank, "interface": os.environ["GLOO_SOCKET_IFNAME"]}

assert choose_launcher() == "env"
result = run_here(target, lambda statuses: None, "env")
Path(sys.argv[1], str(result["rank"])).write_text(json.dumps(result))
"""


def start(script: str, *args: str, **environ: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD", "MASTER"))}
    return subprocess.Popen(
        [sys.executable, *(args if args[:1] == ("-m",) else ("-c", script, *args))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, **environ},
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("asked", "environ", "chosen"),
    [
        ("", {}, "ray"),
        ("", TORCHRUN, "env"),
        ("", {"RANK": "0"}, "ray"),  # half of torchrun's: something else set it
        ("", SRUN, "env"),
        ("", {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, "ray"),
        ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "ray"),  # a line of a batch script, without srun
        ("none", TORCHRUN, "none"),
        ("ray", TORCHRUN, "ray"),
        ("env", SRUN, "env"),
    ],
)
def test_choice(asked: str, environ: dict[str, str], chosen: str) -> None:
    assert choose_launcher(asked, environ) == chosen


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ClusterError, match="neither torchrun"):
        choose_launcher("env", {})
    with pytest.raises(ClusterError, match='"mpi": make it ray'):
        choose_launcher("mpi", {})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, WORLD_SIZE is 2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "nccl, which needs CUDA"),
    ],
)
def test_wrong_environment_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        from_environment("nccl", environ=environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("node[07-09,12],other", "node07"),
        ("rack[1,3]-n[010-011]-ib", "rack1-n010-ib"),
    ],
)
def test_slurm_environment(nodes: str, first: str) -> None:
    environ = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "SLURM_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "123456",
        "SLURM_CPUS_PER_TASK": "3",
    }
    context = from_environment(environ=environ)
    assert (context.rank, context.world_size, context.local_rank) == (3, 4, 1)
    assert (context.num_threads, environ["OMP_NUM_THREADS"]) == (3, "3")
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == (first, "23456")
    assert context.init_method == "env://"


def test_port_in_use_is_refused() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        environ = {**TORCHRUN, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        with pytest.raises(ClusterError, match=f"port {port} is in use"):
            from_environment(environ=environ)


def test_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    run = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path),
    )
    process = start("", *run)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    results = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(found["total"] == 1.0 and found["threads"] == share for found in results)
    assert results[1]["local_rank"] == 1


def test_ranks_on_gpus_meet_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has the GPU of its place on its host, as torch counts them; more ranks than GPUs are refused."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29444"}
    context = from_environment(environ={**place, **meeting})
    assert (context.device, context.backend) == ("cuda:1", "nccl")
    assert from_environment("gloo", environ={**place, **meeting}).backend == "gloo"
    assert (alone("", {}).device, alone("", {}).backend) == ("cuda:0", "nccl")
    with pytest.raises(ClusterError, match=r"3 workers on .* need as many GPUs, it has 2"):
        from_environment(environ={**place, **meeting, "LOCAL_WORLD_SIZE": "3"})

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ClusterError, match=r"2 workers on .* need as many GPUs, it has 1"):
        # torchrun within a batch script of Slurm
        from_environment(environ={**place, **meeting, "SLURM_PROCID": "0"})
    shown = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": "2(x2)"}
    assert from_environment(environ={**shown, **meeting}).device == "cuda:0", "srun shows each task its own"


@pytest.mark.parametrize(("on_host", "is_loopback"), [("2", True), ("1", False)])
def test_the_way_to_other_hosts_is_no_loopback(on_host: str, is_loopback: bool) -> None:
    """Where a host's own name leads to 127.0.1.1, as Debian has it."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": on_host}
    environ = {**place, "MASTER_ADDR": "127.0.1.1", "MASTER_PORT": "29444"}
    from_environment("gloo", environ=environ)
    assert (environ.get("GLOO_SOCKET_IFNAME") == "lo") == is_loopback
    assert environ.get("GLOO_SOCKET_IFNAME") == environ.get("NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize("own", ["", "1", "3"])
def test_a_run_of_one_process_takes_all_cores_or_what_the_user_set(own: str) -> None:
    environ = {"OMP_NUM_THREADS": own} if own else {}
    threads = int(own or len(os.sched_getaffinity(0)))
    assert alone("", environ).num_threads == threads
    assert environ["MKL_NUM_THREADS"] == environ["OMP_NUM_THREADS"] == str(threads)


def test_srun_and_the_error_is_said_once() -> None:
    """Two tasks as srun starts them. Rank 1 raises: rank 0 says that it lost a rank, not what gloo said."""
    common = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    held = hold_port()
    assert held is not None
    with held:
        common |= {"SLURM_NODELIST": "localhost", "MASTER_PORT": str(held.getsockname()[1])}
        ranks = [start(WORKER, "raise", SLURM_PROCID=str(rank), **common) for rank in range(2)]
        errors = [process.communicate(timeout=280)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    last = [error.strip().split("WorkerError: ")[-1] for error in errors]
    assert last[0].startswith("rank 0 on host")
    assert "lost another rank" in last[0]
    assert last[1].startswith(f"rank 1 on host {socket.gethostname()} failed:")
    assert last[1].endswith("ValueError: boom")


def test_alone_watch_and_result() -> None:
    seen: list[dict[str, Any]] = []

    def target(context: WorkerContext) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while not context.stop_requested and time.monotonic() < deadline:
            context.publish(step=len(seen))
            time.sleep(0.01)
        context.publish(step=-1)
        return {"reason": context.stop_requested, "world_size": context.world_size}

    def watch(statuses: list[dict[str, Any]]) -> str | None:
        seen.extend(statuses)
        return "asked" if len(seen) == 2 else None

    environ: dict[str, str] = {}
    assert run_here(target, watch, "none", environ=environ) == {"reason": "asked", "world_size": 1}
    assert seen[0]["rank"] == 0
    assert seen[0]["pid"] == os.getpid()
    assert seen[-1]["step"] == -1
    assert environ["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


def test_alone_failures() -> None:
    def target(context: WorkerContext) -> dict[str, Any]:
        raise KeyError("stage9")

    with pytest.raises(
        WorkerError, match=r"rank 0 on host(.|\n)*in target(.|\n)*KeyError: 'stage9'"
    ) as caught:
        run_here(target, lambda statuses: None, "none", environ={})
    assert isinstance(caught.value.__cause__, KeyError)

    def broken(statuses: list[dict[str, Any]]) -> str | None:
        raise OSError("disk full")

    def patient(context: WorkerContext) -> dict[str, Any]:
        while not context.stop_requested:
            time.sleep(0.01)
        return {}

    with pytest.raises(OSError, match="disk full"):
        run_here(patient, broken, "none", environ={})


def press(*presses: tuple[float, signal.Signals]) -> threading.Thread:
    """Send this process signals, each so many seconds after the one before."""

    def send() -> None:
        for pause_s, number in presses:
            time.sleep(pause_s)
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate")])
def test_alone_stops_on_a_signal(number: signal.Signals, reason: str) -> None:
    def target(context: WorkerContext) -> dict[str, Any]:
        pressed = press((0.0, number), (0.0, number))  # one press, delivered twice as torchrun does
        pressed.join()
        deadline = time.monotonic() + 60
        while not context.stop_requested and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"reason": context.stop_requested}

    before = signal.getsignal(number)
    assert run_here(target, lambda statuses: None, "none", environ={}) == {"reason": reason}
    assert signal.getsignal(number) is before


def test_a_second_interrupt_does_not_wait() -> None:
    def stubborn(context: WorkerContext) -> dict[str, Any]:
        press((0.0, signal.SIGINT), (1.2, signal.SIGINT))
        time.sleep(60)
        return {}

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_here(stubborn, lambda statuses: None, "none", environ={})
    assert time.monotonic() - begin < 5

"""Which way the workers are started, and the two ways without Ray: as one of torchrun's or srun's ranks, or alone."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Literal

from anabranch.cluster.environment import hold_port, interface_variables, thread_share, thread_variables
from anabranch.cluster.errors import ClusterError, WorkerError
from anabranch.cluster.failures import Failure, failed_in_collective, worker_error
from anabranch.cluster.stop_signals import stop_signals
from anabranch.cluster.worker_context import WorkerContext

Launcher = Literal["ray", "env", "none"]
Target = Callable[[WorkerContext], dict[str, Any]]
Watch = Callable[[list[dict[str, Any]]], str | None]

WATCH_S = 0.5
_ELSEWHERE = "192.0.2.1"  # nobody's address (RFC 5737): the way there is the way out
_BASE_PORT, _NUM_PORTS = 20_000, 10_000  # below the system's own choices for outgoing connections


def choose_launcher(launcher: str = "", environ: Mapping[str, str] = os.environ) -> Launcher:
    """The launcher asked for; "" means env where torchrun's variables, or srun's for several tasks, are set, else ray.

    Raises ClusterError for env without those variables, and for an unknown name.
    """
    if launcher not in ("", "ray", "env", "none"):
        raise ClusterError(f'launch.launcher is "{launcher}": make it ray, env or none, or leave it empty')
    torchrun = "RANK" in environ and "WORLD_SIZE" in environ
    # A step's own number: a batch script has SLURM_PROCID and SLURM_NTASKS too, and is no rank.
    slurm = "SLURM_PROCID" in environ and _number("SLURM_STEP_NUM_TASKS", environ, 1) > 1
    if launcher == "env" and not torchrun and "SLURM_PROCID" not in environ:
        raise ClusterError(
            "launch.launcher is env, but neither torchrun (RANK, WORLD_SIZE) nor srun (SLURM_PROCID, SLURM_NTASKS) "
            "started this process: start it with one of them, or make it ray or none"
        )
    if launcher in ("ray", "none"):
        return "ray" if launcher == "ray" else "none"
    return "env" if launcher == "env" or torchrun or slurm else "ray"


def leads(launcher: str = "", environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks and writes for the whole run: under torchrun and srun only rank 0 does."""
    rank = int(environ.get("RANK", environ.get("SLURM_PROCID", "0")))
    return choose_launcher(launcher, environ) != "env" or rank == 0


def run_here(
    target: Target,
    watch: Watch,
    launcher: Literal["env", "none"],
    *,
    backend: str = "",
    port: int = 0,
    environ: MutableMapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Run `target` in this process, as the only worker (none) or as the rank that the environment names (env).

    The same contract as `run_on_ray`: `watch` gets this rank's status (a list of one) about twice a second, from
    another thread, and once at the end; the first Ctrl-C or SIGTERM asks the target to save and return, a second one
    raises KeyboardInterrupt. Returns this rank's result.

    Raises ClusterError before the target starts; WorkerError from what the target raised.
    """
    context = context_here(launcher, backend, port, environ)
    ended = threading.Event()
    watch_failed: list[BaseException] = []

    def keep_watching() -> None:
        try:
            while not ended.wait(WATCH_S):
                reason = watch([context.status()])
                if reason:
                    context.request_stop(reason)
        except BaseException as error:  # raised in the main thread, once the target has saved
            watch_failed.append(error)
            context.request_stop("the watch failed")

    watcher = threading.Thread(target=keep_watching, name="watch", daemon=True)
    with stop_signals(context.request_stop):
        watcher.start()
        try:
            result = target(context)
        except Exception as error:
            raise _as_worker_error(context, error) from error
        finally:
            ended.set()
            watcher.join()
            if not watch_failed:
                watch([context.status()])
    if watch_failed:
        raise watch_failed[0]
    return result


def context_here(
    launcher: Literal["", "env", "none"] = "",
    backend: str = "",
    port: int = 0,
    environ: MutableMapping[str, str] = os.environ,
) -> WorkerContext:
    """This process's place: the rank that torchrun or srun made it (env), or the only worker (none); "": as it is.

    Raises ClusterError as `from_environment` does.
    """
    if (launcher or choose_launcher("", environ)) == "env":
        return from_environment(backend, port, environ)
    return alone(backend, environ)


def alone(backend: str = "", environ: MutableMapping[str, str] = os.environ) -> WorkerContext:
    """The context of a run with one worker: this host's first GPU, or all the cores that it may use.

    Or as many as the user set in OMP_NUM_THREADS: threads wait for each other at every kernel, so that on a core that
    another program has they make a step many times longer.
    """
    own = environ.get("OMP_NUM_THREADS", "")
    num_threads = int(own) if own.isdecimal() and int(own) else len(os.sched_getaffinity(0))
    environ.update(thread_variables(num_threads))
    device, backend = _device(0, 1, backend)
    return WorkerContext(0, 1, 0, socket.gethostname(), device, num_threads, "", backend)


def from_environment(
    backend: str = "", port: int = 0, environ: MutableMapping[str, str] = os.environ
) -> WorkerContext:
    """The context of the rank that torchrun or srun started; sets what `env://`, gloo and OpenMP read.

    Raises ClusterError when a variable is missing or wrong, a host has fewer GPUs than ranks, or the port is in use.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not ("RANK" in environ and "WORLD_SIZE" in environ):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE")
        environ.setdefault("MASTER_ADDR", _first_slurm_host(environ))
        job = _number("SLURM_JOB_ID", environ, 0)
        environ.setdefault("MASTER_PORT", str(port or _BASE_PORT + job % _NUM_PORTS))
    rank, world_size = _number(names[0], environ), _number(names[1], environ)
    if rank >= world_size:
        raise ClusterError(
            f"{names[0]} is {rank}, {names[1]} is {world_size}: ranks count from 0 to {world_size - 1}"
        )
    environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size)})
    local_rank, num_local = _number(names[2], environ, rank), _number(names[3], environ, world_size)
    if world_size > 1:
        _meeting_point(rank, environ, one_host=num_local >= world_size)
    own_cpus = environ.get("SLURM_CPUS_PER_TASK", "")
    num_cpus = len(os.sched_getaffinity(0))
    num_threads = int(own_cpus) if own_cpus.isdecimal() else thread_share(num_cpus, num_local)
    environ.update(thread_variables(num_threads))
    if names[0].startswith("SLURM") and _num_gpus() == 1:  # srun can show each task its own GPU only
        local_rank, num_local = 0, 1
    device, backend = _device(local_rank, num_local, backend)
    init_method = "env://" if world_size > 1 else ""
    host = socket.gethostname()
    return WorkerContext(rank, world_size, local_rank, host, device, num_threads, init_method, backend)


def _number(name: str, environ: Mapping[str, str], default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    # Slurm counts tasks as "2(x3),1": nodes alike are grouped; the first number is the largest.
    match = re.fullmatch(r"(\d+)(\(x\d+\))?(,.*)?" if name.startswith("SLURM") else r"(\d+)()()", text or "")
    if match is None:
        raise ClusterError(
            f"the environment variable {name} is {text!r}, it should be a number: see your launcher"
        )
    return int(match[1])


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _device(local_rank: int, num_local: int, backend: str) -> tuple[str, str]:
    """This rank's device, and the backend for it."""
    num_gpus = _num_gpus()
    if not num_gpus:
        if backend == "nccl":
            raise ClusterError(
                "launch.backend is nccl, which needs CUDA GPUs: this process sees none; make it gloo"
            )
        return "cpu", "gloo"
    if num_local > num_gpus:
        raise ClusterError(
            f"{num_local} workers on {socket.gethostname()} need as many GPUs, it has {num_gpus}: start {num_gpus}"
        )
    return f"cuda:{local_rank}", backend or "nccl"


def _first_slurm_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or ""
    scontrol = shutil.which("scontrol")
    if "[" in nodes and scontrol:
        found = subprocess.run(
            [scontrol, "show", "hostnames", nodes], capture_output=True, text=True, check=False
        )
        if found.returncode == 0 and found.stdout:
            return found.stdout.split()[0]
    # "a,b", or "node[07-09,12]-ib": the first number of every bracket
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else "127.0.0.1"


def _meeting_point(rank: int, environ: MutableMapping[str, str], *, one_host: bool) -> None:
    """Check rank 0's port, and name the interface that leads to it; on its own host, the one that leads out."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ:
            raise ClusterError(
                f"the environment variable {name} is not set: rank 0's address and port are needed"
            )
    address, port = environ["MASTER_ADDR"], _number("MASTER_PORT", environ)
    # torchrun's own process listens there already, and the ranks meet in its store.
    if rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        held = hold_port(port)
        if held is None:
            raise ClusterError(
                f"port {port} is in use on {socket.gethostname()}, where rank 0 runs: choose another"
            )
        held.close()
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # sends nothing: only asks the routing table
        if not one_host and probe.getsockname()[0].startswith("127."):
            probe.connect((_ELSEWHERE, port))
        environ.update(interface_variables(probe.getsockname()[0], environ))


def _as_worker_error(context: WorkerContext, error: Exception) -> WorkerError:
    if context.world_size > 1 and failed_in_collective(error):
        text = f"lost another rank, whose own message has the cause ({type(error).__name__}: {error})"
        return WorkerError(f"rank {context.rank} on host {context.host} {text}", {context.rank: text})
    return worker_error([Failure.of(context.rank, context.host, error)])

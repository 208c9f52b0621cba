"""Plants faults in a worker, from inside: a user's data module (`--data anabranch.benchmarks.injector:patterns`).

Every worker imports it, as it would any user's module, from then on in the run's working directory:

    faults.json        what to plant: a list of {"kind", "rank", "step", "moment", "argument"}
    driver.pid         of the command
    fired-<i>.json     made when fault i goes off, once whatever replaces the process: {"time", "pid", "rank", "step"}
    trace-<pid>.jsonl  when this worker told its steps: {"time", "rank", "step", "phase"}, first of all {"pid", …}

Moments of the step that follows `step` finished ones: forward, branch_all_reduce (in it), reduction (the first bucket
that goes to all ranks has left), optimizer; checkpoint (a file of the one made after `step` steps is being synced);
recovery (a process group is made again, after fault 0), newcomer (the same, in a process that was not there before).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from anabranch.cluster import WorkerContext
from anabranch.runtime import exchange

MOMENTS = ("forward", "branch_all_reduce", "reduction", "optimizer", "checkpoint")
KINDS = ("kill", "stop", "exception", "memory", "raylet", "driver", "disk", "network", "host")
_FILLER = "filler"
# Where ranks stay, their steps take so long from then on: a short run would be over before anyone notices.
_OF_OTHERS, _SLOW_S = ("raylet", "driver", "network", "host"), 1.0
_WAIT = 3  # times as long, while ranks are left out: for those that come back to load


class PlantedError(RuntimeError):
    """What the kind "exception" raises."""


def patterns(num_train: int = 320, num_test: int = 32) -> tuple[list[Any], list[Any], int]:
    """A small dataset that a network learns: stripes by class and noise, 1x8x8."""
    generator = torch.Generator().manual_seed(7)
    columns = torch.arange(8)

    def draw(num: int) -> list[tuple[Tensor, int]]:
        images = torch.randint(0, 160, (num, 1, 8, 8), dtype=torch.uint8, generator=generator)
        for index in range(num):
            images[index] += ((columns + index % 4) % 4 == 0).to(torch.uint8) * 80
        return [(images[index], index % 4) for index in range(num)]

    return draw(num_train), draw(num_test), 4


class Injector:
    """This process's state: where the run stands, as the worker itself told it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[dict[str, Any]] = json.loads((folder / "faults.json").read_text())
        self.rank, self.step, self.num_groups = -1, 0, 0
        self.most = 0  # ranks that there were at once
        self.began_late = any(folder.glob("fired-*.json"))
        self._in_forward = False
        self._slow_after = any(fault["kind"] in _OF_OTHERS for fault in self.faults)
        self._trace = folder / f"trace-{os.getpid()}.jsonl"

    def told(self, rank: int, status: dict[str, Any]) -> None:
        """The worker published its status."""
        if self.rank < 0:
            started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
            self._write({"pid": os.getpid(), "started": started, "rank": rank, "interface": interface})
        self.rank = rank
        if "step" in status or "phase" in status:
            # a step that is applied between two generations is told of while there are no groups
            training = status.get("phase") == "training" and "step" in status and dist.is_initialized()
            if training and self._slow_after and (self.folder / "fired-0.json").exists():
                self.most = max(self.most, dist.get_world_size())
                time.sleep(_SLOW_S * (_WAIT if dist.get_world_size() < self.most else 1))
            elif training:
                self.most = dist.get_world_size()
            self.step = status.get("step", self.step)
            self._write({"rank": rank, "step": self.step, "phase": status.get("phase")})

    def forward(self, module: Any, *_: Any) -> None:
        """A module is about to run."""
        if module.training and not self._in_forward and torch.is_grad_enabled():
            self._in_forward = True
            self.at("forward")

    def before_collective(self, group: Any) -> None:
        """A collective is about to be called."""
        if self._in_forward and _size(group) < dist.get_world_size():
            self.at("branch_all_reduce")

    def after_collective(self, group: Any) -> None:
        """It was called, and may be on its way."""
        if self._in_forward and _size(group) == dist.get_world_size():
            self.at("reduction")

    def optimizer(self, *_: Any) -> None:
        """The optimizer is about to step."""
        self._in_forward = False
        self.at("optimizer")

    def grouped(self) -> None:
        """A process group has been made."""
        self.num_groups += 1
        self._in_forward = False
        if self.began_late or self.num_groups > 1:
            self.rank = dist.get_rank()
            self.at("newcomer" if self.began_late and self.num_groups == 1 else "recovery")

    def synced(self, descriptor: int) -> None:
        """A file is about to be synced; training may be steps ahead of the checkpoint that it belongs to."""
        if found := re.search(r"/checkpoints/\D*(\d+)", str(Path(f"/proc/self/fd/{descriptor}").readlink())):
            self.at("checkpoint", int(found[1]))

    def at(self, moment: str, step: int | None = None) -> None:
        """Sets off the faults that wait for this moment (of the step that the run stands at)."""
        step = self.step if step is None else step
        for index, fault in enumerate(self.faults):
            if (fault["rank"], fault["moment"]) != (self.rank, moment):
                continue
            if moment in MOMENTS and fault["step"] != step:
                continue
            if moment not in MOMENTS and not (self.folder / "fired-0.json").exists():
                continue
            record = {"time": time.time(), "pid": os.getpid(), "rank": self.rank, "step": step}
            try:
                with (self.folder / f"fired-{index}.json").open("x") as file:
                    file.write(json.dumps(record))
            except FileExistsError:
                continue
            set_off(fault["kind"], fault["argument"], self.folder)

    def _write(self, record: dict[str, Any]) -> None:
        with self._trace.open("a") as file:
            file.write(json.dumps({"time": time.time(), **record}) + "\n")


def set_off(kind: str, argument: str, folder: Path) -> None:
    """The fault itself. argument: of disk a folder to fill, of network a device to take down, of host its namespace."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exception":
        raise PlantedError("planted")
    elif kind == "memory":  # as a shell or container reports one; the kernel's own is a SIGKILL
        torch.ones(2**24)
        os._exit(137)
    elif kind == "raylet":
        os.kill(os.getppid(), signal.SIGKILL)
    elif kind == "driver":
        os.kill(int((folder / "driver.pid").read_text()), signal.SIGKILL)
    elif kind == "disk":
        fill(Path(argument))
    elif kind == "host":
        found = subprocess.run(["ip", "netns", "pids", argument], capture_output=True, text=True, check=True)
        pids = [int(pid) for pid in found.stdout.split() if int(pid) != os.getpid()]
        for pid in [*pids, os.getpid()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    elif kind == "network":
        subprocess.run(["ip", "link", "set", argument, "down"], check=True)


def fill(folder: Path) -> None:
    """Takes what is left of a (small) file system."""
    with (folder / _FILLER).open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            pass


def empty(folder: Path) -> None:
    """Gives it back."""
    (folder / _FILLER).unlink(missing_ok=True)


def _size(group: Any) -> int:
    return dist.get_world_size(group)


def install(folder: Path) -> None:
    """Wraps what moments are named by: hooks that torch offers, its collectives, fsync, and what the worker tells."""
    injector = Injector(folder)
    publish, make_group, fsync = WorkerContext.publish, dist.init_process_group, os.fsync
    begin_sum = exchange.begin_sum

    def told(self: WorkerContext, **status: Any) -> None:
        publish(self, **status)
        injector.told(self.rank, status)

    def grouped(*arguments: Any, **options: Any) -> None:
        make_group(*arguments, **options)
        injector.grouped()

    def synced(descriptor: Any) -> None:
        injector.synced(descriptor if isinstance(descriptor, int) else descriptor.fileno())
        fsync(descriptor)

    def reduced(x: Tensor, group: Any, sizes: Any = None) -> exchange.Work:
        injector.before_collective(group)
        work = begin_sum(x, group, sizes)
        injector.after_collective(group)
        return work

    WorkerContext.publish = told  # type: ignore[method-assign]
    dist.init_process_group = grouped
    os.fsync = synced  # type: ignore[assignment]
    exchange.begin_sum = reduced
    register_module_forward_pre_hook(injector.forward)
    register_optimizer_step_pre_hook(injector.optimizer)


if Path("faults.json").exists():
    install(Path.cwd())

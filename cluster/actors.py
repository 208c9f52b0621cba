"""The worker actor: one per rank. Its first thread runs the target, the others answer the controller."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anabranch.cluster.environment import hold_port, interface_variables
from anabranch.cluster.failures import Failure, gpu_works, waits_for_others
from anabranch.cluster.worker_context import WorkerContext

_STACK_FRAMES = 8
# The controller asks every second. A rank that nobody asks has lost its host's network, or its controller: it must not
# go on beside its replacement.
ORPHANED_S = 60.0
Target = Callable[[WorkerContext], dict[str, Any]]


@dataclass(frozen=True)
class Probe:
    """What an actor found where it was placed.

    port: held for the process group, None when the asked one is in use. gpus: Ray's numbers of those it was given.
    stderr: the file that keeps what the process writes when it dies.
    """

    address: str
    hostname: str
    port: int | None
    gpus: tuple[str, ...]
    stderr: str


class Worker:
    """One rank's process. It calls nothing of Ray while the target runs."""

    def __init__(self, variables: dict[str, str]) -> None:
        """Set the environment before anything imports torch: Ray has set some of it for its own purposes."""
        os.environ.update(variables)
        self._context: WorkerContext | None = None
        self._running = threading.Event()
        self._asked_at = time.monotonic()
        self._held: socket.socket | None = None

    def probe(self, port: int) -> Probe:
        """Where this is; and set the interface that the node's Ray address belongs to, for gloo and NCCL."""
        import ray

        address = _address()
        os.environ.update(interface_variables(address))
        self._held = hold_port(port)
        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return Probe(
            address,
            socket.gethostname(),
            self._held.getsockname()[1] if self._held else None,
            tuple(map(str, ids)),
            _stderr(),
        )

    def run(self, pickled_target: bytes, place: dict[str, Any], gpu: str | None) -> dict[str, Any] | Failure:
        """Run the target to its end. place: WorkerContext's fields. gpu: the one device that it sees, if it is to."""
        from ray import cloudpickle

        if gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        self._context = context = WorkerContext(**place)
        self._running.set()
        if context.recovers:
            self._asked_at = time.monotonic()
            threading.Thread(target=self._end_orphaned, daemon=True, name="anabranch-orphan").start()
        if context.generation < 0:
            os.environ.update(interface_variables(_address()))
        try:
            target: Target = cloudpickle.loads(pickled_target)
            return target(context)
        except BaseException as error:  # SystemExit too: it would end the process and hide what happened
            failure = Failure.of(context.rank, context.host, error)
            return replace(failure, step=context.status().get("step", -1))

    def _end_orphaned(self) -> None:
        # Counted, not clocked: a process that was stopped with its controller (Ctrl-Z) is no orphan yet.
        seconds, before = 0.0, self._asked_at
        while seconds < ORPHANED_S:
            time.sleep(1.0)
            seconds = seconds + 1.0 if self._asked_at == before else 0.0
            before = self._asked_at
        print(
            f"anabranch: nobody has asked for {ORPHANED_S:g} s, the process ends",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def status(self) -> dict[str, Any]:
        """What the target published."""
        self._asked_at = time.monotonic()
        return self._context.status() if self._context else {}

    def quiesce(self, generation: int, wait_s: float) -> dict[str, Any] | None:
        """The target's state once it has left its process groups and waits for an order; None: not within `wait_s`."""
        self._running.wait(wait_s)
        state = self._context.quiesce(generation, wait_s) if self._context else None
        return state and {**state, "stderr": _stderr()}

    def give_order(self, order: dict[str, Any]) -> None:
        """Where the waiting target goes on, and how."""
        assert self._context is not None, "it waits"
        self._context.give_order(order)

    def meeting_point(self, port: int) -> str:
        """Where the next generation's process group gathers, if this is rank 0: "tcp://address:port".

        port: the one that was asked for, 0 for any; where it is in use still (of the generation before) another one.
        """
        if self._held:
            self._held.close()
        self._held = hold_port(port) or hold_port(0)
        assert self._held is not None, "any port"
        return f"tcp://{_address()}:{self._held.getsockname()[1]}"

    def whereabouts(self) -> dict[str, Any]:
        """Of a rank that may hang: what it is at, its target's stack, and whether it waits for others there."""
        assert self._context is not None, "it runs"
        frames = traceback.extract_stack(sys._current_frames()[self._context.thread])
        stack = "".join(traceback.format_list(frames[-_STACK_FRAMES:]))
        waits = waits_for_others(frames) or gpu_works(self._context.device)
        return {"where": self._context.where(), "stack": stack, "waits": waits}

    def settle(self, wait_s: float) -> None:
        """Waits for what the target has left behind it to do, as a save that was begun; the process is ended then."""
        self._asked_at = time.monotonic()
        if self._context:
            self._context.settle(wait_s)

    def request_stop(self, reason: str) -> None:
        """Ask the target to save and return."""
        if self._context:
            self._context.request_stop(reason)


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _stderr() -> str:
    return str(Path("/proc/self/fd/2").resolve())

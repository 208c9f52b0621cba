"""Connecting to Ray: a private cluster on this machine, or one that is there already."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from anabranch.cluster.errors import ClusterError, StoppedError
from anabranch.cluster.placement import Host, devices_of
from anabranch.cluster.ray_calls import counted
from anabranch.schedulers.cluster import Cluster

# A unix socket's path ends at 107 bytes; our folder and Ray's session in it take up to 85 of them.
_MAX_TEMP_DIR = 20
_OBJECT_STORE_BYTES = (
    100 * 2**20
)  # we send functions and results, no tensors; Ray would take 30 % of the memory
_ANSWER_S = 5.0
_REACH_S = 1.0
_KIND, _KIND_LABEL = "accelerator_type:", "ray.io/accelerator-type"
# Ray notices late what a run gave back.
_SETTLE_S = 3.0
_given_back_at = float("-inf")


def note_given_back() -> None:
    """A run of this process has just given back what it held: the next look at the cluster waits until Ray knows."""
    global _given_back_at
    _given_back_at = time.monotonic()


# Ray prints this on the driver's standard output for a process that is gone; we say it once, with rank and host.
_SAID_BY_US = "A worker died or was killed"


def load_ray() -> None:
    """Import ray (most of a second) under the settings that it reads then."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _SAID_BY_US)
    import ray  # noqa: F401


@contextmanager
def connect(address: str = "", num_cpus: int | None = None, num_gpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray: to the cluster at `address` (or RAY_ADDRESS), else to a new one on this machine.

    The new one belongs to this process and ends with it, whatever ends it; `num_cpus` and `num_gpus` set what it
    offers (default: what the machine has). A connection that is open already is used and left open. Call it from a
    thread that lives as long as the connection: Ray's processes end with the thread that started them.

    Raises ClusterError when no cluster answers at the address.
    """
    load_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    temp_dir: Path | None = None
    if address:
        _check_answers(address)
        options |= {"address": address}
    else:
        temp_dir = _new_temp_dir()
        _set_local_environment()
        options |= {
            "address": "local",
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": str(temp_dir / "r"),  # Ray opens its folder to everybody, ours stays the user's
        }
    try:
        with nullcontext() if address else _lean():
            _init(options)
        yield
    finally:
        counted("shutdown", ray.shutdown)
        if temp_dir:
            shutil.rmtree(temp_dir, ignore_errors=True)


def hosts() -> tuple[Host, ...]:
    """Every node of the connected cluster, the one with most GPUs (then CPUs) first, and what is free on each."""
    found = look()
    while any((host.free_cpus, host.free_gpus) != (host.cpus, host.gpus) for host in found):
        if time.monotonic() > _given_back_at + _SETTLE_S:
            break  # others hold it
        time.sleep(0.1)
        found = look()
    return found


def look() -> tuple[Host, ...]:
    """`hosts` as Ray sees them at this moment, which may be late.

    A node is called by its host name; where several share one, by address, and where they share that too, by a part
    of its node ID. One that began again at its address is not two: Ray may not have missed the first yet.
    """
    import ray
    from ray._private.state import available_resources_per_node  # the public one adds the nodes up

    nodes = _without_gone([node for node in counted("watch_nodes", ray.nodes) if node["Alive"]])
    free = counted("watch_resources", available_resources_per_node)
    names = Counter(node["NodeManagerHostname"] for node in nodes)
    addresses = Counter(node["NodeManagerAddress"] for node in nodes)

    def name(node: dict[str, Any]) -> str:
        if names[node["NodeManagerHostname"]] == 1:
            return str(node["NodeManagerHostname"])
        if addresses[node["NodeManagerAddress"]] == 1:
            return str(node["NodeManagerAddress"])
        return f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"

    found = []
    for node in nodes:
        has, left = node["Resources"], free.get(node["NodeID"], {})
        found.append(
            Host(
                name(node),
                node["NodeID"],
                has.get("CPU", 0.0),
                left.get("CPU", 0.0),
                int(has.get("GPU", 0)),
                int(left.get("GPU", 0)),
                gpu_kind(node),
                node["NodeManagerAddress"],
                node["NodeManagerPort"],
            )
        )
    return tuple(sorted(found, key=lambda host: (-host.gpus, -host.cpus, host.name)))


def _without_gone(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of several nodes at one address those that can be reached, or one where none can: it is cut off."""
    by_address: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        by_address.setdefault(node["NodeManagerAddress"], []).append(node)
    found: list[dict[str, Any]] = []
    for alike in by_address.values():
        reached = alike
        if len(alike) > 1:
            reached = [n for n in alike if _is_reached(n["NodeManagerAddress"], n["NodeManagerPort"])]
        found += reached or alike[-1:]
    return found


def gpu_kind(node: Mapping[str, Any]) -> str:
    """The kind of GPUs that a node's entry in `ray.nodes()` tells: by label, else by resource; "gpu": by neither.

    KubeRay and `ray start --labels` set the label `ray.io/accelerator-type`; `accelerator_type:…` Ray sets for GPUs
    that it knows.
    """
    found = [key.removeprefix(_KIND) for key in node["Resources"] if key.startswith(_KIND)]
    return str(node.get("Labels", {}).get(_KIND_LABEL) or (found[0] if found else "gpu"))


def living(found: tuple[Host, ...]) -> tuple[Host, ...]:
    """Those whose Ray process can be reached: Ray itself takes up to half a minute to miss one."""
    return tuple(host for host in found if _is_reached(host.address, host.port))


def _is_reached(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_REACH_S).close()
    except OSError:
        return False
    return True


def discover(cpus_per_worker: float = 1.0) -> Cluster:
    """The connected cluster's free devices: its GPUs, or without any its CPU workers' places."""
    return devices_of(hosts(), cpus_per_worker)


@contextmanager
def _lean() -> Iterator[None]:
    """Ray started in here is without its dashboard, autoscaler and log reader, which we do not use.

    They are two thirds of the seconds that it takes to start, and Ray has no options for it (`include_dashboard=False`
    starts the process all the same). A Ray without these names starts as it is.
    """
    from ray._private import utils
    from ray._private.node import Node

    def nothing(*args: object, **options: object) -> None:
        pass

    def not_needed() -> ImportError:  # its agents then load what they need without the dashboard's libraries
        return ImportError("a private cluster has no dashboard")

    instead = [(Node, name, nothing) for name in ("start_api_server", "start_monitor", "start_log_monitor")]
    with ExitStack() as stack:
        for owner, name, function in [*instead, (utils, "get_dashboard_dependency_error", not_needed)]:
            if hasattr(owner, name):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, function)
        yield


def _init(options: dict[str, Any]) -> None:
    import ray
    from ray.exceptions import RayError

    main = threading.current_thread() is threading.main_thread()
    found = signal.getsignal(signal.SIGTERM)
    try:
        counted("init", ray.init, **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        if options["address"] == "local":
            raise
        raise ClusterError(
            f"the Ray cluster at {options['address']} cannot be used: {error}; start this on one of its hosts, with "
            "the token that it was started with (RAY_AUTH_TOKEN or ~/.ray/auth_token)"
        ) from error
    except SystemExit as error:  # Ray answers SIGTERM in this way while it starts
        raise StoppedError("terminated while Ray was starting", "terminate") from error
    finally:
        if main:  # Ray's own would end the program with a code that says nothing
            signal.signal(signal.SIGTERM, found)


def _new_temp_dir() -> Path:
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="anabranch-", dir=base if len(base) <= _MAX_TEMP_DIR else "/tmp"))


def _set_local_environment() -> None:
    """What a private cluster and its workers inherit.

    Ray listens on every interface and asks for a token. One that the user set or keeps is used; else the process
    makes one for itself, which only its children see (Ray would write one to the user's home).
    """
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not given and not (Path.home() / ".ray" / "auth_token").exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # else Ray warns on machines without GPUs
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's workers would step back (nice 15) behind whatever else runs on the machine: here they are what it is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray would start workers ahead that are not done when ours are asked for, and then start ours beside them.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # A first connection that comes before the listener is tried again after a second: ask sooner, as long in all.
    os.environ.setdefault("RAY_raylet_client_connect_timeout_milliseconds", "50")
    os.environ.setdefault("RAY_raylet_client_num_connect_attempts", "200")


def _check_answers(address: str) -> None:
    """Refuse in seconds what Ray would try for long."""
    if "://" in address:
        raise ClusterError(
            f"launch.address {address} is Ray Client's: give the cluster's own (host:6379), from a machine in it"
        )
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise ClusterError(f"launch.address {address} is no HOST:PORT: give it as in 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, UnicodeError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}): start one there with `ray start --head`, "
            "or leave launch.address empty for one on this machine"
        ) from error

"""What would stop a run on a cluster: pure checks over what its nodes reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_SKEW_S = 1.0
MIN_FREE_BYTES = 2**30
# What a driver process leaves on an idle GPU is less.
MAX_IDLE_GPU_BYTES = 2**30

_REMEDIES = {
    "python": "start Ray there with the same Python",
    "ray": "install the same version there: pip install 'ray[default]=={}'",
    "torch": "install the same version there: pip install torch=={}",
    "cuda": "install the torch build for the same CUDA there",
    "nccl": "install the torch build with the same NCCL there",
    "anabranch": "install the same version and sources there, in the Python that runs Ray",
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table. host: where, "" for the whole cluster. remedy: where it failed."""

    name: str
    host: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class NodeReport:
    """What one node told.

    name: as plans call the host. gpus, free_gpus: Ray's count. versions: "" where a package is missing; `gpus` is
    torch's count of them. gpu_memory_used: bytes by GPU. skew_s: its clock minus the driver's, as far as the asking
    took. folder_error: why it cannot write to the run's folder, "absent" where it has no such folder. unseen: hosts
    whose file in it this one does not see. reach_error: why it cannot connect to rank 0's host. error: why it told
    nothing.
    """

    name: str
    address: str
    gpus: int = 0
    free_gpus: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    interface: str = ""
    missing_interfaces: Sequence[str] = ()
    gpu_memory_used: Sequence[int] = ()
    auth_mode: str = ""
    free_bytes: int | None = None
    skew_s: float = 0.0
    folder_error: str = ""
    unseen: Sequence[str] = ()
    reach_error: str = ""
    error: str = ""


def check_answers(nodes: Sequence[NodeReport]) -> list[Check]:
    """Every node started a worker and told something."""
    return [
        Check(
            "answers",
            node.name,
            False,
            node.error,
            "is the host up, and its link? See `ray status`, and Ray's logs there",
        )
        if node.error
        else Check("answers", node.name, True, node.address)
        for node in nodes
    ]


def check_versions(driver: Mapping[str, str], nodes: Sequence[NodeReport]) -> list[Check]:
    """Everything that must be equal is what the driver has."""
    checks = []
    for node in nodes:
        wrong = False
        for name, remedy in _REMEDIES.items():
            if name not in driver:
                continue
            own, wanted = node.versions.get(name, ""), driver[name]
            if own == wanted:
                continue
            wrong = True
            found = f"{name} {own}, the driver has {wanted}" if own else f"no {name}, the driver has {wanted}"
            checks.append(Check("versions", node.name, False, found, remedy.format(wanted)))
        if not wrong:
            text = ", ".join(f"{name} {driver[name]}" for name in _REMEDIES if name in driver)
            checks.append(Check("versions", node.name, True, text))
    return checks


def check_gpus(nodes: Sequence[NodeReport]) -> list[Check]:
    """The GPUs that Ray offers exist, torch can use them, and nobody outside of Ray fills them."""
    checks = []
    for node in nodes:
        seen = int(node.versions.get("gpus", node.gpus))
        busy = [i for i, used in enumerate(node.gpu_memory_used) if used > MAX_IDLE_GPU_BYTES]
        if seen < node.gpus:
            without = " (this torch has no CUDA)" if node.versions.get("cuda") == "none" else ""
            found = f"Ray offers {node.gpus} GPUs, torch sees {seen}{without}"
            remedy = (
                "install a torch with CUDA and a driver for it, or start Ray there with --num-gpus "
                + str(seen)
            )
            checks.append(Check("GPUs", node.name, False, found, remedy))
        elif node.free_gpus == node.gpus and busy:
            used = ", ".join(f"{i}: {node.gpu_memory_used[i] / 2**30:.1f} GiB" for i in busy)
            found = f"memory in use by processes outside of Ray (GPU {used})"
            checks.append(Check("GPUs", node.name, False, found, "end them (nvidia-smi lists them)"))
        else:
            text = f"{node.free_gpus} of {node.gpus} free" if node.gpus else "none: workers run on CPUs"
            checks.append(Check("GPUs", node.name, True, text))
    return checks


def check_interfaces(nodes: Sequence[NodeReport]) -> list[Check]:
    """Each node's Ray address is one that the others can use, on an interface that is there."""
    checks = []
    for node in nodes:
        loopback = node.address.startswith("127.")
        if node.missing_interfaces:
            found = f"GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names {', '.join(node.missing_interfaces)}, not there"
            check = Check("interface", node.name, False, found, "unset it, or name one of `ip -br addr`")
        elif not node.interface:
            found = f"no interface owns Ray's address {node.address}"
            remedy = "start Ray there with --node-ip-address of one of `ip -br addr`"
            check = Check("interface", node.name, False, found, remedy)
        elif loopback and any(other.address != node.address for other in nodes):
            found = f"Ray's address {node.address} is loopback, the other hosts cannot reach it"
            remedy = "start Ray there with --node-ip-address of the network that the hosts share"
            check = Check("interface", node.name, False, found, remedy)
        else:
            check = Check("interface", node.name, True, f"{node.interface}, {node.address}")
        checks.append(check)
    return checks


def check_port(first: NodeReport, asked: int, given: int | None) -> list[Check]:
    """Rank 0's host has the port free. given: the port that it listens at, None where the asked one is in use."""
    if given is None:
        remedy = "choose another launch.port, or 0 for a free one"
        return [Check("port", first.name, False, f"launch.port {asked} is in use on {first.name}", remedy)]
    return [Check("port", first.name, True, f"{asked} is free" if asked else "any free one")]


def check_reach(first: NodeReport, nodes: Sequence[NodeReport]) -> list[Check]:
    """Every other host can connect to rank 0's."""
    others = [node for node in nodes if node is not first]
    remedy = f"open all TCP ports between the hosts, and see that {first.address} is routed"
    return [
        Check("route", node.name, False, f"cannot connect to {first.address}: {node.reach_error}", remedy)
        if node.reach_error
        else Check("route", node.name, True, f"connects to {first.name} ({first.address})")
        for node in others
    ]


def check_clocks(nodes: Sequence[NodeReport]) -> list[Check]:
    """Clocks agree: file times and `anabranch status` compare them."""
    checks = []
    for node in nodes:
        ok = abs(node.skew_s) <= MAX_SKEW_S
        way = "ahead of" if node.skew_s > 0 else "behind"
        found = (
            f"within {MAX_SKEW_S:g} s of the driver's"
            if ok
            else f"{abs(node.skew_s):.1f} s {way} the driver's"
        )
        remedy = "" if ok else "set it by NTP (chronyc makestep, timedatectl set-ntp true)"
        checks.append(Check("clock", node.name, ok, found, remedy))
    return checks


def check_folder(folder: str, driver_error: str, nodes: Sequence[NodeReport]) -> list[Check]:
    """Every host can write to the run's folder, and sees what the others wrote there."""
    if driver_error:
        remedy = "choose another --run-dir, or give yourself the right to write there"
        return [Check("run folder", "driver", False, f"{folder}: {driver_error}", remedy)]
    checks = []
    share = "give a --run-dir on storage that all hosts mount at one path, or run on one host"
    for node in nodes:
        others = [name for name in node.unseen if name != node.name]
        if node.folder_error == "absent":
            check = Check("run folder", node.name, False, f"{folder} is not shared with this host", share)
        elif node.folder_error:
            remedy = "mount it for writing there, or choose another --run-dir"
            check = Check("run folder", node.name, False, f"{folder}: {node.folder_error}", remedy)
        elif others:
            found = f"{folder} is not shared: what {', '.join(others)} wrote is not seen here"
            check = Check("run folder", node.name, False, found, share)
        else:
            check = Check("run folder", node.name, True, f"{folder} is writable and shared")
        checks.append(check)
    return checks


def check_disk(folder: str, nodes: Sequence[NodeReport]) -> list[Check]:
    """There is room for checkpoints."""
    checks = []
    for node in nodes:
        if node.free_bytes is None:
            continue  # the folder's own check says why
        ok = node.free_bytes >= MIN_FREE_BYTES
        size = f"{node.free_bytes / 2**30:.1f} GiB free" + ("" if ok else f" at {folder}: the disk is full")
        remedy = "" if ok else f"free {MIN_FREE_BYTES >> 30} GiB at least, or choose another --run-dir"
        checks.append(Check("disk", node.name, ok, size, remedy))
    return checks


def check_token(nodes: Sequence[NodeReport], here: str = "") -> list[Check]:
    """Off loopback Ray asks for a token, unless that was switched off by name. here: the driver's RAY_AUTH_MODE."""
    if all(node.address.startswith("127.") for node in nodes):
        return [Check("token", "", True, "loopback only")]
    checks = []
    for node in nodes:
        if node.auth_mode.lower() == "token":
            check = Check("token", node.name, True, "Ray asks for its token")
        elif "disabled" in (node.auth_mode.lower(), here.lower()):
            check = Check("token", node.name, True, "switched off by RAY_AUTH_MODE=disabled")
        else:
            found = f"Ray takes commands from anyone who reaches {node.address}"
            remedy = (
                "`ray get-auth-token --generate`, copy ~/.ray/auth_token to every host, and start Ray again with "
                "RAY_AUTH_MODE=token (or say RAY_AUTH_MODE=disabled, there or for this command)"
            )
            check = Check("token", node.name, False, found, remedy)
        checks.append(check)
    return checks


def check_pairs(pairs: Mapping[tuple[str, str], str]) -> list[Check]:
    """Two hosts can reduce a tensor. pairs: each with its error, "" where it worked."""
    if not pairs:
        return [Check("all-reduce", "", True, "one host")]
    remedy = "open all TCP ports between the hosts; GLOO_SOCKET_IFNAME names the interface to use"
    failed = [
        Check("all-reduce", f"{a} – {b}", False, error, remedy) for (a, b), error in pairs.items() if error
    ]
    worked = sum(not error for error in pairs.values())
    passed = [Check("all-reduce", "", True, f"{worked} of {len(pairs)} pairs of hosts")] if worked else []
    return passed + failed

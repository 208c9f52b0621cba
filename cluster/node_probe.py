"""What `anabranch doctor` does on a node. Only the standard library is needed there: the code travels by value."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any

from anabranch.cluster.environment import hold_port, interface_of

PACKAGES = ("blocks", "cluster", "runtime", "schedulers")
# Also without a terminal or a driver: memory in MiB.
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,name,memory.used", "--format=csv,noheader,nounits")


class NodeProbe:
    """One node's answers; an actor, or on the driver a plain object."""

    def look(self, folder: str, deep: bool) -> dict[str, Any]:
        """The fields of `NodeReport`. deep: import torch too (seconds), for CUDA, NCCL and its view of the GPUs."""
        versions = {"python": sys.version.split()[0], "anabranch": sources()}
        for name in ("ray", "torch"):
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = ""
        if deep:
            versions |= torch_versions()
        wanted = {os.environ.get(f"{user}_SOCKET_IFNAME", "") for user in ("GLOO", "NCCL")}
        there = {name for _, name in socket.if_nameindex()}
        return {
            "hostname": socket.gethostname(),
            "versions": versions,
            "missing_interfaces": sorted(name for name in wanted - {""} if name not in there),
            "gpu_memory_used": gpu_memory_used(),
            "auth_mode": os.environ.get("RAY_AUTH_MODE", ""),
            "free_bytes": free_bytes(Path(folder)),
        }

    def clock(self) -> float:
        """This node's time, in seconds."""
        return time.time()

    def interface(self, address: str) -> str:
        """The interface that owns the node's address; "" where none does."""
        return interface_of(address) or ""

    def write(self, folder: str, name: str, nonce: str) -> str:
        """Leave a file for the others; "" or why it cannot be."""
        if not Path(folder).is_dir():
            return "absent"
        try:
            Path(folder, name).write_text(nonce)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def read(self, folder: str, nonce: str) -> list[str]:
        """The names of the files with that nonce that this node sees."""
        seen = []
        with suppress(OSError):
            for path in Path(folder).iterdir():
                with suppress(OSError, ValueError):
                    seen += [path.name] if path.read_text() == nonce else []
        return sorted(seen)

    def listen(self, port: int) -> int | None:
        """Answer at a port (0: a free one) from now on; None where it is in use."""
        held = hold_port(port)
        if held is None:
            return None
        try:
            held.listen()
        except OSError:  # somebody bound it as we do, and listens
            return None

        def answer() -> None:
            while True:
                held.accept()[0].close()

        threading.Thread(target=answer, daemon=True).start()
        return int(held.getsockname()[1])

    def hold(self) -> int:
        """A free port; the meeting point of a pair."""
        self._held = held = hold_port()
        assert held is not None, "the system has a free port"
        return int(held.getsockname()[1])

    def reach(self, address: str, port: int, timeout_s: float) -> str:
        """Connect to another node; "" or why it cannot be."""
        try:
            socket.create_connection((address, port), timeout=timeout_s).close()
        except OSError as error:
            return str(error)
        return ""

    def reduce(self, rank: int, own: str, address: str, port: int, timeout_s: float) -> str:
        """A small all-reduce of two over gloo, meeting at rank 0's `address`; "" or why it fails."""
        from datetime import timedelta

        if name := interface_of(own):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        try:
            import torch
            import torch.distributed as dist

            total = torch.tensor([float(rank + 1)])
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{address}:{port}",
                rank=rank,
                world_size=2,
                timeout=timedelta(seconds=timeout_s),
            )
            try:
                dist.all_reduce(total)
            finally:
                dist.destroy_process_group()
        except Exception as error:  # whatever it is, it is what the user must know
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return "" if total.item() == 3.0 else f"1 + 2 gave {total.item():g}"


def sources() -> str:
    """anabranch's version and a digest of its sources here; "" where it is not installed."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        try:
            spec = util.find_spec(f"anabranch.{package}")
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            return ""
        folder = Path(spec.submodule_search_locations[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    try:
        version = metadata.version("anabranch")
    except metadata.PackageNotFoundError:
        version = "checkout"
    return f"{version} ({digest.hexdigest()[:8]})"


def torch_versions() -> dict[str, str]:
    """CUDA's and NCCL's, "none" in a torch without them; gpus: how many torch sees. Empty without torch."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # no context on the GPUs
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides them from an actor that holds none
    try:
        import torch
    except ImportError:
        return {}
    cuda = torch.version.cuda or "none"
    nccl = "none"
    if cuda != "none" and torch.distributed.is_nccl_available():
        from torch.cuda import nccl as torch_nccl

        nccl = ".".join(map(str, torch_nccl.version()))
    return {"cuda": cuda, "nccl": nccl, "gpus": str(torch.cuda.device_count())}


def gpu_memory_used() -> list[int]:
    """Bytes in use on each GPU of the node, by index; empty without GPUs."""
    try:
        out = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=True).stdout
        return [int(line.rpartition(",")[2]) * 2**20 for line in out.splitlines()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def free_bytes(folder: Path) -> int | None:
    """Free space where the folder is or would be made; None where that cannot be told."""
    with suppress(OSError):
        while not folder.exists():
            folder = folder.parent
        stat = os.statvfs(folder)
        return stat.f_bavail * stat.f_frsize
    return None

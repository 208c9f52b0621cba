"""A rank's environment: share of the cores, memory, the network interface that its tensors take, a free port."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Mapping

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
# glibc's mallopt: how much free memory to give back, how much to take ahead, how many blocks to map one by one.
_KEEP = {-1: 2**31 - 1, -2: 2**26, -4: 0}


def thread_share(num_cpus: float, num_ranks: int) -> int:
    """Threads for each of `num_ranks` ranks on a host with `num_cpus` cores: an even share, at least one."""
    return max(1, int(num_cpus) // num_ranks)


def thread_variables(num_threads: int) -> dict[str, str]:
    """What OpenMP, MKL and OpenBLAS read when they are loaded: to be set before torch is imported."""
    return dict.fromkeys(THREAD_VARIABLES, str(num_threads))


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it allocates next.

    A step on CPU frees and allocates the same tensors again and again. glibc gives some back to the system meanwhile,
    by chance more or fewer, and every page that comes anew is cleared first. Without glibc nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        for parameter, value in _KEEP.items():
            libc.mallopt(parameter, value)


def interface_of(address: str) -> str | None:
    """The network interface that owns an IPv4 address here; None where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def interface_variables(address: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for the interface that owns `address`; what the user set stays."""
    name = interface_of(address)
    wanted = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name else ()
    return {variable: name for variable in wanted if name and variable not in environ}


def hold_port(port: int = 0) -> socket.socket | None:
    """A socket bound to a port (0: a free one) but not listening; None when the port is in use.

    While it is open the system gives the port to nobody by chance, and torch's store, which sets SO_REUSEADDR too,
    can still listen on it.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind(("", port))
    except OSError:
        held.close()
        return None
    return held

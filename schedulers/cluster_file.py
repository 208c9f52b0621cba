"""A cluster that is not here: "4x8xH200", or a TOML file of hosts and links.

[[hosts]]
name = "a"
kind = "H200"
devices = 8            # or speeds = [1.0, 0.5]: relative, one for each device
memory_gb = 141        # absent: the kind's
[links]
local = "300GB/s"      # inside a host; absent: the kind's
across = "200Gbit/s"   # out of a host
local_latency_s = 1e-5
across_latency_s = 3e-5
occupancy = 0.0        # part of an overlapped transfer that is taken from compute
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from anabranch.schedulers.cluster import Cluster, Device, Link
from anabranch.schedulers.device_table import device_kind, local_link
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.wording import did_you_mean, quote, shown

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_ACROSS_LATENCY_S = 3e-5
_MOST_DEVICES = 10_000
_HOST = {"name": str, "kind": str, "devices": int, "speeds": list, "memory_gb": (int, float)}
_LINKS = {
    "local": str,
    "across": str,
    "local_latency_s": (int, float),
    "across_latency_s": (int, float),
    "occupancy": (int, float),
}


def parse_bandwidth(text: str) -> float:
    """Bytes a second of "200Gbit/s", "25GB/s", "100 Mbit/s". Raises PlanError."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([kKMGT]?)(bit|b|B)(?:/s|ps)\s*", text)
    if not found or found[1].count(".") > 1 or not found[1].strip(".") or float(found[1]) <= 0:
        raise PlanError(f'{quote(text)} is no bandwidth: write it as "200Gbit/s" or "25GB/s"')
    return float(found[1]) * _UNITS[found[2].lower()] / (1 if found[3] == "B" else 8)


def parse_devices(text: str, interconnect: str = "") -> Cluster:
    """The cluster of "4x8xH200" (hosts × devices × kind) or "8xH200" (one host).

    interconnect: the bandwidth out of a host, needed for several hosts. Raises PlanError.
    """
    found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(\d+)\s*x\s*([^\s].*?)\s*", text)
    if not found or int(found[1] or 1) < 1 or int(found[2]) < 1:
        raise PlanError(f'{quote(text)} names no devices: write hosts x devices x kind, as in "4x8xH200"')
    num_hosts, num_devices, kind = int(found[1] or 1), int(found[2]), device_kind(found[3])
    if num_hosts > 1 and not interconnect:
        raise PlanError(f'{quote(text)} has {num_hosts} hosts: give the link between them, as in "200Gbit/s"')
    devices = tuple(
        Device(f"host{host}", index, kind.name, kind.memory_bytes)
        for host in range(num_hosts)
        for index in range(num_devices)
    )
    across = Link(_ACROSS_LATENCY_S, parse_bandwidth(interconnect)) if interconnect else None
    return Cluster(devices, local_link(kind), across)


def read_cluster(path: str | Path) -> Cluster:
    """Read a cluster file. Raises PlanError, with the file, for what is missing, unknown or wrong."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot read the cluster file: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not valid TOML: {error}") from None
    try:
        return _cluster(content)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def _cluster(content: dict[str, Any]) -> Cluster:
    _check(content, {"hosts": list, "links": dict}, "a cluster file")
    hosts, links = content.get("hosts", []), content.get("links", {})
    if not hosts or not all(isinstance(host, dict) for host in hosts):
        raise PlanError('it has no hosts: add tables, [[hosts]] with name = "a", kind = "H200", devices = 8')
    _check(links, _LINKS, "[links]")
    devices: list[Device] = []
    for host in hosts:
        _check(host, _HOST, "[[hosts]]")
        missing = [key for key in ("name", "kind") if not host.get(key)]
        if missing or ("devices" in host) == ("speeds" in host):
            raise PlanError(
                f"[[hosts]] needs name, kind, and either devices or speeds; it has {', '.join(host)}"
            )
        if host.get("devices", 0) > _MOST_DEVICES:
            raise PlanError(
                f"host {quote(host['name'])} has {shown(host['devices'])} devices: at most {_MOST_DEVICES}"
            )
        speeds = host.get("speeds", [1.0] * host.get("devices", 0))
        if not speeds or not all(isinstance(speed, int | float) and speed > 0 for speed in speeds):
            raise PlanError(
                f"host {quote(host['name'])} has speeds {shown(speeds)}: give a positive number for each"
            )
        kind = device_kind(host["kind"])
        memory = int(host["memory_gb"] * 1e9) if "memory_gb" in host else kind.memory_bytes
        devices += [Device(host["name"], i, kind.name, memory, speed) for i, speed in enumerate(speeds)]
    occupancy = links.get("occupancy", 0.0)
    local, across = local_link(device_kind(devices[0].kind)), None
    bandwidth = parse_bandwidth(links["local"]) if "local" in links else local.bandwidth_bytes_per_s
    local = Link(links.get("local_latency_s", local.latency_s), bandwidth, occupancy)
    if "across" in links:
        latency = links.get("across_latency_s", _ACROSS_LATENCY_S)
        across = Link(latency, parse_bandwidth(links["across"]), occupancy)
    elif len({device.host for device in devices}) > 1:
        raise PlanError('several hosts and no link between them: add [links] with across = "200Gbit/s"')
    return Cluster(tuple(devices), local, across)


def _check(table: dict[str, Any], keys: dict[str, Any], what: str) -> None:
    for key, value in table.items():
        if key not in keys:
            raise PlanError(
                f"{what} has no key {quote(key[:200])}{did_you_mean(key, keys)}; it has {', '.join(keys)}"
            )
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            raise PlanError(f"{key} is {shown(value)}: see the example in schedulers/README.md")

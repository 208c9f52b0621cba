"""Made-up networks and clusters of any size, to time the search."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from anabranch.schedulers.cluster import Cluster, Device, Link
from anabranch.schedulers.costs import Batch, Costs, Curve, ElementCost, ModelCosts, ParameterBytes, Work
from anabranch.schedulers.model_spec import BlockSpec, ModelSpec
from anabranch.schedulers.request import Request


def synthetic_request(
    num_blocks: int,
    num_devices: int,
    *,
    devices_per_host: int = 8,
    num_branches: int = 8,
    num_stages: int = 4,
    memory_bytes: int | None = None,
    seed: int = 0,
) -> Request:
    """A network of stages of alike blocks on hosts of alike devices.

    Early stages have much data and few parameters, late ones the reverse, so that splits are mixed. The
    batch is four samples for each device.
    """
    random = Random(seed)
    names, elements = [], dict[str, ElementCost]()
    stages = [_block(random, stage, num_stages, num_branches) for stage in range(num_stages)]
    for block in range(num_blocks):
        stage = block * num_stages // num_blocks
        name = f"stage{stage + 1}.block{block + 1}"
        names.append(name)
        elements[name] = stages[stage]
    edge = ElementCost(_work(1e-5), input_bytes=stages[-1].input_bytes, parameters=ParameterBytes(2**16))
    costs = ModelCosts("synthetic", {"stem": edge, **elements, "head": edge}, step_s=1e-3)
    hosts = range(-(-num_devices // devices_per_host))
    devices = [Device(f"host{host}", i, "synthetic") for host in hosts for i in range(devices_per_host)]
    devices = [replace(device, memory_bytes=memory_bytes) for device in devices[:num_devices]]
    return Request(
        ModelSpec(tuple(BlockSpec(name, num_branches) for name in names)),
        Cluster(tuple(devices), Link(1e-5, 2e11), Link(3e-5, 2.5e10)),
        costs=Costs((costs,)),
        batch=Batch(4 * num_devices, 4),
    )


def _work(seconds: float, saved: float = 1e5) -> Work:
    return Work(
        Curve.line(seconds, seconds),
        Curve.line(seconds, 2 * seconds),
        Curve.line(0.0, saved),
        Curve.line(0.0, 1.5 * saved),
    )


def _block(random: Random, stage: int, num_stages: int, num_branches: int) -> ElementCost:
    depth = (stage + 1) / num_stages
    seconds = 2e-5 * random.uniform(0.5, 2.0)
    one = _work(seconds, 2e5 * (1.2 - depth))
    branches = tuple(
        Work(*(Curve(tuple((x, y * j) for x, y in curve.points)) for curve in vars(one).values()))
        for j in range(1, num_branches + 1)
    )
    data = 4e6 / 4 ** (3 * depth) * random.uniform(0.5, 1.5)
    owned = int(2**15 * 4 ** (4 * depth) * random.uniform(0.5, 1.5))
    parameters = ParameterBytes(2**12, (owned,) * num_branches)
    return ElementCost(_work(seconds / 4), branches, False, data, data, data, parameters)

"""Costs without hardware: a roofline from multiplications, bytes and data sheets. Predicted, not calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from anabranch.schedulers.costs import PREDICTED, Costs, Curve, ElementCost, ModelCosts, ParameterBytes, Work
from anabranch.schedulers.device_table import SUSTAINED_BYTES, SUSTAINED_FLOPS, DeviceKind, device_kind


@dataclass(frozen=True)
class PartShape:
    """What a part of an element does: multiply-adds and activation bytes of a sample forward; kernels."""

    macs: float = 0.0
    activation_bytes: float = 0.0
    kernels: int = 4


@dataclass(frozen=True)
class ElementShape:
    """Stem, head or a block: what every rank that runs it does, and each branch. The rest as in ElementCost."""

    replicated: PartShape
    branches: tuple[PartShape, ...] = ()
    sum_bytes: float = 0.0
    hidden_bytes: float = 0.0
    input_bytes: float = 0.0
    parameters: ParameterBytes = field(default_factory=ParameterBytes)


def analytic_costs(
    shapes: Mapping[str, ElementShape],
    kinds: tuple[str, ...],
    *,
    shared: Mapping[str, ParameterBytes] | None = None,
    precision: Literal["fp32", "half"] = "fp32",
    fused: bool = True,
) -> Costs:
    """A network on kinds of devices. fused: alike branches run as one, with one branch's kernels.

    A part of a pass takes the longer of its multiply-adds and its memory traffic at sustained rates, plus its
    kernels' launches; backward is two forwards. Raises PlanError for an unknown kind.
    """
    models = []
    for name in kinds:
        kind = device_kind(name)
        alike: dict[ElementShape, ElementCost] = {}
        for shape in shapes.values():
            if shape not in alike:
                alike[shape] = _element(shape, kind, precision, fused)
        elements = {element: alike[shape] for element, shape in shapes.items()}
        per_byte = 5 / (kind.bytes_per_s * SUSTAINED_BYTES)  # parameter, gradient, momentum: read or written
        key = {"device": name, "precision": precision, "source": "data sheet"}
        models.append(
            ModelCosts(name, elements, dict(shared or {}), 1e-4, per_byte, label=PREDICTED, key=key)
        )
    return Costs(tuple(models))


def _element(shape: ElementShape, kind: DeviceKind, precision: str, fused: bool) -> ElementCost:
    unequal = len({*shape.branches}) > 1
    branches: list[PartShape] = [*shape.branches]
    if branches and not unequal:
        one = branches[0]
        branches = [
            PartShape(one.macs * j, one.activation_bytes * j, one.kernels * (1 if fused else j))
            for j in range(1, len(branches) + 1)
        ]
    return ElementCost(
        _work(shape.replicated, kind, precision),
        tuple(_work(part, kind, precision) for part in branches),
        unequal,
        shape.sum_bytes,
        shape.hidden_bytes,
        shape.input_bytes,
        shape.parameters,
    )


def _work(part: PartShape, kind: DeviceKind, precision: str) -> Work:
    flops = kind.fp32_flops if precision == "fp32" else kind.half_flops
    compute_s = 2 * part.macs / (flops * SUSTAINED_FLOPS)
    traffic_s = 2 * part.activation_bytes / (kind.bytes_per_s * SUSTAINED_BYTES)  # written once, read once
    each, launches = max(compute_s, traffic_s), part.kernels * kind.launch_s
    saved = Curve.line(0.0, part.activation_bytes)
    peak = Curve.line(0.0, 2 * part.activation_bytes)  # gradients of what is kept
    return Work(Curve.line(launches, each), Curve.line(2 * launches, 2 * each), saved, peak)

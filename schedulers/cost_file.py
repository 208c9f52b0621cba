"""Costs as a JSON file, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from anabranch.schedulers.costs import Costs, Curve, ElementCost, GroupCost, ModelCosts, ParameterBytes, Work
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.wording import shown

_SCHEMA = 4  # since reduce-scatters are measured


def write_costs(costs: Costs, path: str | Path) -> None:
    """Write the costs."""
    Path(path).write_text(format_costs(costs), encoding="utf-8", newline="\n")


def format_costs(costs: Costs) -> str:
    """What is in a cost file; alike elements are there once."""
    models = []
    for model in costs.models:
        kinds = {element: index for index, element in enumerate(dict.fromkeys(model.elements.values()))}
        content = {name: value for name, value in vars(model).items() if name != "elements"}
        content["shared"] = {name: asdict(parameters) for name, parameters in model.shared.items()}
        content["key"] = dict(model.key)
        content["alike"] = [asdict(element) for element in kinds]
        content["elements"] = {name: kinds[element] for name, element in model.elements.items()}
        models.append(content)
    whole = {"schema": _SCHEMA, "models": models, "groups": [asdict(group) for group in costs.groups]}
    return json.dumps(whole, indent=1) + "\n"


def read_costs(path: str | Path) -> Costs:
    """Read a cost file. Raises PlanError when it is missing, torn or not one."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise PlanError(f"{path}: cannot read the cost file: {error.strerror}") from None
    return parse_costs(text, path)


def parse_costs(text: str | bytes, path: str | Path) -> Costs:
    """The costs in a file's text (UTF-8); path: for errors. Raises PlanError where it is torn or not one's."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not a cost file (no valid JSON: {error}): measure again") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != _SCHEMA:
        raise PlanError(
            f"{path}: not a cost file of schema {_SCHEMA} (schema is {shown(schema)}): measure again"
        )
    try:
        return Costs(
            tuple(map(_model, content["models"])),
            tuple(GroupCost(**{**group, "seconds": _curve(group["seconds"])}) for group in content["groups"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(
            f"{path}: a damaged cost file ({type(error).__name__}: {error}): measure again"
        ) from None


def _model(content: Mapping[str, Any]) -> ModelCosts:
    alike = [_element(element) for element in content["alike"]]
    rest = {name: value for name, value in content.items() if name not in ("alike", "elements", "shared")}
    return ModelCosts(
        **{**rest, "batch_sizes": tuple(rest["batch_sizes"])},
        elements={name: alike[index] for name, index in content["elements"].items()},
        shared={name: _parameters(parameters) for name, parameters in content["shared"].items()},
    )


def _element(content: Mapping[str, Any]) -> ElementCost:
    return ElementCost(
        **{
            **content,
            "replicated": _work(content["replicated"]),
            "branches": tuple(map(_work, content["branches"])),
            "parameters": _parameters(content["parameters"]),
        }
    )


def _work(content: Mapping[str, Any]) -> Work:
    return Work(**{name: _curve(curve) for name, curve in content.items()})


def _curve(content: Mapping[str, Any]) -> Curve:
    return Curve(tuple((float(x), float(y)) for x, y in content["points"]))


def _parameters(content: Mapping[str, Any]) -> ParameterBytes:
    return ParameterBytes(content["replicated"], tuple(content["branches"]))

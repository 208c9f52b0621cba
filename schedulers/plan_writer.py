"""Writing a plan as a file that a person can read, and `read_plan` reads back as the same plan."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from glob import escape
from itertools import groupby
from pathlib import Path

from anabranch.schedulers.plan import BranchPlacement, EdgeSplit, Plan
from anabranch.schedulers.plan_file import BlockRule, PinRule, PlanFile
from anabranch.schedulers.wording import lists


def format_plan(plan: Plan, pins: Iterable[PinRule] = (), *, filled_in: bool = False) -> str:
    """The plan as TOML. Blocks placed alike have one rule where a glob is for exactly them, else one each.

    pins: that the plan was made with, so that they hold when it is changed. filled_in: nobody asked for its devices.
    """
    return format_plan_file(
        PlanFile(
            plan.data,
            plan.branch,
            tuple(_rules(plan)),
            plan.devices,
            plan.samples,
            plan.scheduler,
            pins=tuple(pins),
            filled_in=filled_in,
        )
    )


def format_plan_file(file: PlanFile) -> str:
    """A plan file as TOML, a partial one too: `parse_plan` reads the same rules and pins back."""
    lines = ["[mesh]", f"data = {file.data}", f"branch = {file.branch}"]
    if file.devices is not None:
        rows = ["[" + ", ".join(map(_string, row)) + "]" for row in file.devices]
        one_line = f"devices = [{', '.join(rows)}]"
        lines += (
            [one_line] if len(one_line) <= 100 else ["devices = [", *(f"    {row}," for row in rows), "]"]
        )
        if file.filled_in:
            lines.append(
                "filled_in = true  # any GPUs of these hosts; other devices where these are not there"
            )
    if file.samples is not None:
        lines.append(f"samples = {list(file.samples)}")
    if file.scheduler is not None:
        lines.append(f"scheduler = {_string(file.scheduler)}")
    for rule in file.rules:
        lines += ["", "[[blocks]]", f"match = {_string(rule.match)}", f"split = {_string(rule.split)}"]
        if rule.counts is not None:
            lines.append(f"counts = {list(rule.counts)}")
        elif rule.branches == "even":
            lines.append('branches = "even"')
        elif isinstance(rule.branches, tuple):
            lines.append(f"branches = {lists(rule.branches)}")
    for pin in file.pins:
        lines += ["", "[[pins]]", f"match = {_string(pin.match)}", f"branch = {pin.branch}"]
        lines.append(f"host = {_string(pin.host)}")
    return "\n".join(lines) + "\n"


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write the plan as a file; see `format_plan`."""
    Path(path).write_text(format_plan(plan), encoding="utf-8", newline="\n")


def _rules(plan: Plan) -> Iterable[BlockRule]:
    elements: dict[str, BranchPlacement | EdgeSplit] = {"stem": plan.stem, **plan.blocks, "head": plan.head}
    names = list(elements)
    placements = set(plan.blocks.values())
    if len(placements) == 1:  # one rule for all, if it does not also catch a stem or head that differs
        placement = placements.pop()
        rule = _rule("*", placement)
        edges = [name for name in ("stem", "head") if name not in rule.elements(names)]
        if placement.split == "branch" or plan.stem == plan.head == "sample":
            yield from (_edge_rule(name, plan) for name in edges)
            yield rule
            return
    yield _edge_rule("stem", plan)
    for (placement, group), run in groupby(
        plan.blocks, lambda name: (plan.blocks[name], name.rpartition(".")[0])
    ):
        members = list(run)
        glob = _rule(f"{escape(group)}.*", placement)
        if len(members) > 1 and glob.elements(names) == members:
            yield glob
        else:
            yield from (_rule(escape(name), placement) for name in members)
    yield _edge_rule("head", plan)


def _edge_rule(name: str, plan: Plan) -> BlockRule:
    return BlockRule(name, plan.stem if name == "stem" else plan.head)


def _rule(match: str, placement: BranchPlacement) -> BlockRule:
    if placement.branches is None:
        return BlockRule(match, placement.split)
    counts = _counts(placement.branches)
    return BlockRule(match, placement.split, branches=None if counts else placement.branches, counts=counts)


def _counts(branches: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
    """The counts that say the same as the branches, if these are in order over the ranks."""
    counts = tuple(map(len, branches))
    return counts if BranchPlacement.from_counts(counts).branches == branches else None


def _string(text: str) -> str:
    """A TOML basic string: JSON's, but DEL is escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

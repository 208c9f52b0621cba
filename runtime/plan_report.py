"""Plans and what they cost, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from anabranch.schedulers import ModelSpec, Plan
from anabranch.schedulers.costs import Batch
from anabranch.schedulers.explain import StageRow

_MIB = 2**20


def print_candidates(console: Console, outcome: Mapping[str, Any]) -> None:
    """The plans that were compared: predicted and measured step, against data parallelism, memory."""
    label = outcome["label"]
    table = Table(box=None, pad_edge=False)
    columns = ("plan", f"predicted ({label})", "exposed", "measured", "÷ data parallelism", "error", "memory")
    for column in columns:
        table.add_column(column, justify="left" if column == "plan" else "right")
    for row in outcome["plans"]:
        measured, ratio, error = "", "", ""
        if "measured_step_s" in row:
            measured = _ms(row["measured_step_s"])
            if "ratio" in row:
                low, high = row["interval_95"]
                ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
            error = f"{100 * row['error']:+.0f} %"
        mark = " ◄" if row["name"] == outcome["chosen"] else ""
        table.add_row(
            row["name"] + mark,
            _ms(row["predicted_step_s"]),
            _ms(row["exposed_s"]),
            measured,
            ratio,
            error,
            f"{max(row['memory_bytes']) / _MIB:,.0f} MiB",
        )
    console.print(table)
    proven = (
        "the best under its prediction"
        if not outcome["gap"]
        else f"within {100 * outcome['gap']:.1f} % of the best"
    )
    console.print(f"searched {outcome['search_s']:.2f} s; {proven}", highlight=False)
    for note in outcome["notes"]:
        console.print(f"note: {note}", highlight=False)


def print_traffic(console: Console, traffic: Sequence[Mapping[str, Any]]) -> None:
    """Bytes that one group puts through each collective in a step."""
    for row in traffic:
        where = "across hosts" if row["across"] else "inside a host"
        console.print(
            f"{row['axis']} {row['collective']} {where}: {row['num_bytes'] / _MIB:,.1f} MiB a step",
            highlight=False,
        )


def print_picture(console: Console, plan: Plan, model: ModelSpec) -> None:
    """Blocks × branch ranks: ░ a part of the samples, else how many of the block's branches the rank holds."""
    most = max(block.num_branches for block in model.blocks)
    width = len(str(most))
    console.print(
        f"\nblocks → ({len(model.blocks)}); one line a branch rank, the same in {plan.data} replicas"
    )
    for rank in range(plan.branch):
        cells = []
        for block in model.blocks:
            placed = plan.blocks[block.name].branches
            cells.append("░" * width if placed is None else str(len(placed[rank]) or "·").rjust(width))
        console.print(f"{rank:>4}  " + " ".join(cells), highlight=False, soft_wrap=True)
    console.print("      ░ samples split   n branches held   · none\n", highlight=False)


def print_explanation(console: Console, stages: Sequence[StageRow], batch: Batch) -> None:
    """When which split pays, by stage."""
    if not stages:
        console.print("nothing to explain: every branch group is one rank", highlight=False)
        return
    table = Table(box=None, pad_edge=False)
    for column in (
        "stage",
        "split",
        "samples split",
        "branches split",
        "samples pay from batch",
        "branches pay",
    ):
        table.add_column(column)
    for stage in stages:
        even = stage.break_even_batch
        table.add_row(
            stage.stage,
            stage.split,
            _ms(stage.sample_s),
            _ms(stage.branch_s),
            "never seen" if even is None else "any" if even == 0 else str(even),
            _bandwidths(stage.needed_bytes_per_s, stage.most_bytes_per_s),
        )
    console.print(table)
    console.print(
        f"step times with that stage split so, all else as planned; batch {batch.num_samples}",
        highlight=False,
    )


def _bandwidths(least: float | None, most: float | None) -> str:
    """Of the branch groups' link, bytes a second from and up to which something pays, as `StageRow` has them."""
    if least is None:
        return "at no bandwidth"
    if most is not None:
        return f"up to {8e-9 * most:,.2f} Gbit/s"
    return f"from {8e-9 * least:,.2f} Gbit/s" if least else "at any bandwidth"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"

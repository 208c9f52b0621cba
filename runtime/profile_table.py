"""A profile in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_MOST_ROWS = 40
_MOST_CLOCK_ERROR_S = 1e-3  # else it is told
_SHORT = {"exchange": "exch.", "reduction": "reduce", "optimizer": "optim."}


def print_profile(console: Console, profile: Mapping[str, Any]) -> None:
    """Where the step goes by rank and by element, who is waited for, and what to do about it."""
    steps = profile["steps"]
    step_s = steps["step_s"]
    console.print(
        f"step {ms(step_s['p50'])} ms (95 % of steps: up to {ms(step_s['p95'])} ms), {steps['measured']} steps after "
        f"{steps['warm_up']} to warm up{left_out(steps)}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_ranks(profile["ranks"]))
    console.print(_times(profile["elements"]))
    console.print(_over_steps(profile["elements"]))
    console.print(_rates(profile["elements"]))
    for line in lines(profile):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def lines(profile: Mapping[str, Any]) -> list[str]:
    """What a table cannot say, a sentence each."""
    said = [_straggler(one) for one in profile["stragglers"][:3] if one["share"] >= 0.01]
    said = said or ["no rank is waited for more than 1 % of the step"]
    if suggestion := profile["suggestion"]:
        said.append(
            f"suggestion: {suggestion['text']} ({ms(suggestion['now_s'])} → {ms(suggestion['predicted_s'])} ms)"
        )
    if prediction := profile["prediction"]:
        measured, total = profile["steps"]["step_s"]["p50"], prediction["total_s"]
        off = 100 * (total / measured - 1)
        said.append(
            f"predicted (costs {prediction['source']}) {ms(total)} ms, measured {ms(measured)} ms: {off:+.0f} %"
        )
    overhead = profile["overhead"]
    for kind, what in (("light", "always on"), ("detailed", "this profile")):
        low, _, high = (100 * (ratio - 1) for ratio in overhead["measured"][kind])
        said.append(
            f"recording, {what}: {overhead['records'][kind]} records x {1e6 * overhead['record_s']:.1f} µs + "
            f"{1e6 * overhead['told_s']:.0f} µs to tell = "
            f"{100 * overhead['share'][kind]:.2f} % of the step (against steps without recording, 95 %: "
            f"{low:+.1f} to {high:+.1f} %)"
        )
    on_gpus = [rank for rank in profile["ranks"] if rank["device"].startswith("cuda")]
    if on_gpus:
        idlest = max(on_gpus, key=lambda rank: rank["gap_s"])
        said.append(
            f"kernels a step: {_range([rank['kernels'] for rank in on_gpus], 'd')}; the host leaves rank "
            f"{idlest['rank']}'s GPU idle for {ms(idlest['gap_s'])} ms"
        )
    late = max(profile["ranks"], key=lambda rank: rank["clock_error_s"])
    if late["clock_error_s"] > _MOST_CLOCK_ERROR_S:
        said.append(
            f"the clock of rank {late['rank']} is known to {ms(late['clock_error_s'])} ms only: what is transfer and "
            "what is wait is as uncertain (a busy machine: profile again)"
        )
    worst = max(profile["ranks"], key=lambda rank: abs(rank["unattributed"]))
    said.append(
        f"unattributed: at most {100 * abs(worst['unattributed']):.2f} % of the step (rank {worst['rank']})"
    )
    return said


def left_out(steps: Mapping[str, Any]) -> str:
    """How many steps had other sizes than most, in words."""
    odd = steps["measured"] - steps["regular"]
    return f"; {odd} of another size left out" if odd else ""


def ms(seconds: float) -> str:
    """Milliseconds with three digits or so."""
    value = 1e3 * seconds
    return (
        "0"
        if value < 0.0005
        else f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"
    )


def _straggler(one: Mapping[str, Any]) -> str:
    held, branches = ", ".join(map(str, one["branches"])), ""
    if held:
        branches = (
            f" (it holds {'branch' if len(one['branches']) == 1 else 'branches'} {held}{_slowest(one)})"
        )
    where = f"{one['part']} of {one['element']}" if one["element"] else one["part"]
    return (
        f"rank {one['rank']} ({one['host']} {one['device']}) is waited for in {where}{branches}: rank {one['waiting']} "
        f"waits {ms(one['wait_s'])} ms ({100 * one['share']:.1f} % of the step)"
    )


def _slowest(one: Mapping[str, Any]) -> str:
    seconds = one["branches_s"]
    if not seconds:
        return ""
    if one["branch"] is None:
        return f", alike: {ms(min(seconds))} to {ms(max(seconds))} ms alone"
    rest = [ms(s) for branch, s in zip(one["branches"], seconds, strict=True) if branch != one["branch"]]
    return (
        f": the slowest is branch {one['branch']}, {ms(max(seconds))} ms alone, the others {', '.join(rest)}"
    )


def _ranks(ranks: Sequence[Mapping[str, Any]]) -> Table:
    parts = list(ranks[0]["parts"])
    table = _table(
        "ms a step", "rank", *(_SHORT.get(part, part) for part in parts), "rest", "step (95 %)", "memory"
    )
    for rank in ranks:
        table.add_row(
            str(rank["rank"]),
            *(ms(rank["parts"][part]["p50"]) for part in parts),
            f"{100 * rank['unattributed']:.1f} %",
            _spread(rank["step_s"]),
            f"{rank['memory_bytes'] / 2**20:.0f} MiB",
        )
    return table


def _times(elements: Sequence[Mapping[str, Any]]) -> Table:
    names = ("forward", "backward", "transfer", "wait")
    table = _table("ms a step, least–middle–most of the ranks", "block", *names)
    for element in elements[:_MOST_ROWS]:
        table.add_row(element["name"], *(span(element["over"][f"{what}_s"]) for what in names))
    if len(elements) > _MOST_ROWS:
        table.add_row(f"… {len(elements) - _MOST_ROWS} more in profile.json")
    return table


def _over_steps(elements: Sequence[Mapping[str, Any]]) -> Table:
    """Of the rank whose middle is the longest."""
    names = ("forward", "backward", "transfer", "wait")
    table = _table("ms a step of the slowest rank, middle of the steps (95 % of them)", "block", *names)
    for element in elements[:_MOST_ROWS]:
        slowest = (
            max((row[f"{name}_s"] for row in element["ranks"]), key=lambda s: s["p50"]) for name in names
        )
        table.add_row(element["name"], *map(_spread, slowest))
    return table


def _spread(values: Mapping[str, float]) -> str:
    return f"{ms(values['p50'])} ({ms(values['p95'])})"


def _rates(elements: Sequence[Mapping[str, Any]]) -> Table:
    title = "exchanged, rates, share of a matrix product's, kernels, ms between them"
    table = _table(title, "block", "MB", "MB/s", "GFLOP/s", "used", "kernels", "gaps")
    for element in elements[:_MOST_ROWS]:
        rows = element["ranks"]
        table.add_row(
            element["name"],
            f"{max(row['bytes'] for row in rows) / 1e6:.2f}",
            _range([row["bytes_per_s"] / 1e6 for row in rows], ".0f"),
            _range([row["flops_per_s"] / 1e9 for row in rows], ".1f"),
            _range([100 * row["utilisation"] for row in rows], ".0f") + " %",
            _range([row["kernels"] for row in rows], "d"),
            ms(max(row["gap_s"] for row in rows)),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def span(values: Mapping[str, float]) -> str:
    """least–middle–most in milliseconds; one number where they are alike."""
    texts = [
        ms(values[key]) if values[key] >= 1e-4 else f"{1e3 * values[key]:.2f}"
        for key in ("min", "median", "max")
    ]
    return texts[0] if len({*texts}) == 1 else "–".join(texts)


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}–{high}"

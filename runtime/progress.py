"""What a person sees of a run: the placement, a line that moves, and plain lines where output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from anabranch.runtime.run_record import RunRecord
from anabranch.schedulers import ModelSpec, Plan

_LINE_S = 5.0  # between plain lines
_NOTABLE = 0.05  # of a step: what is neither compute nor communication and takes that much is told


def print_placement(console: Console, plan: Plan, model: ModelSpec) -> None:
    """Which branches of which blocks run where, neighbouring blocks with one placement in one row."""
    ranks = [(d, b) for d in range(plan.data) for b in range(plan.branch)]
    table = Table(
        title=f"mesh {plan.data} x {plan.branch} (data x branch)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("block")
    table.add_column("split")
    for d, b in ranks:
        device = plan.devices[d][b] if plan.devices else ""
        table.add_column(f"rank {d * plan.branch + b}\n{device}")
    rows: list[tuple[list[str], tuple[str, ...]]] = [(["stem"], (plan.stem, *[""] * len(ranks)))]
    for block in model.blocks:
        placement = plan.blocks[block.name]
        held = [_branches(plan.held(block, b)) for _, b in ranks]
        cells = (placement.split, *held)
        if rows[-1][1] == cells:
            rows[-1][0].append(block.name)
        else:
            rows.append(([block.name], cells))
    rows.append((["head"], (plan.head, *[""] * len(ranks))))
    for names, cells in rows:
        table.add_row(names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", *cells)
    console.print(table)


def _branches(held: Sequence[int]) -> str:
    if not held:
        return "–"
    consecutive = list(held) == list(range(held[0], held[-1] + 1))
    return f"{held[0]}–{held[-1]}" if consecutive and len(held) > 2 else ", ".join(map(str, held))


class RunProgress:
    """Shows the workers' statuses and notes them in the run's record, if it has one.

    Its `watch` is called about once a second with all of them. stopped: set by whoever has the result, see
    `RunRecord.close`.
    """

    stopped: str | None = None

    def __init__(self, console: Console, what: str, record: RunRecord | None = None) -> None:
        self._console, self._what, self._record = console, what, record
        self._live = console.is_terminal and not console.quiet
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
        ]  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not self._live)
        self._task: TaskID | None = None
        self._warned: set[str] = set()
        self._phase: tuple[str | None, int, float] = (None, 0, 0.0)  # its name, first step seen, and when
        self._said, self._said_at, self._started = "", 0.0, time.monotonic()

    def __enter__(self) -> RunProgress:
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=None, figures="starting")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._bar.stop()
        if self._record:
            self._record.close(error, self.stopped)

    def watch(self, statuses: Sequence[Mapping[str, Any]]) -> str | None:
        """Shows the first rank's figures, and whoever is behind it; "stop" where `anabranch stop` asked for it."""
        if statuses:
            self._show(statuses)
        return self._record.watch(statuses) if self._record else None

    def _show(self, statuses: Sequence[Mapping[str, Any]]) -> None:
        first = statuses[0]
        for warning in dict.fromkeys(status["warning"] for status in statuses if status.get("warning")):
            if warning not in self._warned:
                self._warned.add(warning)
                self._console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
        figures = _figures(first)
        assert self._task is not None, "entered"
        if total := first.get("num_steps"):
            self._bar.update(self._task, total=total, completed=first.get("step", 0))
        self._bar.update(
            self._task, description=f"{self._what}: {first.get('phase', 'starting')}", figures=figures
        )
        if not self._live and time.monotonic() - self._said_at >= _LINE_S:
            line = f"{self._what}: {first.get('phase', 'starting')} {figures}{self._left(first)}".rstrip()
            if line != self._said:
                self._console.print(line, highlight=False, soft_wrap=True)
            self._said, self._said_at = line, time.monotonic()

    def _left(self, status: Mapping[str, Any]) -> str:
        step, total, step_s = status.get("step", 0), status.get("num_steps"), status.get("step_time_s")
        if not total:
            return ""
        if not step_s:  # measuring, timing, comparing: as fast as since the phase began
            phase, now = status.get("phase"), time.monotonic()
            if phase != self._phase[0]:
                self._phase = (phase, step, now)
            _, begun_at, begun = self._phase
            if step <= begun_at:
                return ""
            step_s = (now - begun) / (step - begun_at)
        return f", {(total - step) * step_s:.0f} s left"


def _figures(status: Mapping[str, Any]) -> str:
    parts = []
    if "num_steps" in status:
        parts.append(f"step {status.get('step', 0)}/{status['num_steps']}")
    if "num_epochs" in status and "epoch" in status:
        parts.append(f"epoch {status['epoch'] + 1}/{status['num_epochs']}")
    if "loss" in status:
        loss = status["loss"]
        parts.append("loss not finite" if loss is None else f"loss {loss:.3f}")  # as run.json has it
    if "accuracy" in status:
        parts.append(f"accuracy {100 * status['accuracy']:.1f} %")
    if "test_accuracy" in status:
        parts.append(f"test {100 * status['test_accuracy']:.2f} %")
    if "images_per_s" in status:
        parts.append(f"{status['images_per_s']:.0f} images/s")
    if "step_time_s" in status:
        parts.append(f"{1e3 * status['step_time_s']:.0f} ms/step")
    if times := status.get("times_s"):
        whole = max(max(times["step"]), 1e-9)
        exposed = max(map(sum, zip(times["exchange"], times["reduction"], strict=True)))
        parts.append(f"{100 * exposed / whole:.0f} % communication")
        most, part = max((max(times.get(part, (0.0,))), part) for part in ("data", "optimizer", "idle"))
        if most >= _NOTABLE * whole:
            parts.append(f"{100 * most / whole:.0f} % {part}")
    if memory := status.get("memory_bytes"):
        parts.append(f"{max(memory) / 2**30:.1f} GiB")
    return ", ".join(parts)


def print_status(console: Console, status: Mapping[str, Any]) -> None:
    """What `anabranch status` says of a run."""
    where = f"process {status['pid']} on {status['host']}"
    heard = f"last heard of {status['silent_s']:.0f} s ago"
    console.print(f"{status['what']}: {status['state']} ({where}, {heard})", highlight=False, soft_wrap=True)
    steps = {name: status[name] for name in ("step", "num_steps") if status.get("num_steps")}
    figures = _figures({**status.get("metrics", {}), **steps})
    left = f", {status['left_s']:.0f} s left" if status.get("left_s") and status["alive"] else ""
    console.print(f"{status.get('phase', 'starting')} {figures}{left}", highlight=False, soft_wrap=True)
    if status.get("error"):
        console.print(status["error"], highlight=False, markup=False)
    if status["checkpoint"]:
        console.print(f"newest checkpoint: {status['checkpoint']}", highlight=False)

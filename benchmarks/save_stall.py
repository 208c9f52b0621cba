"""What a step pays for a checkpoint that is begun at it, against copying the state to the host's memory alone.

One process, and two CPU workers of one thread each with all blocks split by samples. In every round, in turn: a step; a
save and the step after it, beside which the state is written; the copy alone, of what a rank writes or has compared
with other ranks' copies. The stall is the save's call and what the step after it takes longer than a plain one. What
the call spends is timed inside it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from anabranch.benchmarks.record import RESULTS, write_record
from anabranch.benchmarks.steps import OurStep, images
from anabranch.benchmarks.workers import run_workers
from anabranch.blocks.multi_residual import MultiResidual
from anabranch.blocks.network import Network
from anabranch.runtime import checkpoints as saving
from anabranch.runtime.agreement import on_all_ranks
from anabranch.runtime.checkpoints import Checkpoints
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.intervals import median_interval
from anabranch.runtime.keyed_state import held_elsewhere_too, written_by_this_rank
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.pending_save import host_copies
from anabranch.schedulers import Plan
from anabranch.schedulers.plan import SAMPLE

_BLOCKS, _BRANCHES = 6, 2
_SIZE = 32


def run(
    *,
    rounds: int = 12,
    width: int = 2048,
    batch_size: int = 8,
    workers: tuple[int, ...] = (1, 2),
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Measures and writes the record; a row for each number of workers, rank 0's seconds.

    width: of the network's 12 square linear layers, a multiple of 1,024; 2,048: 50 M parameters, 201 MB, and as much of
    momentum. Checkpoints are written to the system's folder for temporary files. Raises ConfigError for another width.
    """
    if width % _SIZE**2:
        raise ConfigError(f"--width is {width}: give a multiple of {_SIZE**2:,}")
    rows = []
    for num in workers:
        with tempfile.TemporaryDirectory() as place:
            samples = run_workers(num, _measure, rounds, width, batch_size, place, threads=1, on_cpu=True)
        rows.append({"workers": num, **_figures(samples), **samples})
    record = {"width": width, "batch_size": batch_size, "rounds": rounds, "rows": rows}
    return {**record, "path": str(write_record("save_stall", record, folder))}


def _figures(samples: dict[str, Any]) -> dict[str, Any]:
    """Medians, and those of differences paired by round with their 95 % intervals."""
    plain, copy = samples["step_s"], samples["copy_s"]
    beside = [after - step for after, step in zip(samples["step_beside_s"], plain, strict=True)]
    stall = [call + more for call, more in zip(samples["save_s"], beside, strict=True)]
    figures = {
        "stall": stall,
        "copy": copy,
        "stall_less_copy": [a - b for a, b in zip(stall, copy, strict=True)],
        "call_less_copy": [a - b for a, b in zip(samples["save_s"], copy, strict=True)],
        "beside": beside,
    }
    found: dict[str, Any] = {}
    for name, values in figures.items():
        median, low, high = median_interval(values)
        found |= {f"{name}_median_s": median, f"{name}_interval_95_s": [low, high]}
    return found | {
        "step_median_s": statistics.median(plain),
        "written_median_s": statistics.median(samples["written_s"]),
        "parts_median_s": {part: statistics.median(values) for part, values in samples["parts_s"].items()},
    }


def _measure(rank: int, rounds: int, width: int, batch_size: int, place: str) -> dict[str, Any]:
    torch.manual_seed(0)
    network, world_size = _network(width), dist.get_world_size()
    names = [block.name for block in spec_of(network).blocks]
    plan = Plan(world_size, 1, dict.fromkeys(names, SAMPLE), "sample", "sample")
    step = OurStep(network, plan, *images(batch_size, width // _SIZE**2, _SIZE))
    checkpoints = Checkpoints(Path(place))
    samples: dict[str, list[float]] = {
        key: [] for key in ("step_s", "save_s", "step_beside_s", "written_s", "copy_s")
    }
    parts: dict[str, list[float]] = {key: [] for key in ("prepare", "copy", "agree", "rest")}
    number = 0

    def save() -> None:
        checkpoints.save(
            step.network, step.optimizer, position={"step": number}, config_toml="", plan_toml=""
        )

    def copy() -> None:
        host_copies(held_elsewhere_too(step.network) | written_by_this_rank(step.network, step.optimizer))

    def saved() -> None:
        nonlocal number
        number += 1
        with _timed_parts() as took:
            samples["save_s"].append(_seconds(save))
        took["rest"] = samples["save_s"][-1] - sum(took.values())
        for part, seconds in took.items():
            parts[part].append(seconds)
        begun = time.perf_counter()
        samples["step_beside_s"].append(_seconds(step, together=False))
        checkpoints.finish(step.network)
        samples["written_s"].append(time.perf_counter() - begun)

    sides: list[Callable[[], None]] = [
        lambda: samples["step_s"].append(_seconds(step)),
        saved,
        lambda: samples["copy_s"].append(_seconds(copy)),
    ]
    step()
    step()
    for side in sides:  # the first save also clears the folder up
        side()
    for values in (*samples.values(), *parts.values()):
        values.clear()
    for index in range(rounds):
        for turn in range(len(sides)):
            sides[(index + turn) % len(sides)]()
    num_bytes = sum(
        t.numel() * t.element_size() for t in written_by_this_rank(step.network, step.optimizer).values()
    )
    return {"num_bytes": num_bytes, **samples, "parts_s": parts}


def _network(width: int) -> nn.Module:
    blocks = {
        f"block{number}": MultiResidual([nn.Linear(width, width) for _ in range(_BRANCHES)])
        for number in range(1, _BLOCKS + 1)
    }
    shape = (width // _SIZE**2, _SIZE, _SIZE)
    return Network(nn.Flatten(), {"stage1": blocks}, nn.Linear(width, 10), input_shape=shape)


def _seconds(work: Callable[[], object], together: bool = True) -> float:
    """Of this rank; together: all ranks begin at once."""
    if together:
        dist.barrier()
    begun = time.perf_counter()
    work()
    if torch.cuda.is_initialized():  # its workers are on CPUs
        torch.cuda.synchronize()
    return time.perf_counter() - begun


@contextmanager
def _timed_parts() -> Iterator[dict[str, float]]:
    """Seconds of the parts of a save's call. agree: the ranks tell each other, and wait for the slowest."""
    took = dict.fromkeys(("prepare", "copy", "agree"), 0.0)

    def timed(part: str, work: Callable[..., Any], within: tuple[str, ...] = ()) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begun, before = time.perf_counter(), sum(took[each] for each in within)
            try:
                return work(*args, **kwargs)
            finally:
                inside = sum(took[each] for each in within) - before
                took[part] += time.perf_counter() - begun - inside

        return wrapped

    with (
        mock.patch.object(Checkpoints, "_prepare", timed("prepare", Checkpoints._prepare)),
        mock.patch.object(saving, "_copied", timed("copy", saving._copied)),
        mock.patch.object(saving, "on_all_ranks", timed("agree", on_all_ranks, ("prepare", "copy"))),
    ):
        yield took

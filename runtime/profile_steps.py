"""What `anabranch profile` does on every rank: real training steps, recorded in detail, gathered on rank 0.

single branches │ warm-up │ clocks │ N detailed steps │ clocks │ off, light, detailed in turn │ one counted │ one traced
                          └──────────── these are the profile ┘   what recording costs          FLOPs         kernels
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from anabranch.runtime.countdown import countdown
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.exchange import all_gather
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.profile_branches import branch_seconds
from anabranch.runtime.profile_clock import ClockOffset, aligned, clock_offset
from anabranch.runtime.profile_flops import ElementFlops
from anabranch.runtime.profile_kernels import kernels_of, shortened, traced
from anabranch.runtime.profile_loop import StepLoop, overhead_seconds, record_seconds
from anabranch.runtime.recorder import Span
from anabranch.runtime.trainer import Trainer

WARM_UP = 3
_OVERHEAD_ROUNDS = 12, 100  # at least, at most; between them as many as steps are profiled
Signature = tuple[str, str, str, int]  # part, element, op, bytes: as Span


@dataclass(frozen=True)
class RankSteps:
    """One rank's steps on rank 0's clock.

    steps: for each the signatures of its spans, and (n + 1, 2) seconds: the spans' starts and ends, then the step's.
    facts: plain data about the rank (see `_facts`). events: of the profiler, [name, kind, thread, start, seconds].
    traced: spans of the step that the events are of.
    """

    steps: list[tuple[tuple[Signature, ...], np.ndarray[Any, Any]]]
    facts: dict[str, Any]
    events: list[list[Any]] = field(default_factory=list)
    traced: list[Span] = field(default_factory=list)


def profile_steps(
    trainer: Trainer,
    steps: int,
    *,
    on_network: Callable[[ParallelNetwork], None] = lambda network: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[RankSteps]:
    """All ranks' profile, the same on every rank's rank 0; the others get []. Collective, in a process group.

    Raises ConfigError where the run has fewer than `steps` steps, StopProfile where a rank is told to stop before the
    last one is done. on_network: changes this rank's network before.
    """
    check_steps(steps, trainer.last_step)
    trainer.context.publish(phase="building")
    trainer._set_up()
    trainer._compile()
    on_network(trainer.network)
    told_of = countdown(trainer.context.publish, "timing branches")
    single = branch_seconds(trainer.network, *trainer._input(), trainer.config.train.precision, told_of)
    recorder, device = trainer.network.recorder, trainer.device
    fewest, most = _OVERHEAD_ROUNDS
    rounds = min(max(steps, fewest), most)
    run = StepLoop(trainer, WARM_UP + steps + 3 * rounds + 4)
    group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    for _ in range(WARM_UP):
        run()
    recorder.detailed = True
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = clock_offset(group, clock)
    recorder.align()
    recorder.begin()
    recorder.keep()
    for _ in range(steps):
        run()
    kept = recorder.kept()
    after = clock_offset(group, clock)
    clock_error_s = max(before.error_s, after.error_s) + recorder.clock_error_s
    facts = {**_facts(trainer), "clock_error_s": clock_error_s}
    facts["branches"] = [[name, b, seconds] for name, of in single.items() for b, seconds in of.items()]
    facts["records"] = {"detailed": recorder.num_records}
    facts["overhead_s"] = overhead_seconds(run, recorder, rounds)
    recorder.detailed = False
    run()
    facts["records"]["light"] = recorder.num_records
    facts["record_s"], facts["told_s"] = record_seconds(device), run.tell_seconds()
    recorder.detailed = True
    with ElementFlops(recorder) as counted:
        run()
    facts["flops"] = [[*key, number] for key, number in counted.flops.items()]
    facts["ops"] = [[*key, number] for key, number in counted.num_ops.items()]
    recorder.align()
    recorder.keep()
    events, mine = traced(run, recorder, device)
    facts["kernels"] = kernels_of(events, *mine[-1])
    skew = clock() - time.perf_counter()  # the recorder's clock is perf_counter
    return _gathered(kept, mine, shortened(events), facts, before, after, skew, device)


def check_steps(steps: int, last_step: int) -> None:
    """Raises ConfigError where a run of `last_step` steps has none or fewer than `steps` to profile."""
    if not 1 <= steps <= last_step:
        raise ConfigError(
            f"--steps is {steps}, the run has {last_step} steps: ask for 1 to {last_step}, "
            "or give the run more (train.epochs, train.max_steps)"
        )


def _facts(trainer: Trainer) -> dict[str, Any]:
    device, cuda = trainer.device, trainer.device.type == "cuda"
    host, name = trainer.context.host, str(device)
    if trainer.plan.devices is not None:  # a process may see one GPU only, and number it 0
        row, column = divmod(trainer.context.rank, trainer.plan.branch)
        host, _, index = trainer.plan.devices[row][column].rpartition(":")
        name = f"{device.type}:{index}"
    return {
        "host": host,
        "device": name,
        "kind": torch.cuda.get_device_name(device) if cuda else "cpu",
        "memory_bytes": torch.cuda.max_memory_allocated(device) if cuda else _resident_bytes(),
        "peak_flops_per_s": _matmul_rate(device, trainer.config.train.precision),
    }


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product here: what utilisation is measured against."""
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    n = 4096 if device.type == "cuda" else 512
    a = torch.ones((n, n), device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def _gathered(
    kept: list[tuple[list[Span], float, float]],
    mine: list[tuple[list[Span], float, float]],
    events: list[list[Any]],
    facts: dict[str, Any],
    before: ClockOffset,
    after: ClockOffset,
    skew: float,
    device: torch.device,
) -> list[RankSteps]:
    def there(seconds: float) -> float:
        return aligned(seconds + skew, before, after)

    signatures: dict[Signature, int] = {}
    rows: list[tuple[float, float, float]] = []
    for spans, start, end in kept:
        for s in spans:
            number = signatures.setdefault((s.part, s.element, s.op, s.num_bytes), len(signatures))
            rows.append((number, there(s.start), there(s.end)))
        rows.append((-1.0, there(start), there(end)))
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    sizes = gather_json(len(rows), device)
    world = dist.group.WORLD
    assert world is not None, "in a process group"
    everything = all_gather(table, sizes, world).cpu().numpy()
    last = [[s.part, s.element, s.op, s.num_bytes, there(s.start), there(s.end)] for s in mine[-1][0]]
    shifted = [[name, kind, thread, there(start), seconds] for name, kind, thread, start, seconds in events]
    told = gather_json([list(signatures), facts, shifted, last], device)
    if dist.get_rank() != 0:
        return []
    found, first = [], 0
    for size, (names, of_rank, of_kernels, spans_) in zip(sizes, told, strict=True):
        keys = [(part, element, op, num_bytes) for part, element, op, num_bytes in names]
        steps = list(_split(everything[first : first + size], keys))
        found.append(RankSteps(steps, of_rank, of_kernels, [Span(*span) for span in spans_]))
        first += size
    return found


def _split(
    rows: np.ndarray[Any, Any], keys: list[Signature]
) -> Iterator[tuple[tuple[Signature, ...], np.ndarray[Any, Any]]]:
    first = 0
    for end in np.flatnonzero(rows[:, 0] < 0).tolist():
        yield tuple(keys[int(number)] for number in rows[first:end, 0]), rows[first : end + 1, 1:]
        first = end + 1

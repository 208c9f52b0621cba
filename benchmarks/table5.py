"""Table V of Multi-Residual Networks and more: deeper pre-resnets under DDP against Multi-ResNets under ours.

Each row is measured in one process tree: all variants in every round, the order turning, so that the machine's drift
hits all of them; what is compared are ratios paired by round. Same samples, BN groups, optimizer, threads, allocator
and precision for all, the memory format that is faster for each.

Where there are fewer GPUs than ranks, (a)–(d) are measured on one GPU with the whole batch, and (e), (f) predicted:
every rank's compute timed alone on a wire on which nothing travels, plus what its collectives take over the data
sheet's link, nothing hidden; their reference (b) is predicted in the same way. BN groups are then the whole batch in
all rows, but in that reference: DDP's are each rank's own part, for which nothing is sent (which favours it).
Peak memory is taken once a row in processes of their own, which have built nothing else before.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from anabranch.benchmarks.record import RESULTS, environment
from anabranch.benchmarks.table5_row import measure_peak, measure_row
from anabranch.benchmarks.table5_sides import VARIANTS, Row, family
from anabranch.benchmarks.workers import run_alone, run_workers
from anabranch.runtime.durable import write_bytes
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.intervals import median_interval
from anabranch.schedulers import Cluster, Device
from anabranch.schedulers.costs import Costs
from anabranch.schedulers.device_table import device_kind, local_link
from anabranch.schedulers.links import GroupKind, Links

PAPER_MS = {
    (128, 2): (413, 462), (128, 4): (838, 804), (128, 6): (1284, 1158),
    (32, 2): (137, 136), (32, 4): (273, 238), (32, 6): (402, 341),
}  # fmt: skip
"""Of Table V: (deeper pre-resnet, data parallel; Multi-ResNet-110, branches split), on the two GPUs of a K80."""
ROWS = "32x2,32x4,32x6,128x2,128x4,128x6,32x4:2x2"
_REFERENCE = "b"
_FOLDS = (1, 2, 3, 6, 9, 18)  # of 18 blocks a stage


def parse_rows(
    text: str, precisions: Sequence[str], workers: int, fold: int, *, compiled: bool = False
) -> list[Row]:
    """Rows from "32x4,128x2:2x2" (batch x branches, :mesh of (e), else 1 x workers). Raises ConfigError."""
    if fold not in _FOLDS:
        raise ConfigError(f"--fold {fold} does not divide the 18 blocks of a stage: give one of {_FOLDS}")
    found = []
    for word in text.split(","):
        try:
            size, _, mesh = word.strip().partition(":")
            (batch, num_branches), shape = map(int, size.split("x")), (1, workers)
            if mesh:
                data, branch = map(int, mesh.split("x"))
                shape = data, branch
        except ValueError:
            raise ConfigError(
                f'--rows has {word!r}: write batch x branches, as in "32x4,128x2" or "32x4:2x2"'
            ) from None
        if min(batch, num_branches, *shape) < 1 or batch % (shape[0] * shape[1]):
            raise ConfigError(
                f"--rows has {word!r}: {batch} samples do not divide over {shape[0] * shape[1]} workers; "
                "give a multiple, and positive numbers"
            )
        found.append((batch, num_branches, shape))
    return [Row(*one, precision, fold, compiled=compiled) for precision in precisions for one in found]


def parse_variants(text: str, fold: int) -> list[str]:
    """Variants from "b,d,f_shared", in the table's order; "" is all that are different networks. Raises ConfigError.

    At one block a stage the shared ones are the others again: a stage's first block is shared in any case.
    """
    same = [name for name in VARIANTS if family(name) == "shared"] if fold == _FOLDS[-1] else []
    given = (
        [word.strip() for word in text.split(",")]
        if text
        else [name for name in VARIANTS if name not in same]
    )
    if unknown := [name for name in given if name not in VARIANTS]:
        raise ConfigError(f"--variants has {unknown[0]!r}: there are {', '.join(VARIANTS)}")
    if again := [name for name in given if name in same]:
        raise ConfigError(
            f"--variants has {again[0]}, which at --fold {fold} is {again[0][0]}'s network: a stage has one block, "
            f"whose pre-activation is shared in both; leave it out, or give a --fold of {_FOLDS[-2]} at most"
        )
    return [name for name in VARIANTS if name in given]


def run(
    rows: Sequence[Row],
    variants: Sequence[str],
    *,
    rounds: int = 9,
    steps: int = 1,
    plan_budget_s: float = 20.0,
    predicted: bool = False,
    resume: bool = False,
    told: bool = True,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Measures row by row; each is in folder/table5.json as soon as it is done. resume: rows in it are not run again.

    predicted: as where there are fewer GPUs than ranks. Raises ConfigError where a record of other settings would be
    mixed with this one.
    """
    settings = {
        "rounds": rounds, "steps": steps, "variants": [*variants], "predicted": predicted,
        "compiled": any(row.compiled for row in rows),
    }  # fmt: skip
    path = folder / "table5.json"
    kept = _kept(path, settings) if resume else []
    todo = [row for row in rows if not any(_is_of(entry, row) for entry in kept)]
    folder.mkdir(parents=True, exist_ok=True)
    if told:
        print(f"{len(todo)} rows of {len(rows)} to measure, into {path}", file=sys.stderr, flush=True)
    record = {"name": "table5", "environment": environment(), **settings, "variant_names": VARIANTS}
    for index, row in enumerate(todo):
        rest = sum(map(_weight, todo[index + 1 :])) / _weight(row)
        kept += _measured(row, variants, rounds, steps, plan_budget_s, predicted, rest, told)
        kept.sort(key=lambda entry: _place(entry, rows))
        write_bytes(path, (json.dumps({**record, "rows": kept}, indent=1) + "\n").encode())
    return {**record, "rows": kept, "path": str(path)}


def _place(entry: Mapping[str, Any], rows: Sequence[Row]) -> int:
    """Of an entry's row among those asked for; behind them all where it is none of them."""
    return next((index for index, row in enumerate(rows) if _is_of(entry, row)), len(rows))


def _weight(row: Row) -> float:
    """How long a row takes, roughly."""
    return row.batch * row.num_branches * (1.6 if row.precision == "bf16" else 1.0)


def _measured(
    row: Row, variants: Sequence[str], rounds: int, steps: int, plan_budget_s: float, predicted: bool,
    rest: float, told: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    num_gpus = torch.cuda.device_count()
    if not predicted and not 0 < num_gpus < row.world_size:
        found = run_workers(
            row.world_size, measure_row, row, variants, rounds, steps, plan_budget_s, rest, told
        )
        _add_peaks(row, found)
        return _entries(row, found, found, "measured", row.world_size)
    row = replace(row, whole_groups=True)
    arguments = (rounds, steps, plan_budget_s, rest, told)
    here = [name for name in variants if name[0] in "abcd"]
    entries = []
    if here:
        alone = replace(row, mesh=(1, 1))
        found = run_workers(1, measure_row, alone, here, *arguments)
        _add_peaks(alone, found)
        entries = _entries(row, found, found, "measured", 1)
    if there := [name for name in variants if name[0] in "ef"]:
        needed = [name for name in VARIANTS if name in (_REFERENCE, "d", "d_shared", *there)]
        ranks = run_alone(row.world_size, measure_row, row, needed, *arguments)
        device = torch.cuda.get_device_name() if num_gpus else "cpu"
        found = {name: _completed([rank[name] for rank in ranks], device) for name in needed}
        for auto, data in (("f", "d"), ("f_shared", "d_shared")):
            if auto in found:
                found[auto] = _chosen(found[auto], found[data], data)
        chosen = {name: found[name] for name in there}
        _add_peaks(row, chosen, alone=True)
        entries += _entries(row, chosen, found, "predicted", row.world_size)
    return entries


def _chosen(auto: dict[str, Any], data: dict[str, Any], name: str) -> dict[str, Any]:
    """An automatic plan's figures, or those of data parallelism, the variant `name`, where that is the faster plan.

    Where both are one plan its own samples stay: the better of two medians of one thing is too good.
    """
    medians = [statistics.median(side["samples_s"]) for side in (auto, data)]
    return auto if auto["same_as"] == "d" or medians[0] <= medians[1] else {**data, "same_as": name}


def _add_peaks(row: Row, found: Mapping[str, dict[str, Any]], *, alone: bool = False) -> None:
    """Each variant's peak_memory_bytes, the most of any rank. alone: one rank after another, as they were timed."""
    for variant, facts in found.items():
        arguments = row, variant, facts["memory_format"], facts.get("plan")
        if alone:
            peaks = run_alone(row.world_size, measure_peak, *arguments)
            facts["peak_memory_bytes"] = None if None in peaks else max(peaks)
        else:
            facts["peak_memory_bytes"] = run_workers(row.world_size, measure_peak, *arguments)


def _completed(of_rank: Sequence[Mapping[str, Any]], device: str) -> dict[str, Any]:
    """One variant's ranks, timed one by one: the slowest's compute by round, and collectives over the stated link."""
    link = local_link(device_kind(device))
    links = Links(Cluster((Device("host", 0, device),), link), Costs(()))
    transfer_s = max(
        sum(links.seconds(op, GroupKind(size), num_bytes) for op, num_bytes, size in facts["exchanges"])
        for facts in of_rank
    )
    computes = [max(seconds) for seconds in zip(*(facts["samples_s"] for facts in of_rank), strict=True)]
    common = {key: value for key, value in of_rank[0].items() if key not in ("exchanges", "samples_s")}
    return {
        **common,
        "samples_s": [seconds + transfer_s for seconds in computes],
        "compute_samples_s": [facts["samples_s"] for facts in of_rank],
        "transfer_s": transfer_s,
        "link": {"latency_s": link.latency_s, "bandwidth_bytes_per_s": link.bandwidth_bytes_per_s},
    }


def _entries(
    row: Row, found: Mapping[str, Any], all_found: Mapping[str, Any], label: str, num_workers: int
) -> list[dict[str, Any]]:
    """A row's entries for the record: what it is, then what was found, with ratios to the reference paired by round."""
    entries = []
    reference = all_found.get(_REFERENCE, {}).get("samples_s")
    pre, multi = (
        PAPER_MS.get((row.batch, row.num_branches), (None, None)) if row.mesh == (1, 2) else (None, None)
    )
    for variant, facts in found.items():
        is_deeper = variant in ("a", "b")
        entry: dict[str, Any] = {
            "batch": row.batch,
            "num_branches": row.num_branches,
            "precision": row.precision,
            "variant": variant,
            "is_papers_network": "shared" not in variant,
            "label": label,
            "measured": label == "measured",
            "predicted": label == "predicted",
            "row_mesh": f"{row.mesh[0]}x{row.mesh[1]}",
            "workers": num_workers,
            "bn_batch_size": row.bn_batch_size,
            "fold": row.fold,
            "depth": row.deeper if is_deeper else row.depth,
            "paper_ms": {"a": pre, "e": multi}.get(variant),
            "median_s": statistics.median(facts["samples_s"]),
        }
        entry["images_per_s"] = row.batch / entry["median_s"]
        if reference is not None:
            pairs = zip(reference, facts["samples_s"], strict=True)
            ratio, low, high = median_interval([ref / mine for ref, mine in pairs])
            entry |= {"speed_up": ratio, "speed_up_interval_95": [low, high]}
            entry["reference_median_s"] = statistics.median(reference)
            entry["reference_bn_batch_size"] = row.batch // num_workers
        entries.append(entry | facts)
    return entries


def _is_of(entry: Mapping[str, Any], row: Row) -> bool:
    mesh = f"{row.mesh[0]}x{row.mesh[1]}"
    wanted = (row.batch, row.num_branches, row.precision, mesh, row.fold)
    return wanted == tuple(entry[key] for key in ("batch", "num_branches", "precision", "row_mesh", "fold"))


def _kept(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a record of the same settings, hardware, versions and commit; none where there is no record."""
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        now = environment()
        same = ("processor", "cores", "gpus", "torch", "allocator", "commit")
        theirs = {key: record[key] for key in settings} | {key: record["environment"][key] for key in same}
        rows: list[dict[str, Any]] = record["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no record of table5 ({error}): move it away, or leave --resume out"
        ) from error
    mine = {**settings, **{key: now[key] for key in same}}
    for key, value in mine.items():
        if theirs[key] != value:
            raise ConfigError(
                f"{path} was measured with {key} = {theirs[key]!r}, now it is {value!r}: "
                "give the same, another --out, or leave --resume out"
            )
    return rows

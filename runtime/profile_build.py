"""The content of profile.json (see profile_file) from all ranks' steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from anabranch.runtime.profile_advice import predicted, suggestion
from anabranch.runtime.profile_branches import slowest
from anabranch.runtime.profile_file import SCHEMA
from anabranch.runtime.profile_merge import Exchange, Merged, over_ranks, spread, summed
from anabranch.runtime.profile_steps import WARM_UP, RankSteps
from anabranch.schedulers import Cluster, ModelSpec, Plan
from anabranch.schedulers.costs import Batch, Costs

_MOST_STEPS, _MOST_STRAGGLERS = 2000, 10


def build_profile(
    ranks: Sequence[RankSteps],
    plan: Plan,
    model: ModelSpec,
    batch: Batch,
    costs: Costs | None = None,
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """Plain data. costs: what a prediction is made from; None: none is. cluster: as of `predicted`."""
    merged = Merged(ranks, plan.branch)
    step_s = np.stack([merged.step_s(rank) for rank in range(len(ranks))])
    mean = float(np.median(step_s.max(0)))
    profile: dict[str, Any] = {
        "schema": SCHEMA,
        "mesh": [plan.data, plan.branch],
        "steps": {
            "measured": merged.num_measured,
            "regular": len(merged.regular),
            "warm_up": WARM_UP,
            "step_s": spread(step_s.max(0)),
        },
        "ranks": [_rank(merged, rank, of_rank) for rank, of_rank in enumerate(ranks)],
        "elements": [_element(name, merged, ranks, plan, model) for name in ("stem", *model.by_name, "head")],
        "exchanges": _exchanges(merged),
        "stragglers": _stragglers(merged, ranks, plan, model, mean),
        "timeline": _timeline(merged, step_s),
        "overhead": _overhead(ranks, mean),
        "by_step": {"step_s": [_thinned(row) for row in step_s]},
    }
    profile["suggestion"] = suggestion(profile, plan, model, batch)
    profile["prediction"] = predicted(profile, plan, model, batch, costs, cluster) if costs else None
    return profile


def _rank(merged: Merged, rank: int, of_rank: RankSteps) -> dict[str, Any]:
    parts, step_s = merged.parts(rank), merged.step_s(rank)
    rest = float(np.median(parts.pop("unattributed") / step_s))
    kept = ("host", "device", "kind", "memory_bytes", "peak_flops_per_s", "clock_error_s")
    return {
        "rank": rank,
        **{key: of_rank.facts[key] for key in kept},
        "step_s": spread(step_s),
        "parts": {part: spread(seconds) for part, seconds in parts.items()},
        "unattributed": rest,
        **dict(zip(("kernels", "gap_s"), of_rank.facts["kernels"][""], strict=True)),
    }


def _element(
    name: str,
    merged: Merged,
    ranks: Sequence[RankSteps],
    plan: Plan,
    model: ModelSpec,
) -> dict[str, Any]:
    block, num_steps = model.by_name.get(name), len(merged.regular)
    mine = [e for e in merged.exchanges if e.element == name and not e.reduction]
    peaks: dict[str, float] = {}  # alike devices can do alike: the best of them, which nothing else disturbed
    for of_rank in ranks:
        kind = of_rank.facts["kind"]
        peaks[kind] = max(peaks.get(kind, 0.0), of_rank.facts["peak_flops_per_s"])
    rows: list[dict[str, Any]] = []
    for rank, of_rank in enumerate(ranks):
        compute = merged.compute(rank)
        zero = np.zeros(num_steps)
        forward, backward = (compute.get((part, name), zero) for part in ("forward", "backward"))
        flops = {(part, element): number for part, element, number in of_rank.facts["flops"]}
        counted = [flops.get((part, name), 0) for part in ("forward", "backward")]
        seconds = float(np.median(forward + backward))
        rate = sum(counted) / seconds if seconds > 0 else 0.0
        kernels, gap = of_rank.facts["kernels"].get(name, (0, 0.0))
        held = list(plan.held(block, rank % plan.branch)) if block else []
        num_bytes = sum(e.num_bytes for e in mine if rank in e.ranks)
        transfer = summed(mine, rank, lambda e: e.transfer, num_steps)
        moving = float(np.median(transfer))
        rows.append(
            {
                "held": held,
                "branches_s": _branches_s(of_rank, name, held),
                "forward_s": spread(forward),
                "backward_s": spread(backward),
                "transfer_s": spread(transfer),
                "wait_s": spread(summed(mine, rank, lambda e: e.wait, num_steps)),
                "bytes": num_bytes,
                "bytes_per_s": num_bytes / moving if moving > 0 else 0.0,
                "flops": counted,
                "flops_per_s": rate,
                "utilisation": rate / peaks[of_rank.facts["kind"]],
                "kernels": kernels,
                "gap_s": gap,
            }
        )
    split = plan.blocks[name].split if block else plan.stem if name == "stem" else plan.head
    timed = ("forward_s", "backward_s", "transfer_s", "wait_s")
    return {
        "name": name,
        "split": split,
        "over": {key: over_ranks([row[key]["p50"] for row in rows]) for key in timed},
        "ranks": rows,
    }


def _exchanges(merged: Merged) -> list[dict[str, Any]]:
    alike: dict[tuple[str, str, str, int], list[Exchange]] = defaultdict(list)
    for e in merged.exchanges:
        if len(e.ranks) > 1:
            alike[e.op, e.element or "gradients", e.part, e.num_bytes].append(e)
    found = []
    for (op, element, part, num_bytes), group in alike.items():
        seconds = float(np.median(np.concatenate([e.transfer.mean(0) for e in group])))
        shortest = float(np.median(np.concatenate([e.transfer.min(0) for e in group])))
        wait = [
            float(np.median(summed(group, rank, lambda e: e.wait, len(merged.regular))))
            for rank in range(merged.num_ranks)
        ]
        calls = max(sum(rank in e.ranks for e in group) for rank in range(merged.num_ranks))
        found.append(
            {
                "op": op,
                "element": element,
                "part": part,
                "bytes": num_bytes,
                "calls": calls,
                "transfer_s": seconds,
                "wait_s": wait,
                "bytes_per_s": num_bytes / shortest if shortest > 0 and not group[0].reduction else None,
            }
        )
    return found


def _stragglers(
    merged: Merged, ranks: Sequence[RankSteps], plan: Plan, model: ModelSpec, step_s: float
) -> list[dict[str, Any]]:
    found = []
    for (rank, part, element), waits in merged.blame.items():
        of_ranks = np.median(waits, axis=1)
        waiting = int(np.argmax(of_ranks))
        if of_ranks[waiting] > 0:
            block = model.by_name.get(element)
            held = list(plan.held(block, rank % plan.branch)) if block else []
            seconds = _branches_s(ranks[rank], element, held)
            found.append(
                {
                    "rank": rank,
                    "host": ranks[rank].facts["host"],
                    "device": ranks[rank].facts["device"],
                    "part": part,
                    "element": element,
                    "branches": held,
                    "branches_s": seconds,
                    "branch": held[0] if len(held) == 1 else slowest(dict(zip(held, seconds, strict=False))),
                    "wait_s": float(of_ranks[waiting]),
                    "waiting": waiting,
                    "share": float(of_ranks[waiting]) / step_s,
                }
            )
    return sorted(found, key=lambda one: -one["wait_s"])[:_MOST_STRAGGLERS]


def _branches_s(of_rank: RankSteps, element: str, held: Sequence[int]) -> list[float]:
    """Of each held branch; empty where they were not timed."""
    timed = {branch: seconds for name, branch, seconds in of_rank.facts["branches"] if name == element}
    return [timed[branch] for branch in held] if timed else []


def _timeline(merged: Merged, step_s: np.ndarray[Any, Any]) -> dict[str, Any]:
    longest = step_s.max(0)
    index = int(np.argsort(longest)[len(longest) // 2])
    origin = min(float(step[0][index]) for step in merged.step)
    waits = {
        (rank, column): float(e.wait[i][index])
        for e in merged.exchanges
        for i, (rank, column) in enumerate(zip(e.ranks, e.columns, strict=True))
    }
    spans = [
        [rank, part, element, op, start - origin, end - start, waits.get((rank, column), 0.0)]
        for rank in range(merged.num_ranks)
        for column, ((part, element, op, _), start, end) in enumerate(
            zip(
                merged.spans[rank],
                merged.start[rank][:, index].tolist(),
                merged.end[rank][:, index].tolist(),
                strict=True,
            )
        )
        if part != "sent"
    ]
    return {"step_s": float(longest[index]), "spans": spans}


def _overhead(ranks: Sequence[RankSteps], step_s: float) -> dict[str, Any]:
    """Shares by count × cost and what telling costs, and the interval of the median ratio by resampling rounds."""
    cost = max(rank.facts["record_s"] for rank in ranks)
    records = {kind: max(rank.facts["records"][kind] for rank in ranks) for kind in ("light", "detailed")}
    measured, random = {}, np.random.default_rng(0)
    off = np.array([rank.facts["overhead_s"]["off"] for rank in ranks]).max(0)
    for kind in ("light", "detailed"):
        ratio = np.array([rank.facts["overhead_s"][kind] for rank in ranks]).max(0) / off
        again = np.median(random.choice(ratio, (2000, len(ratio))), axis=1)
        measured[kind] = [float(np.percentile(again, q)) for q in (2.5, 50, 97.5)]
    told = max(rank.facts["told_s"] for rank in ranks)
    share = {kind: (number * cost + told) / step_s for kind, number in records.items()}
    return {"record_s": cost, "told_s": told, "records": records, "share": share, "measured": measured}


def _thinned(row: np.ndarray[Any, Any]) -> list[float]:
    return [float(x) for x in row[:: max(1, -(-len(row) // _MOST_STEPS))]]

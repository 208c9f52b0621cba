"""What to change in the plan: moves of branches off the slow ranks, tried in the simulator on this profile's costs.

The profile's own block times become costs, a kind of device for each rank: a rank's time in a block is taken to grow
with the branches that it holds (so its replicated part counts as theirs), all else to stay. Where they were timed one
by one, a branch weighs as much as it took, compared with its rank's quickest: else as much as any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from anabranch.runtime.profile_branches import slowest
from anabranch.schedulers import BranchPlacement, Cluster, Device, ModelSpec, Plan, PlanError
from anabranch.schedulers.cluster import Link
from anabranch.schedulers.costs import (
    Batch,
    Costs,
    Curve,
    ElementCost,
    GroupCost,
    ModelCosts,
    ParameterBytes,
    Work,
)
from anabranch.schedulers.layout import make_layout
from anabranch.schedulers.predict import Prediction, predict

_LEAST_GAIN = 0.01  # of the step, to be worth saying
_LATENCY = Link(0.0, 1e12)  # of groups that the profile has no exchange of


def suggestion(
    profile: Mapping[str, Any], plan: Plan, model: ModelSpec, batch: Batch
) -> dict[str, Any] | None:
    """The moves that the simulator likes best among those off the ranks that others wait for; None: none helps."""
    if plan.branch == 1 or not profile["stragglers"]:
        return None
    plan, cluster = _placed(plan)
    costs = profile_costs(profile, plan, cluster, model, batch)
    now = predict(plan, model, cluster, costs, batch).total_s
    best: tuple[float, Plan, str, list[dict[str, Any]]] | None = None
    weighed = any(_is_unequal(row["branches_s"]) for e in profile["elements"] for row in e["ranks"])
    for text, moves in _candidates(profile, plan):
        try:
            moved = _moved(plan, moves)
            moved.check(model)
            if weighed:
                costs = profile_costs(profile, plan, cluster, model, batch, moved)
            seconds = predict(moved, model, cluster, costs, batch).total_s
        except PlanError:
            continue  # blocks that share parameters must move together
        if best is None or seconds < best[0] - 1e-9:
            best = seconds, moved, text, moves
    if best is None or best[0] > now * (1 - _LEAST_GAIN):
        return None
    change = best[0] / now - 1
    text = f"{best[2]}: predicted {100 * change:+.0f} %".replace("-", "−")
    return {"text": text, "moves": best[3], "predicted_s": best[0], "now_s": now, "change": change}


def known_to(costs: Costs, cluster: Cluster) -> Cluster:
    """The cluster by the costs' kinds of devices; where they know one only, all are of that one.

    Raises PlanError where a device is of none of several kinds.
    """
    kinds = [cost.kind for cost in costs.models]
    devices = tuple(replace(d, kind=kinds[0] if len(kinds) == 1 else d.kind) for d in cluster.devices)
    for device in devices:
        costs.of(device.kind)
    return replace(
        cluster, devices=devices, local=cluster.local or _LATENCY, across=cluster.across or _LATENCY
    )


def predicted(
    profile: Mapping[str, Any],
    plan: Plan,
    model: ModelSpec,
    batch: Batch,
    costs: Costs,
    cluster: Cluster | None = None,
) -> dict[str, Any]:
    """A step of the plan by other costs than the profile's own, to compare. Raises PlanError where they do not fit.

    cluster: with the plan's devices, their kinds and speeds; None: the kinds are what the ranks call theirs.
    """
    if cluster is None or plan.devices is None:
        devices = tuple(Device(rank["host"], i, rank["kind"]) for i, rank in enumerate(profile["ranks"]))
        names, cluster = tuple(map(str, devices)), Cluster(devices)
        rows = tuple(names[d * plan.branch : (d + 1) * plan.branch] for d in range(plan.data))
        plan = replace(plan, devices=rows)
    found = predict(plan, model, known_to(costs, cluster), costs, batch)
    elements = {name: [0.0, 0.0] for name in ("stem", *model.by_name, "head")}
    for phase in found.phases:
        if phase.element and phase.phase in ("forward", "backward"):
            elements[phase.element][phase.phase == "backward"] += max(phase.compute_s)
    return {
        "source": found.label,
        "total_s": found.total_s,
        "elements": elements,
        "memory_bytes": list(found.memory_bytes),
        "timeline": _timeline(found, plan.world_size),
    }


def profile_costs(
    profile: Mapping[str, Any],
    plan: Plan,
    cluster: Cluster,
    model: ModelSpec,
    batch: Batch,
    moved: Plan | None = None,
) -> Costs:
    """What the profile measured, as costs: the same plan takes about what it took.

    moved: the plan with other placements that the costs are asked for, where branches are unequal; costs know how many
    branches a rank holds, not which.
    """
    assert plan.devices is not None, "placed"
    layout = make_layout(plan.devices, cluster, batch, plan.samples)
    most, times = max(layout.group_samples), batch.accumulation
    by_name = {element["name"]: element for element in profile["elements"]}
    points: dict[tuple[str, float], list[float]] = {}
    sent: dict[tuple[str, str], float] = {}
    for e in profile["exchanges"]:
        if e["op"] in ("all_reduce", "reduce_scatter", "all_gather") and e["calls"]:
            points.setdefault((e["op"], float(e["bytes"])), []).append(e["transfer_s"])
            if e["op"] != "all_gather":
                key = e["element"], e["part"]
                sent[key] = sent.get(key, 0.0) + e["bytes"] * e["calls"] / times / most
    shared = {name: ParameterBytes(0, ()) for name in model.users}
    models = []
    for rank, device in enumerate(cluster.devices):
        elements = {}
        for name, element in by_name.items():
            block = model.by_name.get(name)
            row = element["ranks"][rank]
            forward, backward = (row[key]["p50"] / times for key in ("forward_s", "backward_s"))
            whole = _work(forward, backward)
            if block is None:
                elements[name] = ElementCost(whole)
                continue
            num = len(row["held"])
            if num == 0:  # its branches cost what the others' do
                per = [
                    (
                        other["forward_s"]["p50"] / len(other["held"]),
                        other["backward_s"]["p50"] / len(other["held"]),
                    )
                    for other in element["ranks"]
                    if other["held"]
                ]
                forward, backward = (sum(p[i] for p in per) / len(per) / times for i in (0, 1))
                num = 1
            elif moved is not None and (held := moved.held(block, rank % plan.branch)):
                weight = _weights(element)
                share = sum(weight[b] for b in held) / sum(weight[b] for b in row["held"])
                forward, backward, num = forward * share, backward * share, len(held)
            branches = tuple(
                _work(forward * (j + 1) / num, backward * (j + 1) / num) for j in range(block.num_branches)
            )
            sums, hidden = (sent.get((name, part), 0.0) for part in ("forward", "backward"))
            elements[name] = ElementCost(_work(0.0, 0.0), branches, False, sums, hidden)
        parts = profile["ranks"][rank]["parts"]
        rest = sum(parts[part]["p50"] for part in ("data", "optimizer", "idle", "reduction"))
        models.append(ModelCosts(device.kind, elements, shared, rest))
    groups = tuple(
        GroupCost(op, plan.branch, across, Curve(tuple(_curve(points, op))))  # type: ignore[arg-type]
        for op in dict.fromkeys(op for op, _ in points)
        for across in (False, True)
    )
    return Costs(tuple(models), groups)


def _weights(element: Mapping[str, Any]) -> dict[int, float]:
    """How much each branch takes, of what its rank's quickest does: what all are slower by is the rank's."""
    found: dict[int, float] = {}
    for row in element["ranks"]:
        seconds = row["branches_s"] or [1.0] * len(row["held"])
        found |= {b: s / min(seconds) for b, s in zip(row["held"], seconds, strict=True)}
    return found


def _is_unequal(seconds: Sequence[float]) -> bool:
    return slowest(dict(enumerate(seconds))) is not None


def _curve(points: Mapping[tuple[str, float], list[float]], op: str) -> Iterator[tuple[float, float]]:
    for (name, num_bytes), seconds in sorted(points.items()):
        if name == op:
            yield num_bytes, sorted(seconds)[len(seconds) // 2]


def _work(forward_s: float, backward_s: float) -> Work:
    return Work(Curve(((0.0, forward_s),)), Curve(((0.0, backward_s),)))


def _placed(plan: Plan) -> tuple[Plan, Cluster]:
    """The plan on a cluster in which every rank is a kind of device of its own."""
    names = [f"{(plan.devices[r // plan.branch][r % plan.branch] if plan.devices else 'here:0').rpartition(':')[0]}"
             for r in range(plan.world_size)]  # fmt: skip
    devices = tuple(Device(host, rank, f"rank {rank}") for rank, host in enumerate(names))
    rows = tuple(
        tuple(str(d) for d in devices[i * plan.branch : (i + 1) * plan.branch]) for i in range(plan.data)
    )
    return replace(plan, devices=rows), Cluster(devices, _LATENCY, _LATENCY)


def _candidates(profile: Mapping[str, Any], plan: Plan) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(words, moves): a branch of one block, of a stage's blocks, of all blocks, off each rank waited for.

    Where a rank's branches are unequal, its quickest; of one block any of them.
    """
    by_name = {element["name"]: element["ranks"] for element in profile["elements"]}

    def slowest_first(block: str, rank: int) -> list[int]:
        placed, seconds = plan.blocks[block].branches, by_name[block][rank]["branches_s"]
        held = list(placed[rank % plan.branch]) if placed else []
        if _is_unequal(seconds):
            took = dict(zip(held, seconds, strict=True))
            held.sort(key=lambda branch: -took[branch])
        return held

    seen = set()
    for one in profile["stragglers"]:
        name, source = one["element"], one["rank"] % plan.branch
        if name not in plan.blocks or plan.blocks[name].branches is None:
            continue
        stage = name.split(".")[0]
        scopes = {
            name: [name],
            f"{stage}.*": [b for b in plan.blocks if b.startswith(f"{stage}.")],
            "*": [*plan.blocks],
        }
        for target in range(plan.branch):
            for scope, blocks in scopes.items():
                key = scope, source, target
                if target == source or key in seen:
                    continue
                seen.add(key)
                chosen = [(block, slowest_first(block, one["rank"])) for block in blocks]
                groups = [
                    [(block, held[-num:]) for block, held in chosen if len(held) >= num] for num in (1, 2)
                ]
                if scope == name and _is_unequal(one["branches_s"]):  # then it matters which
                    groups += [[(name, [branch])] for branch in chosen[0][1][:-1]]
                for group in filter(None, groups):
                    moves = [_move(block, b, source, target) for block, taken in group for b in taken]
                    yield _words(moves, scope, len(group[0][1]), len(blocks) > 1, plan), moves


def _move(block: str, branch: int, source: int, target: int) -> dict[str, Any]:
    return {"block": block, "branch": branch, "source": source, "target": target}


def _words(moves: Sequence[Mapping[str, Any]], scope: str, num: int, many: bool, plan: Plan) -> str:
    branches = sorted({move["branch"] for move in moves})
    ranks = "rank" if plan.data == 1 else "branch rank"
    if many and len(branches) > num:
        last = [(plan.blocks[m["block"]].branches or ())[m["source"]][-num:] for m in moves]
        are_last = all(m["branch"] in held for m, held in zip(moves, last, strict=True))
        some = "branch" if num == 1 else f"{num} branches"
        what = f"the {'last' if are_last else 'quickest'} {some} of {scope}"
    else:
        what = f"branch{'es' if len(branches) > 1 else ''} {', '.join(map(str, branches))} of {scope}"
    return f"move {what} from {ranks} {moves[0]['source']} to {ranks} {moves[0]['target']}"


def _moved(plan: Plan, moves: Sequence[Mapping[str, Any]]) -> Plan:
    blocks = dict(plan.blocks)
    for move in moves:
        placed = blocks[move["block"]].branches
        assert placed is not None, "only split branch has moves"
        held = [[b for b in of_rank if b != move["branch"]] for of_rank in placed]
        held[move["target"]].append(move["branch"])
        blocks[move["block"]] = BranchPlacement("branch", tuple(map(tuple, held)))
    return replace(plan, blocks=blocks)


def _timeline(found: Prediction, num_ranks: int) -> list[list[Any]]:
    """[rank, phase, element, kind, start, seconds]."""
    return [
        [rank, span.phase, span.element, span.kind, span.start_s, span.end_s - span.start_s]
        for rank in range(num_ranks)
        for span in found.timeline(rank)
    ]

"""From what elements took in trials to curves over samples and numbers of branches."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from anabranch.runtime.config import Config
from anabranch.runtime.model_shape import parameter_bytes, traffic, unequal_blocks
from anabranch.schedulers import ModelSpec
from anabranch.schedulers.costs import Curve, ElementCost, Work

_Four = tuple[float, float, float, float]  # forward, backward seconds, saved, peak bytes


@dataclass(frozen=True)
class Seen:
    """One element in one trial on one rank: its split, samples, branches held, and what it took, without exchanges.

    forward_sums_s, backward_sums_s: exchanging BatchNorm's statistics with ranks that have samples of the same group.
    """

    element: str
    samples: int
    held: tuple[int, ...] | None  # None: all, on own samples
    forward_s: float
    backward_s: float
    saved_bytes: float
    peak_bytes: float
    forward_sums_s: float = 0.0
    backward_sums_s: float = 0.0

    def at_speed_1(self, speed: float) -> Seen:
        """Of a device of speed 1, the sums among what it took: whatever plan runs it so has them too."""
        forward_s = self.forward_s * speed + self.forward_sums_s
        return replace(self, forward_s=forward_s, backward_s=self.backward_s * speed + self.backward_sums_s)


def without_waiting(of_rank: Sequence[Sequence[Seen]]) -> list[list[Seen]]:
    """What ranks saw, each sum as long as it took the rank that waited for no other. By rank, the same elements."""
    least = [
        (min(one.forward_sums_s for one in same), min(one.backward_sums_s for one in same))
        for same in zip(*of_rank, strict=True)
    ]
    return [
        [
            replace(one, forward_sums_s=forward_s, backward_sums_s=backward_s)
            for one, (forward_s, backward_s) in zip(seen, least, strict=True)
        ]
        for seen in of_rank
    ]


def element_costs(
    network: nn.Module, spec: ModelSpec, alike: dict[str, str], seen: Sequence[Seen], config: Config
) -> dict[str, ElementCost]:
    """Every element's costs from what all ranks of one kind saw of it and of blocks alike (`alike_blocks`)."""
    by_element: dict[str, list[Seen]] = defaultdict(list)
    for one in seen:
        by_element[one.element].append(one)
    moved = traffic(network, config.train.precision, half_wire=config.mesh.wire == "bf16")
    unequal = unequal_blocks(network)
    parameters = parameter_bytes(network, spec)
    made: dict[str, ElementCost] = {}
    for name in ("stem", "head"):
        made[name] = ElementCost(
            _work(by_element[name]),
            input_bytes=moved[name][2],
            parameters=parameters[name],
        )
    for block in spec.blocks:
        seen_alike = [
            one for name in alike if alike[name] == alike[block.name] for one in by_element.get(name, [])
        ]
        is_unequal = alike[block.name] in unequal
        work = _unequal_work if is_unequal else _block_work
        replicated, branches = work(seen_alike, block.num_branches)
        sums, hidden, inputs = moved[block.name]
        made[block.name] = ElementCost(
            replicated, branches, is_unequal, sums, hidden, inputs, parameters[block.name]
        )
    return made


def _block_work(seen: Sequence[Seen], num_branches: int) -> tuple[Work, tuple[Work, ...]]:
    """Of alike branches: what is left without any (enter, join), and j branches together, for every j.

    Numbers of branches that no trial had are drawn between those that were; a number of samples on which only all
    branches ran takes its shares from the nearest on which more is known.
    """
    totals: dict[int, dict[int, _Four]] = defaultdict(dict)
    for key, group in _grouped(seen, lambda one: num_branches if one.held is None else len(one.held)).items():
        totals[key[0]][key[1]] = _medians(group)
    known = max(totals.values(), key=len)
    shapes = {n: _between(found, num_branches) if len(found) > 1 else None for n, found in totals.items()}
    like = _between(known, num_branches) if len(known) > 1 else None
    for n, found in totals.items():
        if shapes[n] is None:
            (whole,) = found.values()
            shares = like or [_times(whole, j / num_branches) for j in range(num_branches + 1)]
            shapes[n] = [
                _as_four(
                    w * part / all_ if all_ else 0.0
                    for w, part, all_ in zip(whole, row, shares[-1], strict=True)
                )
                for row in shares
            ]
    by_samples = {n: rows for n, rows in shapes.items() if rows is not None}
    replicated = _curves({n: rows[0] for n, rows in by_samples.items()})
    branches = tuple(
        _curves({n: _minus(rows[j], rows[0]) for n, rows in by_samples.items()})
        for j in range(1, num_branches + 1)
    )
    return replicated, branches


def _unequal_work(seen: Sequence[Seen], num_branches: int) -> tuple[Work, tuple[Work, ...]]:
    """Of unequal branches: enter and join, and each branch alone.

    A number of samples on which only all branches ran takes its shares from the one on which most is known.
    """
    by_samples: dict[int, list[Seen]] = defaultdict(list)
    for one in seen:
        by_samples[one.samples].append(one)
    solved = {n: _least_squares(group, num_branches) for n, group in by_samples.items()}
    known = solved[max(by_samples, key=lambda n: len({str(one.held) for one in by_samples[n]}))]
    for n, group in by_samples.items():
        if all(one.held is None for one in group):
            solved[n] = solved[n].sum(0) * (known / known.sum(0).clamp(min=1e-30))
    works = [
        _curves({n: tuple(rows[i].tolist()) for n, rows in solved.items()}) for i in range(num_branches + 1)
    ]
    return works[0], tuple(works[1:])


def _least_squares(seen: Sequence[Seen], num_branches: int) -> torch.Tensor:
    """(1 + branches, 4): what is always there and what each branch adds, over all that ran."""
    rows = torch.zeros(len(seen), num_branches + 1, dtype=torch.float64)
    for index, one in enumerate(seen):
        rows[index, 0] = 1
        rows[index, [1 + b for b in (range(num_branches) if one.held is None else one.held)]] = 1
    values = torch.tensor([_four(one) for one in seen], dtype=torch.float64)
    solution: torch.Tensor = torch.linalg.lstsq(rows, values, driver="gelsd").solution
    return solution.clamp(min=0)


def _work(seen: Sequence[Seen]) -> Work:
    """Of stem or head, over samples."""
    return _curves({n: _medians(group) for (n, _), group in _grouped(seen, lambda one: 0).items()})


def _grouped(seen: Sequence[Seen], count: Callable[[Seen], int]) -> dict[tuple[int, int], list[Seen]]:
    groups: dict[tuple[int, int], list[Seen]] = defaultdict(list)
    for one in seen:
        groups[one.samples, count(one)].append(one)
    return groups


def _four(one: Seen) -> _Four:
    return one.forward_s, one.backward_s, one.saved_bytes, one.peak_bytes


def _as_four(values: Iterable[float]) -> _Four:
    a, b, c, d = values
    return a, b, c, d


def _medians(group: Sequence[Seen]) -> _Four:
    forward, backward, saved, peak = (
        statistics.median(values) for values in zip(*map(_four, group), strict=True)
    )
    return forward, backward, saved, peak


def _between(found: dict[int, _Four], num_branches: int) -> list[_Four]:
    """Rows for 0 … k branches from those measured, straight between them."""
    curves = [Curve(tuple(sorted((float(j), row[i]) for j, row in found.items()))) for i in range(4)]
    return [tuple(curve(j) for curve in curves) for j in range(num_branches + 1)]  # type: ignore[misc]


def _times(row: _Four, factor: float) -> _Four:
    return row[0] * factor, row[1] * factor, row[2] * factor, row[3] * factor


def _minus(row: _Four, less: _Four) -> _Four:
    a, b, c, d = (max(x - y, 0.0) for x, y in zip(row, less, strict=True))
    return a, b, c, d


def _curves(by_samples: dict[int, _Four]) -> Work:
    """Curves through the origin: no samples, no work."""
    points = [(0.0, (0.0,) * 4), *sorted((float(n), row) for n, row in by_samples.items() if n)]
    return Work(*(Curve(tuple((n, row[i]) for n, row in points)) for i in range(4)))

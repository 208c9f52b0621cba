"""The chain's dynamic programming against every way there is, with options made so that labels differ much."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from anabranch.schedulers.chain import GROUP, OWN, Chain, Option, evaluate, solve, to_go
from anabranch.schedulers.fit import fit
from anabranch.schedulers.memory import Bytes
from anabranch.schedulers.options import efficient

INFINITE = float("inf")


def random_chain(random: Random, num_limits: int) -> Chain:
    """Backlogs as long as compute, buckets of several elements, units, and limits that bind."""
    num = random.randint(2, 6)

    def option(rows: int) -> Option:
        waiting, drain = random.choice([0.0, 2.0, 5.0]) * random.random(), 4 * random.random()
        memory = tuple(
            Bytes(*(random.uniform(0, most) for most in (6, 8, 12, 5, 5, 6))) for _ in range(num_limits)
        )
        return Option(rows, drain + random.random(), drain, waiting, memory, None)

    same = random.random() < 0.4
    tied = {i for i in range(num) if random.random() < 0.5} if same else set[int]()
    rows = [OWN, *(random.choice([OWN, GROUP]) for _ in range(2))]
    options = [
        [option(which) for which in (rows if i in tied else rows[: random.randint(1, 3)])] for i in range(num)
    ]
    return Chain(
        options,
        [(random.random(), random.random() - 0.4) for _ in range(num)],  # what a change saves may be more
        [i == 0 or random.random() < 0.5 for i in range(num)],
        [7 if i in tied and len(tied) > 1 else None for i in range(num)],
        tuple(random.uniform(0.5, 1.2) * 7 * num + 8 for _ in range(num_limits)),
        [tuple(random.choice([0.0, 6.0]) for _ in range(num_limits)) for _ in range(num)],
    )


def ways(chain: Chain) -> list[tuple[float, tuple[int, ...]]]:
    """All that keep units and limits, with their seconds."""
    found = []
    for path in product(*(range(len(options)) for options in chain.options)):
        tied = {position for position, unit in zip(path, chain.unit, strict=True) if unit is not None}
        seconds, used = evaluate(chain, path)
        if len(tied) <= 1 and all(u <= limit for u, limit in zip(used, chain.limits, strict=True)):
            found.append((seconds, path))
    return found


@pytest.mark.parametrize("num_limits", [0, 1, 2])
def test_solve_finds_the_best_way(num_limits: int) -> None:
    """With and without memory limits; none where none fits; bounds hold when labels are dropped."""
    fits = 0
    for seed in range(400):
        chain = random_chain(Random(seed), num_limits)
        all_ways = ways(chain)
        best = min(all_ways)[0] if all_ways else INFINITE
        found = solve(chain)
        assert found.seconds == pytest.approx(best), seed
        assert found.is_exact
        if all_ways:
            fits += 1
            assert found.path in [path for _, path in all_ways]
            assert min(to_go(chain)[-1]) <= best + 1e-9
            narrow = solve(chain, width=1)
            assert narrow.bound <= best + 1e-9
            assert narrow.seconds >= best - 1e-9
            assert solve(chain, below=best * (1 - 1e-9)).path == ()
        if num_limits:
            priced = fit(chain)
            assert priced.bound <= best + 1e-9
            assert priced.seconds >= best - 1e-9
            assert not priced.path or priced.path in [path for _, path in all_ways]
        if all(unit is None for unit in chain.unit):
            fewer = Chain(
                [efficient(list(options)) for options in chain.options],
                chain.change_s,
                chain.closes,
                chain.unit,
                chain.limits,
                chain.gathered,
            )
            assert solve(fewer).seconds == pytest.approx(best), seed
    assert fits > 100

"""Each collective against DTensor's pair or one-device autograd, forward and backward, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import collectives_ranks as on_ranks
import pytest
from ranks import run_ranks

# name, world size, arguments
CHECKS: list[tuple[str, int, tuple[Any, ...]]] = [
    ("copy_and_reduce", 2, ((0, 1),)),
    ("copy_and_reduce", 2, ((1,),)),
    ("copy_and_reduce", 3, ((0, 2),)),
    ("copy_and_reduce_tuple", 2, ()),
    ("copy_and_reduce_tuple", 3, ()),
    ("against_dtensor", 2, ()),
    ("against_dtensor", 3, ()),
    ("gather", 2, ((3, 3),)),
    ("gather", 2, ((4, 1),)),
    ("gather", 2, ((0, 3),)),
    ("gather", 2, ((0, 0),)),
    ("gather", 3, ((2, 2, 2),)),
    ("gather", 3, ((0, 5, 2),)),
    ("reduce_to", 2, ((3, 3), (0, 1))),
    ("reduce_to", 2, ((4, 1), (1,))),
    ("reduce_to", 2, ((0, 3), (0,))),
    ("reduce_to", 3, ((2, 2, 2), (0, 1, 2))),
    ("reduce_to", 3, ((0, 5, 2), (0, 2))),
    ("half_precision", 3, ()),
    ("half_in_parts", 2, ()),
    ("half_in_parts", 3, ()),
    ("order_of_exchanges", 2, ()),
]


def run_checks(
    rank: int, world_size: int, checks: Sequence[tuple[str, tuple[Any, ...]]], shared: bool
) -> None:
    if shared:
        on_ranks.share_memory()
    for name, args in checks:
        getattr(on_ranks, name)(rank, world_size, *args)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_pairs_equal_their_oracles(world_size: int, shared: bool) -> None:
    checks = [(name, args) for name, size, args in CHECKS if size == world_size]
    run_ranks(world_size, run_checks, checks, shared)


def defects(rank: int, world_size: int, shared: bool) -> dict[str, bool]:
    if shared:
        on_ranks.share_memory()
    pairs = ("copy", "reduce", "gather", "scatter", "reduce_to")
    return {pair: on_ranks.with_second_all_reduce(rank, world_size, pair) for pair in pairs}


@pytest.mark.parametrize("shared", [False, True])
def test_a_second_all_reduce_in_backward_is_found(shared: bool) -> None:
    assert all(all(found.values()) for found in run_ranks(2, defects, shared))


def test_a_sum_needs_its_gradient_on_all_ranks_alike() -> None:
    assert run_ranks(2, on_ranks.needs_grad_everywhere) == [True, True]

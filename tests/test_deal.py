"""Samples are dealt in BN groups: everything once, in order, whole groups where there are enough."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from anabranch.runtime.deal import Deal, Share, deal_step, even_parts

steps = st.fixed_dictionaries(
    {
        "num_samples": st.integers(1, 70),
        "bn_batch_size": st.integers(1, 40),
        "data": st.integers(1, 5),
        "branch": st.integers(1, 4),
        "accumulation": st.integers(1, 5),
    }
)


def _is_in_order(shares: list[Share], start: int, stop: int) -> bool:
    edges = [start, *(share.stop for share in shares)]
    return [share.start for share in shares] == edges[:-1] and edges[-1] == stop


def _group_parts(deal: Deal, shares: list[Share]) -> list[list[int]]:
    """By group, the sizes of its parts in the order of the shares."""
    parts: list[list[int]] = [[] for _ in deal.group_sizes]
    for share in shares:
        for index, size in enumerate(share.group_sizes):
            parts[share.first_group + index].append(size)
    return parts


@given(steps)
def test_every_sample_is_dealt_once_and_in_order(step: dict[str, Any]) -> None:
    deals = deal_step(**step)
    start = 0
    for deal in deals:
        assert deal.start == start
        start += deal.num_samples
        assert _is_in_order(list(deal.replicas), 0, deal.num_samples)
        for replica, ranks in zip(deal.replicas, deal.ranks, strict=True):
            assert _is_in_order(list(ranks), replica.start, replica.stop)
            assert len(ranks) == step["branch"]
        for shares in (list(deal.replicas), [share for row in deal.ranks for share in row]):
            assert all(share.stop - share.start == sum(share.group_sizes) for share in shares)
            assert [sum(parts) for parts in _group_parts(deal, shares)] == list(deal.group_sizes)
        assert len(deal.replicas) == step["data"]
    assert start == step["num_samples"]


@given(steps)
def test_groups_differ_by_at_most_one_and_larger_come_first(step: dict[str, Any]) -> None:
    deals = deal_step(**step)
    sizes = [size for deal in deals for size in deal.group_sizes]
    assert len(sizes) == -(-step["num_samples"] // step["bn_batch_size"])
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert sizes[0] <= step["bn_batch_size"]
    assert len(deals) == min(step["accumulation"], len(sizes))
    counts = [len(deal.group_sizes) for deal in deals]
    assert max(counts) - min(counts) <= 1


@given(steps)
def test_groups_are_cut_only_where_there_are_fewer_than_takers(step: dict[str, Any]) -> None:
    for deal in deal_step(**step):
        replica_parts = _group_parts(deal, list(deal.replicas))
        assert deal.groups_span_replicas == any(len(parts) > 1 for parts in replica_parts)
        if len(deal.group_sizes) >= step["data"]:
            assert not deal.groups_span_replicas
            counts = [len(replica.group_sizes) for replica in deal.replicas]
        else:
            counts = [replica.stop - replica.start for replica in deal.replicas]
            assert all(max(parts) - min(parts) <= 1 for parts in replica_parts)
        if len(deal.group_sizes) >= step["data"]:
            assert max(counts) - min(counts) <= 1
        for replica, ranks in zip(deal.replicas, deal.ranks, strict=True):
            if len(replica.group_sizes) >= step["branch"]:
                held = [len(share.group_sizes) for share in ranks]
                assert sum(held) == len(replica.group_sizes)
                assert max(held) - min(held) <= 1
        ranks_parts = _group_parts(deal, [share for row in deal.ranks for share in row])
        assert deal.groups_span_ranks == any(len(parts) > 1 for parts in ranks_parts)


@given(st.integers(1, 30), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_weights_are_respected(num_groups: int, weights: list[int], per_group: int) -> None:
    (deal,) = deal_step(
        num_groups * per_group, bn_batch_size=per_group, data=len(weights), branch=1, samples=weights
    )
    if num_groups >= len(weights):
        counts = [len(replica.group_sizes) for replica in deal.replicas]
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - num_groups * weight / sum(weights)) < 1


def test_what_the_drawings_show() -> None:
    (deal,) = deal_step(12, bn_batch_size=3, data=2, branch=2)
    assert deal.group_sizes == (3, 3, 3, 3)
    assert deal.replicas == (Share(0, 6, 0, (3, 3)), Share(6, 12, 2, (3, 3)))
    assert deal.ranks[1] == (Share(6, 9, 2, (3,)), Share(9, 12, 3, (3,)))
    assert not deal.groups_span_replicas
    assert not deal.groups_span_ranks
    (deal,) = deal_step(12, bn_batch_size=12, data=2, branch=2)
    assert deal.replicas == (Share(0, 6, 0, (6,)), Share(6, 12, 0, (6,)))
    assert [share.stop for row in deal.ranks for share in row] == [3, 6, 9, 12]
    assert deal.groups_span_replicas
    assert deal.groups_span_ranks


def test_fewer_samples_than_ranks_leave_some_without() -> None:
    (deal,) = deal_step(1, bn_batch_size=8, data=2, branch=2)
    assert [share.group_sizes for row in deal.ranks for share in row] == [(1,), (), (), ()]
    assert not deal.groups_span_ranks


def test_micro_batches_are_whole_groups() -> None:
    deals = deal_step(10, bn_batch_size=2, data=1, branch=2, accumulation=3)
    assert [(deal.start, deal.group_sizes) for deal in deals] == [(0, (2, 2)), (4, (2, 2)), (8, (2,))]


def test_uneven_replicas() -> None:
    (deal,) = deal_step(16, bn_batch_size=4, data=2, branch=1, samples=(3, 1))
    assert [replica.group_sizes for replica in deal.replicas] == [(4, 4, 4), (4,)]


def test_even_parts() -> None:
    assert even_parts(7, 3) == [3, 2, 2]

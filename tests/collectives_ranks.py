"""What the ranks of test_collectives run. Every function returns plain data or raises on the rank that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn import functional as F

from anabranch.blocks.convolution import WeightGradients
from anabranch.blocks.stacked import StackedConv2d
from anabranch.runtime import collectives, exchange, process_group
from anabranch.runtime.branch_exchange import BranchExchange
from anabranch.runtime.collectives import (
    copy_to_branches,
    gather_samples,
    reduce_from_branches,
    reduce_to_samples,
    scatter_samples,
)
from anabranch.runtime.wire import SumInParts, Wire

Sizes = tuple[int, ...]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_memory() -> None:
    """What these checks exchange goes through shared memory from here on."""
    group = _world().group
    process_group.share_memory(group)
    assert exchange.shares_memory(group)


def _world() -> Wire:
    group = dist.group.WORLD
    assert group is not None
    return Wire(group)


def _close(mine: Tensor | None, reference: Tensor | None) -> None:
    assert reference is not None
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-13)


def copy_and_reduce(rank: int, world_size: int, holders: Sizes) -> None:
    """s = Σ_r w_r·h over the ranks in `holders`, y = h·s + s² against one-device autograd; h a tensor and a tuple."""
    weights = [_random(3, 4, seed=r).requires_grad_() for r in range(world_size)]
    x = _random(3, 4, seed=99).requires_grad_()
    h = x.sin()
    s = sum((weights[r] * h for r in holders), torch.zeros(3, 4, dtype=torch.float64))
    (h * s + s.square()).sum().backward()

    mine = _random(3, 4, seed=rank).requires_grad_()
    own_x = _random(3, 4, seed=99).requires_grad_()
    own_h = own_x.sin()
    copied = copy_to_branches(own_h, _world())
    assert isinstance(copied, Tensor)
    partial = mine * copied if rank in holders else torch.zeros(3, 4, dtype=torch.float64)
    total = reduce_from_branches(partial, copied, _world())
    _close(total, s)
    (own_h * total + total.square()).sum().backward()
    _close(own_x.grad, x.grad)
    if rank in holders:
        _close(mine.grad, weights[rank].grad)


def copy_and_reduce_tuple(rank: int, world_size: int) -> None:
    """The hidden form is (a, b, indices): floats are copied, the others passed on."""
    weights = [_random(3, 4, seed=r).requires_grad_() for r in range(world_size)]
    x = _random(3, 4, seed=99).requires_grad_()
    sums = [weights[r] * x.sin() + weights[r] * x.cos() * r for r in range(world_size)]
    s = torch.stack(sums).sum(0)
    (s.square() + x.sin() * s).sum().backward()

    mine = _random(3, 4, seed=rank).requires_grad_()
    own_x = _random(3, 4, seed=99).requires_grad_()
    indices = torch.arange(3)
    a, b, same = copy_to_branches((own_x.sin(), own_x.cos(), indices), _world())
    assert same is indices
    total = reduce_from_branches(mine * a + mine * b * rank, (a, b, same), _world())
    _close(total, s)
    (total.square() + own_x.sin() * total).sum().backward()
    _close(own_x.grad, x.grad)
    _close(mine.grad, weights[rank].grad)


def against_dtensor(rank: int, world_size: int) -> None:
    """DTensor's own pairs: Replicate → (local) → Partial → Replicate."""
    mesh = init_device_mesh("cpu", (world_size,))
    weight = _random(3, 4, seed=rank)
    results = []
    for oracle in (True, False):
        x = _random(3, 4, seed=99).requires_grad_()
        if oracle:
            spread = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
            local = spread.to_local(grad_placements=[Partial()])
            total = DTensor.from_local(local * weight, mesh, [Partial()], run_check=False)
            y = total.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
        else:
            copied = copy_to_branches(x, _world())
            assert isinstance(copied, Tensor)
            y = reduce_from_branches(copied * weight, copied, _world())
        y.cos().sum().backward()
        results.append((y.detach(), x.grad))
    _close(results[1][0], results[0][0])
    _close(results[1][1], results[0][1])


def gather(rank: int, world_size: int, sizes: Sizes) -> None:
    """Samples → all samples → back, against autograd on the whole; also DTensor's Shard ↔ Replicate."""
    n, start = sum(sizes), sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    x = _random(n, 2, 3, seed=1)
    weight = _random(n, 2, 3, seed=2)

    mine = x[rows].clone().requires_grad_()
    everything = gather_samples(mine, sizes, _world())
    _close(everything, x)
    (everything.sin() * weight).sum().backward()
    _close(mine.grad, x[rows].cos() * weight[rows])

    whole = x.clone().requires_grad_()
    part = scatter_samples(whole, sizes, _world())
    _close(part, x[rows])
    (part.sin() * weight[rows]).sum().backward()
    _close(whole.grad, x.cos() * weight)

    mesh = init_device_mesh("cpu", (world_size,))
    whole = x.clone().requires_grad_()
    spread = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
    if len(set(sizes)) == 1:  # DTensor shards evenly
        oracle = spread.redistribute(placements=[Shard(0)]).to_local(grad_placements=[Shard(0)])
        (oracle.sin() * weight[rows]).sum().backward()
        _close(oracle, part)
        _close(whole.grad, x.cos() * weight)

    _close(
        exchange.all_gather(x[rows].transpose(1, 2), sizes, _world().group), x.transpose(1, 2)
    )  # not contiguous
    labels = torch.arange(n)
    assert torch.equal(exchange.all_gather(labels[rows], sizes, _world().group), labels)


def reduce_to(rank: int, world_size: int, sizes: Sizes, holders: Sizes) -> None:
    """y = h + Σ_r w_r·h over the ranks in `holders`, of which each rank has its rows; h = sin x is also the skip.

    Against autograd on one device; also DTensor's Partial → Shard; images with channels innermost, in parts, in half.
    """
    n, start = sum(sizes), sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    shape = (n, 4, 3, 2)
    weights = [_random(*shape, seed=r).requires_grad_() for r in range(world_size)]
    x = _random(*shape, seed=99).requires_grad_()
    h = x.sin()
    y = h + sum((weights[r] * h for r in holders), torch.zeros(shape, dtype=torch.float64))
    y.square().sum().backward()

    for channels_last, chunks in ((False, 1), (True, 1), (False, 3), (True, 2)):
        wire = Wire(_world().group, channels_last=channels_last, chunks=chunks)
        mine = _random(*shape, seed=rank).requires_grad_()
        own_x = _random(*shape, seed=99).requires_grad_()
        own_h = own_x.sin()
        copied = copy_to_branches(own_h, wire)
        assert isinstance(copied, Tensor)
        partial = mine * copied if rank in holders else torch.zeros(shape, dtype=torch.float64)
        sums = SumInParts(wire, sizes) if chunks > 1 else None
        own = reduce_to_samples(partial, own_h, copied, sizes, wire, sums)
        _close(own, y[rows])
        own.square().sum().backward()
        _close(own_x.grad, x.grad)
        if rank in holders:
            _close(mine.grad, weights[rank].grad)

    if len(set(sizes)) == 1 and n:  # DTensor shards evenly
        mesh = init_device_mesh("cpu", (world_size,))
        results = []
        for oracle in (True, False):
            s = _random(*shape, seed=rank).requires_grad_()
            if oracle:
                total = DTensor.from_local(s, mesh, [Partial()], run_check=False)
                own = total.redistribute(placements=[Shard(0)]).to_local(grad_placements=[Shard(0)])
            else:
                own = reduce_to_samples(s, torch.zeros_like(s), s, sizes, _world())
            own.cos().sum().backward()
            results.append((own.detach(), s.grad))
        _close(results[1][0], results[0][0])
        _close(results[1][1], results[0][1])


def half_precision(rank: int, world_size: int) -> None:
    """bfloat16 travels and is added as float32: 256 + 1 + 1 + … is not 256."""
    s = torch.full((world_size,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    expected = float(torch.tensor(256.0 + world_size - 1).bfloat16())
    total = reduce_from_branches(s, s, _world())
    assert total.dtype == torch.bfloat16
    assert total.tolist() == [expected] * world_size
    own = reduce_to_samples(s, torch.zeros_like(s), s, (1,) * world_size, _world())
    assert (own.dtype, own.tolist()) == (torch.bfloat16, [expected])
    wire, s = Wire(_world().group, half=True), torch.full((world_size,), 1 + 2**-9)  # rounds to 1
    own = reduce_to_samples(s, torch.zeros(world_size), s, (1,) * world_size, wire)
    assert (own.dtype, own.tolist()) == (torch.float32, [float(world_size)])


def half_in_parts(rank: int, world_size: int) -> None:
    """What a convolution sends as bfloat16 in parts is float32 before and after, as in one piece: so are gradients."""
    results = []
    for chunks in (1, 2):
        wire = Wire(_world().group, half=True, chunks=chunks, channels_last=True)
        conv = StackedConv2d("sum", 1, 1, 1, 1)
        with torch.no_grad():
            conv.weight.fill_(1 + 2**-9)  # as bfloat16: 1
        h = torch.ones(5, 1, 2, 2, requires_grad=True)
        total = BranchExchange(wire)(lambda h, conv=conv: conv(h, is_last=True), h)  # type: ignore[misc]
        assert (total.dtype, total.unique().tolist()) == (torch.float32, [float(world_size)])
        total.backward(torch.full_like(total, 1 + 2**-9))
        assert conv.weight.grad is not None
        assert float(conv.weight.grad) == 20 * (1 + 2**-9), "its gradient never travelled"
        assert h.grad is not None
        results.append(h.grad)
    assert torch.equal(*results)


def order_of_exchanges(rank: int, world_size: int) -> None:
    """A chunk leaves before the next is computed, the input's gradient before the weights' are; waits come last."""
    log: list[str] = []

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            log.append(name)
            result = function(*args, **options)
            return LoggedWork(result) if name == "send" else result

        return call

    class LoggedWork:
        def __init__(self, work: exchange.Work) -> None:
            self.wait = logged("wait", work.wait)

    conv = StackedConv2d("sum", 1, 1, 1, 1)
    wire = Wire(_world().group, overlap=True, chunks=3)
    h = torch.ones(6, 1, 2, 2, requires_grad=True)
    with (
        mock.patch.object(exchange, "begin_sum", logged("send", exchange.begin_sum)),
        mock.patch.object(F, "conv2d", logged("compute", F.conv2d)),
        mock.patch.object(WeightGradients, "run", logged("weights", WeightGradients.run)),
    ):
        total = BranchExchange(wire)(lambda h: conv(h, is_last=True), h)
        assert log == ["compute", "send"] * 3 + ["wait"] * 3, log
        log.clear()
        total.sum().backward()
    assert log == ["send", "weights", "wait"], log
    assert conv.weight.grad is not None


def needs_grad_everywhere(rank: int, world_size: int) -> bool:
    """Whether the sum needs a gradient is the same on a rank without branches and before any parameter."""
    x = torch.ones(2)
    weight = torch.ones(2, requires_grad=True)
    total = reduce_from_branches(weight * x if rank == 0 else torch.zeros(2), x, _world())
    with torch.no_grad():
        assert not reduce_from_branches(x, x, _world()).requires_grad
    return total.requires_grad


def with_second_all_reduce(rank: int, world_size: int, pair: str) -> bool:
    """Whether the pair's test fails when its backward all-reduces once more, as torch's functional collectives do."""
    pairs: dict[str, tuple[Any, Callable[..., None]]] = {
        "copy": (collectives._Copy, copy_and_reduce),
        "reduce": (collectives._Reduce, copy_and_reduce),
        "gather": (collectives._Gather, gather),
        "scatter": (collectives._Scatter, gather),
        "reduce_to": (collectives._ReduceTo, reduce_to),
    }
    function, check = pairs[pair]
    backward: Callable[..., Any] = function.backward

    def again(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if pair == "scatter":
            first, *rest = backward(ctx, *grads)
            assert first is not None
            exchange.all_reduce(first, _world().group).wait()
            return first, *rest
        summed = grads[0].clone()
        exchange.all_reduce(summed, _world().group).wait()
        result: tuple[Tensor | None, ...] = backward(ctx, summed)
        return result

    arguments: tuple[Sizes, ...] = ((2,) * world_size,)
    if check is copy_and_reduce:
        arguments = (tuple(range(world_size)),)
    elif check is reduce_to:
        arguments = (*arguments, tuple(range(world_size)))
    with mock.patch.object(function, "backward", staticmethod(again)):
        try:
            check(rank, world_size, *arguments)
        except AssertionError:
            return True
    return False

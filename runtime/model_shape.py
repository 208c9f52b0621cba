"""What a network's elements are, without running them on anything: bytes, multiply-adds, kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from anabranch.blocks.branch_sum import BranchSum, branch_sums
from anabranch.blocks.multi_residual import MultiResidual
from anabranch.blocks.network import named_blocks
from anabranch.runtime.step import autocast
from anabranch.runtime.wire import sent_dtype
from anabranch.schedulers import ModelSpec
from anabranch.schedulers.analytic import ElementShape, PartShape
from anabranch.schedulers.costs import ParameterBytes


def model_shape(
    network: nn.Module, spec: ModelSpec, precision: str = "fp32", *, half_wire: bool = False
) -> dict[str, ElementShape]:
    """Every element of a one-device network for one sample, for `analytic_costs`, counted without computing it.

    precision, half_wire: as of `traffic`, for what is exchanged.
    """
    moved, parameters = traffic(network, precision, half_wire=half_wire), parameter_bytes(network, spec)
    meta = copy.deepcopy(network).to("meta").eval()
    x = torch.empty(1, *network.input_shape, device="meta", dtype=next(meta.parameters()).dtype)  # type: ignore[misc]
    found: dict[str, ElementShape] = {}
    for name, module in [("stem", meta.stem), *named_blocks(meta), ("head", meta.head)]:
        whole, y = _run(module, x)  # type: ignore[arg-type]
        sums = branch_sums(module)  # type: ignore[arg-type]
        replicated: _Amount = whole
        branches: tuple[PartShape, ...] = ()
        if sums:
            replicated = _without_branches(module, sums, x)  # type: ignore[arg-type]
            num = spec.by_name[name].num_branches
            each = [(a - b) / num for a, b in zip(whole, replicated, strict=True)]
            branches = (PartShape(each[0], each[1], max(round(whole[2] - replicated[2]), 1)),) * num
            if name in unequal_blocks(network):
                branches = tuple(_alone(sums, x, replicated, module, b) for b in range(num))  # type: ignore[arg-type]
        found[name] = ElementShape(_part(replicated), branches, *moved[name], parameters[name])
        x = y
    return found


_Amount = tuple[float, float, float]  # multiply-adds, bytes of results, kernels


def _run(module: nn.Module, x: Tensor) -> tuple[_Amount, Tensor]:
    with torch.no_grad(), _Results() as results, FlopCounterMode(display=False) as flops:
        y = module(x)
    return (flops.get_total_flops() / 2, results.num_bytes, results.num_kernels), y


def _without_branches(module: nn.Module, sums: Sequence[tuple[str, BranchSum]], x: Tensor) -> _Amount:
    """What `enter` and `join` do: the branches' sums come from a run before."""
    shapes: list[tuple[int, ...]] = []

    def remember(partial_sum: Callable[[Any], Tensor], h: Any) -> Tensor:
        s = partial_sum(h)
        shapes.append(tuple(s.shape))
        return s

    def give(partial_sum: Callable[[Any], Tensor], h: Any) -> Tensor:
        return torch.empty(shapes.pop(0), device="meta", dtype=x.dtype)

    amount: _Amount = (0.0, 0.0, 0.0)
    for exchange in (remember, give):
        for _, block_sum in sums:
            block_sum.exchange = exchange
        amount, _ = _run(module, x)
    for _, block_sum in sums:
        block_sum.exchange = None
    return amount


def _alone(
    sums: Sequence[tuple[str, BranchSum]], x: Tensor, replicated: _Amount, module: nn.Module, branch: int
) -> PartShape:
    alone = copy.deepcopy(module)
    for path, block_sum in branch_sums(alone):
        one = block_sum.shard((branch,))
        if path:
            parent, _, key = path.rpartition(".")
            setattr(alone.get_submodule(parent), key, one)
        else:
            alone = one
    amount, _ = _run(alone, x)
    return _part(tuple(max(a - b, 0.0) for a, b in zip(amount, replicated, strict=True)))  # type: ignore[arg-type]


def _part(amount: _Amount) -> PartShape:
    return PartShape(amount[0], amount[1], max(round(amount[2]), 0))


class _Results(TorchDispatchMode):
    """Counts operators that make something new, and the bytes of what they make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes, self.num_kernels = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.num_kernels += 1
            self.num_bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def unequal_blocks(network: nn.Module) -> frozenset[str]:
    """Blocks whose branches are modules of their own, each with its own cost."""
    return frozenset(
        name
        for name, block in named_blocks(network)
        if any(isinstance(one, MultiResidual) for _, one in branch_sums(block))
    )


def traffic(
    network: nn.Module, precision: str = "fp32", *, half_wire: bool = False
) -> dict[str, tuple[float, float, float]]:
    """Of each element, bytes a sample: its partial sums, gradients of what its branches read, its input.

    precision: `train.precision`, in which inputs travel. half_wire: whether sums travel as bf16 (`mesh.wire`).
    """
    network = copy.deepcopy(network).eval()
    like = next(network.parameters())
    found: dict[str, list[float]] = {}
    x = torch.zeros(2, *network.input_shape, dtype=like.dtype, device=like.device)  # type: ignore[misc]

    def sent_bytes(x: Tensor) -> float:
        return x.numel() / 2 * sent_dtype(x.dtype, half=half_wire).itemsize

    def exchange(name: str) -> Callable[..., Tensor]:
        def one(partial_sum: Callable[[Any], Tensor], h: Any) -> Tensor:
            s = partial_sum(h)
            parts = [h] if isinstance(h, Tensor) else list(h)
            found[name][0] += sent_bytes(s)
            found[name][1] += sum(sent_bytes(p) for p in parts if p.is_floating_point())
            return s

        return one

    with torch.no_grad(), autocast(precision, like.device):
        for name, module in [("stem", network.stem), *named_blocks(network), ("head", network.head)]:
            found[name] = [0.0, 0.0, x.nbytes / 2]
            for _, block_sum in branch_sums(module):  # type: ignore[arg-type]
                block_sum.exchange = exchange(name)
            x = module(x)  # type: ignore[operator]
    return {name: (a, b, c) for name, (a, b, c) in found.items()}


def parameter_bytes(network: nn.Module, spec: ModelSpec) -> dict[str, ParameterBytes]:
    """Of each element, without parameters that several elements share."""
    shared = {id(network.get_parameter(name)) for name in spec.users}
    found = {}
    for name, module in [("stem", network.stem), *named_blocks(network), ("head", network.head)]:
        sizes = _sizes(module, lambda p: id(p) not in shared)  # type: ignore[arg-type]
        num_branches = spec.by_name[name].num_branches if name in spec.by_name else 0
        found[name] = _added(sizes, num_branches)
    return found


def shared_bytes(network: nn.Module, spec: ModelSpec) -> dict[str, ParameterBytes]:
    """Of each parameter that several elements share."""
    found = {}
    elements = {"stem": network.stem, **dict(named_blocks(network)), "head": network.head}
    for name, users in spec.users.items():
        wanted = network.get_parameter(name)
        sizes = _sizes(elements[users[0]], lambda p, wanted=wanted: p is wanted)  # type: ignore[arg-type,misc]
        num_branches = spec.by_name[users[0]].num_branches if users[0] in spec.by_name else 0
        found[name] = _added(sizes, num_branches)
    return found


def _sizes(module: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> list[tuple[int | None, int]]:
    """(branch or None for all, bytes) of a module's parameters, each once."""
    owners = {
        f"{path}.{name}".lstrip("."): owner
        for path, block_sum in branch_sums(module)
        for name, owner in block_sum.branch_tensors().items()
    }
    found: list[tuple[int | None, int]] = []
    for name, parameter in module.named_parameters():
        if not wanted(parameter):
            continue
        if name in owners:
            found += [
                (branch, part.numel() * part.element_size())
                for branch, part in owners[name].slices(parameter)
            ]
        else:
            found.append((None, parameter.numel() * parameter.element_size()))
    return found


def _added(sizes: Sequence[tuple[int | None, int]], num_branches: int) -> ParameterBytes:
    replicated = sum(size for branch, size in sizes if branch is None)
    branches = tuple(sum(size for b, size in sizes if b == branch) for branch in range(num_branches))
    return ParameterBytes(replicated, branches)

"""`BranchSum`: the one abstraction. A residual computed as a sum of terms, here called branches.

        x ──► enter ──► h ──► branch 0 ─┐
        │               │──► branch 1 ──┼─► s ──► join(x, h, s) ──► y
        │               └──► branch 2 ─┘            ▲
        └───────────────────────────────────────────┘

`enter` and `join` are replicated wherever the block runs; a copy holds the parameters of some branches only.
A runtime that keeps the others elsewhere sets `exchange`; the module itself knows of one device. Where `join` is
skip_term(x, h) + s, some rows of y need those rows of s only: a runtime may ask for them alone (`edge`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal, Self

import torch
from torch import Tensor, nn

from anabranch.blocks.batch import batch_layout
from anabranch.blocks.convolution import exchanging
from anabranch.blocks.errors import ModelError
from anabranch.blocks.norm import BatchNorm

Hidden = Tensor | tuple[Tensor, ...]
Execution = Literal["fused", "mixed", "looped"]


@dataclass(frozen=True)
class BranchTensor:
    """How a parameter or buffer belongs to branches.

    held: the branches (indices in the whole block) whose values it contains, in order.
    dim: the dim along which they are stacked in equal slices; None: the whole tensor is one branch's.
    """

    held: tuple[int, ...]
    dim: int | None = None

    def slices(self, tensor: Tensor) -> list[tuple[int, Tensor]]:
        """(branch, view of its slice) for each held branch."""
        if self.dim is None:
            return [(self.held[0], tensor)]
        return list(zip(self.held, tensor.chunk(len(self.held), self.dim), strict=True)) if self.held else []


class BranchSum(nn.Module):
    """y = join(x, h, Σ_b branch_b(h)) with h = enter(x). Subclasses give `enter`, `branches`, `skip_term` or `join`.

    Branches lie either as modules in `self.branch`, a ModuleDict with the keys "0", "1", …, or stacked in
    tensors, which `branch_tensors` then names.

    num_branches: terms of the sum, over all copies.
    held: the branches this copy has parameters of, ascending; all of them on one device.
    exchange: set by a runtime that holds the other branches elsewhere. Called as exchange(partial_sum, h), it
        returns the sum over all branches.
    edge: set while a runtime wants some rows of y, where `ends_in_sum`. Called as edge(partial_sum, h, skip), where
        skip() is for all rows, it returns them.
    execution: "fused" runs the held branches as one wide computation where the class can, "looped" one after another,
        "mixed" (where the class can) as fused, but grouped convolutions branch by branch; equal up to rounding.
    """

    exchange: Callable[[Callable[[Hidden], Tensor], Hidden], Tensor] | None = None
    edge: Callable[[Callable[[Hidden], Tensor], Hidden, Callable[[], Tensor]], Tensor] | None = None
    execution: Execution = "fused"

    def __init__(self, num_branches: int) -> None:
        super().__init__()
        if num_branches < 1:
            raise ModelError(f"{type(self).__name__} needs at least one branch, got {num_branches}")
        self.num_branches = num_branches
        self.held: tuple[int, ...] = tuple(range(num_branches))
        self._shape_oracle: tuple[BranchSum] | None = None  # in a tuple: not a submodule, holds no memory

    def enter(self, x: Tensor) -> Hidden:
        """What all branches read: x itself, its normalised form, shared first layers (or a tuple of such)."""
        return x

    def branches(self, h: Hidden) -> Tensor:
        """Σ branch_b(h) over the held branches (at least one)."""
        raise NotImplementedError

    def skip_term(self, x: Tensor, h: Hidden) -> Tensor:
        """What `join` adds to the whole sum, of its shape or broadcast to it; x itself unless overridden."""
        return x

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        """The output from the input, the hidden form and the whole sum; skip_term(x, h) + s unless overridden."""
        return self.skip_term(x, h) + s

    @property
    def executions(self) -> tuple[Execution, ...]:
        """Those that are not the same here; any other runs as the first."""
        return ("fused", "looped") if len(self.held) > 1 else ("fused",)

    @property
    def ends_in_sum(self) -> bool:
        """Whether the output is skip_term(x, h) + s, and nothing follows."""
        return type(self).join is BranchSum.join and type(self).forward is BranchSum.forward

    def branch_tensors(self) -> dict[str, BranchTensor]:
        """The branches' parameters and buffers (names relative to this module); all others are replicated."""
        tensors = chain(
            self.named_parameters(remove_duplicate=False), self.named_buffers(remove_duplicate=False)
        )
        names = [name for name, _ in tensors if name.startswith("branch.")]
        return {name: BranchTensor((int(name.split(".")[1]),)) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        if self.edge is not None:
            return self.edge(self.partial_sum, h, partial(self.skip_term, x, h))
        s = self.partial_sum(h) if self.exchange is None else self.exchange(self.partial_sum, h)
        return self.join(x, h, s)

    def partial_sum(self, h: Hidden) -> Tensor:
        """Σ over the held branches; zeros of the sum's shape where none is held."""
        return self.branches(h) if self.held else self._zeros(h)

    def _zeros(self, h: Hidden) -> Tensor:
        assert self._shape_oracle is not None, "a copy without branches comes from shard(())"
        parts = (h,) if isinstance(h, Tensor) else h  # of which some may be indices or masks
        first = next((part for part in parts if part.is_floating_point()), parts[0])
        oracle = self._shape_oracle[0].to(first.dtype)
        with (
            torch.no_grad(),
            batch_layout(None),
            exchanging(None, None),
            torch.autocast("cpu", enabled=False),
        ):
            shape = oracle.branches(_on_meta(h)).shape
        return torch.zeros(shape, dtype=first.dtype, device=first.device)

    def shard(self, held: Sequence[int], memo: dict[int, object] | None = None) -> Self:
        """The same module with only the parameters of the branches `held`.

        Replicated tensors are the original's own. `memo` (as `copy.deepcopy`'s) keeps parameters shared that
        several modules share: pass one dict for all of them. Raises ModelError if a branch is not held here.
        """
        held = tuple(sorted(held))
        if missing := [b for b in held if b not in self.held]:
            raise ModelError(f"cannot take branches {missing}: this copy holds {list(self.held)}")
        memo = {} if memo is None else memo
        kept = memo.setdefault(id(memo), [])  # deepcopy's own place: an id in the memo must stay its tensor's
        assert isinstance(kept, list)
        oracle = self._shape_oracle
        if not held and oracle is None:
            oracle = (copy.deepcopy(self.shard(self.held[:1])).to("meta").eval(),)
        owned = self.branch_tensors()
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            memo.setdefault(id(tensor), _taken(tensor, owned.get(name), held))
            kept.append(tensor)
        if isinstance(modules := self._modules.get("branch"), nn.ModuleDict):  # the held ones, as they are
            memo[id(modules)] = nn.ModuleDict({key: modules[key] for key in modules if int(key) in held})
        exchange, self.exchange = self.exchange, None
        try:
            mine = copy.deepcopy(self, memo)
        finally:
            self.exchange = exchange
        mine.held = held
        mine._shape_oracle = oracle if not held else None
        for module in mine.modules():
            if isinstance(module, BatchNorm) and module.running_mean is not None:
                module.num_features = module.running_mean.numel()
        return mine

    def extra_repr(self) -> str:
        return f"num_branches={self.num_branches}, held={list(self.held)}"


def branch_sums(module: nn.Module, name: str = "") -> list[tuple[str, BranchSum]]:
    """The outermost BranchSums in a module with their names, in order; a block has one or more."""
    if isinstance(module, BranchSum):
        return [(name, module)]
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    return [found for key, child in children for found in branch_sums(child, f"{name}.{key}".lstrip("."))]


def closing_sum(block: nn.Module) -> BranchSum | None:
    """The BranchSum whose skip_term(x, h) + s is the block's output: the block itself, or the last of a row.

    None where something else follows (a skip that spans several sums, a normalisation), or where it also runs earlier.
    """
    last = block
    while isinstance(last, nn.Sequential) and type(last).forward is nn.Sequential.forward and len(last):
        last = last[-1]
    if not isinstance(last, BranchSum) or not last.ends_in_sum:
        return None
    return last if [found for _, found in branch_sums(block)].count(last) == 1 else None


def _on_meta(h: Hidden) -> Hidden:
    return h.to("meta") if isinstance(h, Tensor) else tuple(part.to("meta") for part in h)


def _taken(tensor: Tensor, owner: BranchTensor | None, held: Iterable[int]) -> Tensor:
    """The held branches' part of a tensor as a tensor of its own; the tensor itself if it is replicated."""
    if owner is None or owner.dim is None or tuple(held) == owner.held:
        return tensor
    parts = [part for branch, part in owner.slices(tensor.detach()) if branch in set(held)]
    taken = torch.cat(parts, owner.dim) if parts else tensor.detach().narrow(owner.dim, 0, 0).clone()
    return nn.Parameter(taken, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else taken

"""Bytes of live tensors along a step, by element: what the memory of a plan is predicted from.

Storages are counted from the operator that makes one until it dies. Of an element, over what is there when its
forward begins (gradients of parameters left out, as how long they stay depends on the plan):

    forward  ┌──── its own ────┐         backward  ┌── most ──┐
    ─────────┘ kept ──────────────── … ────────────┘          └──────
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from anabranch.runtime.parallel_network import ParallelNetwork


@dataclass
class _Stretch:
    """An element's forward or backward. start: bytes at its begin; most: of all moments in it."""

    part: str
    element: str
    start: int
    gradients: int
    most: int


class LiveMemory(TorchDispatchMode):
    """A context around one step of a network whose recorder is detailed; afterwards `by_element`."""

    def __init__(self, network: ParallelNetwork) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network, self.num_bytes = network, 0
        self._known: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()
        self._stretches: list[_Stretch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder = self.network.recorder
        here = (recorder.part, recorder.element)
        if not self._stretches or here != (self._stretches[-1].part, self._stretches[-1].element):
            self._stretches.append(_Stretch(*here, self.num_bytes, self._gradients(), self.num_bytes))
        out = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage.data_ptr() not in given and storage not in self._known:
                self._known.add(storage)
                self.num_bytes += storage.nbytes()
                weakref.finalize(storage, self._died, storage.nbytes()).atexit = False
        self._stretches[-1].most = max(self._stretches[-1].most, self.num_bytes)
        return out

    def _died(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes

    def _gradients(self) -> int:
        return sum(p.grad.nbytes for p in self.network.parameters() if p.grad is not None)

    def of_update(self) -> float:
        """The most that the optimizer has on top of what is there when it begins."""
        found = [s.most - s.start for s in self._stretches if s.part == "optimizer"]
        return float(max(found, default=0))

    def by_element(self) -> dict[str, tuple[float, float]]:
        """Of each element: bytes kept from forward to backward, and the most while it runs; of the last micro-batch."""
        names = [name for name, _, _ in self.network.elements()]
        start: dict[str, int] = {}
        most = dict.fromkeys(names, 0)
        element, turn = names[0], 0  # what belongs to no element (the loss) comes after the last
        for stretch in self._stretches:
            if stretch.part not in ("forward", "backward"):
                continue
            element = stretch.element or element
            if stretch.part == "forward" and stretch.element:
                start[element], most[element] = stretch.start - stretch.gradients, 0
            if stretch.part == "backward" and element == names[-1]:
                turn = turn or stretch.start - stretch.gradients
            most[element] = max(most[element], stretch.most - stretch.gradients)
        ends = [*(start[name] for name in names[1:]), turn]
        return {
            name: (float(max(end - start[name], 0)), float(max(most[name] - start[name], 0)))
            for name, end in zip(names, ends, strict=True)
        }


def _storages(values: Any) -> Iterator[UntypedStorage]:
    for value in tree_iter(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()

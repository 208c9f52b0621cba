"""Which samples the rows of a batch are: the BN groups they form and the keys of their random choices.

Modules do not know of ranks. Whoever runs a network says, around a forward pass, what its tensors' rows are:

    with batch_layout(BatchLayout(group_sizes=(32, 32), num_samples=64, sample_ids=ids, random_key=key)):
        loss = criterion(network(x_NCHW), target_N)

Without a layout every module does what its plain PyTorch counterpart does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anabranch.blocks.errors import ModelError


@dataclass(frozen=True)
class GroupSync:
    """How a BN group whose samples lie in several processes gets one statistic.

    first_group: index, among the batch's groups, of the first group with rows here.
    group_sizes: of all groups in the whole batch, over all processes.
    part, num_parts: this process's slot among those that exchange statistics.
    all_reduce: sums a tensor over those processes, in place, and returns it.
    """

    first_group: int
    group_sizes: tuple[int, ...]
    part: int
    num_parts: int
    all_reduce: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BatchLayout:
    """What the rows of the tensors in a forward pass are.

    group_sizes: rows of each BN group, in order; they sum to the number of rows.
    num_samples: samples of the whole step (all processes, all micro-batches): the weight of a group's
        statistics is its rows ÷ num_samples.
    sample_ids: (rows,) int64, the rows' indices in the data set; None switches to torch's own random numbers.
    random_key: key of the step's random choices, see `anabranch.blocks.random.fold`.
    sync: present where a group's samples lie in several processes.
    """

    group_sizes: tuple[int, ...]
    num_samples: int
    sample_ids: Tensor | None = None
    random_key: int = 0
    sync: GroupSync | None = None

    def check_rows(self, x: Tensor, layer: str) -> None:
        """Raises ModelError where a layer's input has other rows than the batch."""
        num_rows = sum(self.group_sizes)
        if x.shape[0] != num_rows:
            raise ModelError(
                f"{layer} got {x.shape[0]} rows for a batch of {num_rows} samples: keep samples in dim 0, and fold "
                "nothing into it"
            )


class _Current(threading.local):
    layout: BatchLayout | None = None


_current = _Current()
# By module, of its last forward pass. Not kept by the module, which can be copied and saved: a layout cannot.
_last: WeakKeyDictionary[nn.Module, BatchLayout | None] = WeakKeyDictionary()


def current_layout() -> BatchLayout | None:
    """The layout of the batch that this thread is running, None outside `batch_layout`."""
    return _current.layout


def layout_for(module: nn.Module) -> BatchLayout | None:
    """The layout of the batch that a module is running, None outside `batch_layout`.

    Where a user's own checkpoint runs it again in backward, nobody says one: it is that of its last forward pass.
    """
    layout = _current.layout
    if layout is None and is_running_again():
        return _last.get(module)
    if not torch.compiler.is_compiling():  # a graph changes no state
        _last[module] = layout
    return layout


@contextmanager
def batch_layout(layout: BatchLayout | None) -> Iterator[None]:
    """Says what the rows are, for the forward pass inside."""
    before, _current.layout = _current.layout, layout
    try:
        yield
    finally:
        _current.layout = before


def is_running_again() -> bool:
    """Whether this thread is in a backward pass: a forward pass there repeats one, whose activations were not kept.

    What that one counted is not counted twice.
    """
    return torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint asks

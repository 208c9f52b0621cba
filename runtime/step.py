"""One training step on one rank: micro-batches forward and backward, one reduction, one update.

micro-batch 0   forward ── backward            gradients and statistics add up locally
micro-batch 1   forward ── backward ┐          the last one's gradients leave as they become ready
finish          ················ wait ┘ sums   gradients, statistics, loss, hits, requests to stop
apply           clip ── optimizer ── running statistics

On a GPU the host waits once a step, when it reads the small sums after `finish`: whether any rank is to stop must be
known before the update. All ranks' times come with them, of the step before: reading those later would save no wait.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.runtime.exchange import wait_for
from anabranch.runtime.loss import LossFunction, step_share
from anabranch.runtime.optimizer import clip_gradients
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.rank_batch import RankBatch
from anabranch.runtime.recorder import PARTS
from anabranch.runtime.reducer import GradientReducer
from anabranch.runtime.regularizer import OrthogonalityPenalty, OrthogonalityRegularizer

_LOSS, _HITS, _STOP = range(3)
_WIDTH = len(PARTS) + 1  # of a rank's row: its times, and its memory
_MIB = 2**20


@dataclass(frozen=True)
class MicroBatch:
    """One rank's part of a micro-batch: x and target of the rows that the network's stem takes."""

    x: Tensor
    target: Tensor
    rows: RankBatch


@dataclass(frozen=True)
class StepResult:
    """Of the whole step, the same on every rank.

    loss: the mean. num_correct: right answers, 0 where that means nothing. stop: whether any rank asked for
        it. times: [rank] seconds by recorder.PARTS, of the step *before*. memory_bytes: by rank, the most so far.
    """

    loss: float
    num_correct: float
    stop: bool
    times: list[list[float]]
    memory_bytes: list[int]


class TrainStep:
    """Runs steps of one network under one plan.

    precision: as `train.precision`; parameters keep their own. clip_norm: 0 is off.
    """

    def __init__(
        self,
        network: ParallelNetwork,
        optimizer: torch.optim.Optimizer,
        loss: LossFunction,
        *,
        precision: str = "fp32",
        clip_norm: float = 0.0,
        penalty: OrthogonalityPenalty | None = None,
    ) -> None:
        self.network, self.optimizer, self.loss = network, optimizer, loss
        self.regularizer = OrthogonalityRegularizer(network, penalty) if penalty else None
        self.precision, self.clip_norm = precision, clip_norm
        self.recorder = network.recorder
        self.reducer = GradientReducer(network, num_extra=_STOP + 1 + network.mesh.world_size * _WIDTH)
        rank, extra = network.mesh.rank, self.reducer.extra
        self._row = extra[_STOP + 1 + rank * _WIDTH : _STOP + 1 + (rank + 1) * _WIDTH]
        self._clipped = False
        self.output_share = 1.0 if network.output_rows == "own" else 1.0 / network.mesh.branch

    def gradients(self, batches: Sequence[MicroBatch], *, stop: bool = False) -> StepResult:
        """Forward and backward over the step's micro-batches; afterwards every p.grad is whole.

        stop: this rank wants to stop; the result says so on all ranks alike.
        """
        extra, recorder = self.reducer.extra, self.recorder
        with recorder.span("forward"):  # it walks all modules
            self.network.train()
        for index, batch in enumerate(batches):
            with recorder.span("forward"), autocast(self.precision, batch.x.device):
                output = self.network(batch.x, batch.rows)
                target = self.network.to_output_rows(batch.target, batch.rows)
                share = step_share(self.loss, output, target, batch.rows.own.num_samples)
            if index == len(batches) - 1:
                self.reducer.arm()
            with recorder.span("backward"):
                share.backward()
            with recorder.span("forward"), torch.no_grad():
                extra[_LOSS].add_(share.detach() * self.output_share)
                extra[_HITS].add_(num_correct(output, target) * self.output_share)
        with recorder.span("reduction"):
            # to assign it would copy it from the host, behind all of the backward
            extra[_STOP].fill_(float(stop))
            if recorder.enabled:
                self.tell_times(batches[0].x.device)
            self.reducer.finish()
            wait_for(extra.device)
            loss, hits, stops, *told = extra.tolist()
            rows = [told[first : first + _WIDTH] for first in range(0, len(told), _WIDTH)]
            times, memory_bytes = [row[:-1] for row in rows], [round(row[-1] * _MIB) for row in rows]
            result = StepResult(loss, hits, stops > 0, times, memory_bytes)
        if self.regularizer is not None:  # of no sample: whole on every rank, added to what is whole
            with recorder.span("backward"):
                self.regularizer.add_gradients()
        return result

    def tell_times(self, device: torch.device) -> None:
        """Fills this rank's row of what is reduced: the sum over the ranks is the table of all ranks."""
        values = torch.tensor(
            [*self.recorder.times(), peak_memory_bytes(device) / _MIB], dtype=self._row.dtype
        )
        if self._row.is_cuda:  # from other memory the copy would wait for all of the backward
            values = values.pin_memory()
        self._row.copy_(values, non_blocking=True)

    def clip(self) -> None:
        """Scales gradients whose norm is to be clipped: the last exchange of a step (`apply` does it if need be)."""
        if self.clip_norm > 0 and not self._clipped:
            with self.recorder.span("optimizer"):
                clip_gradients(self.network, self.clip_norm)
        self._clipped = True

    def apply(self, lr: float) -> None:
        """Updates parameters and running statistics by the step's gradients, and clears them."""
        self.clip()
        self._clipped = False
        with self.recorder.span("optimizer"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.reducer.commit_statistics()
        self.recorder.end_step()

    def discard(self) -> None:
        """Drops the step's gradients and statistics."""
        self._clipped = False
        self.reducer.discard()

    def close(self) -> None:
        """Leaves the network to another step."""
        self.reducer.close()


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context that forward passes run in."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has had: of the GPU's allocator, or of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def num_correct(output: Tensor, target: Tensor) -> Tensor:
    """Right answers among logits (n, classes) for class indices (n,); 0 for other shapes."""
    if output.dim() == 2 and target.dim() == 1 and not target.is_floating_point():
        return (output.argmax(1) == target).sum()
    return torch.zeros((), device=output.device)

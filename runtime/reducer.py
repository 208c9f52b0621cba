"""The gradient reduction: bucketed, started during backward, one fixed order.

Gradients become ready roughly in the reverse order of the parameters. A bucket is sent as soon as all its
gradients are there *and* all earlier buckets of its group have been sent: every rank of a group sends the same
buckets in the same order, whatever is ready first. Another group's do not hold it up: ranks that hold other branches
would then send theirs at another place among the group's other exchanges (BatchNorm's).

    backward    ──► p9 p8 p7 ──► p6 p5 ──► p4 p3 p2 p1
    sent              └ bucket 0 (world)       └ bucket 1 (data)      … ──► finish(): the rest, wait, hand out

Owned parameters are summed over `data`. Replicated ones are summed once over the whole mesh, counting 1 where
the rank saw its own samples and 1/M where it saw its group's, so copies cannot drift apart. The step's
BatchNorm statistics and a few numbers (loss, hits, requests to stop) follow in one small buffer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.blocks.norm import BatchNorm, StagedStatistics
from anabranch.runtime import exchange
from anabranch.runtime.parallel_network import ParallelNetwork

_Kind = tuple[str, torch.dtype]  # the axis that gradients are summed over, and their precision
_FIRST_BUCKET_BYTES = 2**20  # small, so that the first transfer starts early
_BUCKET_BYTES = 25 * 2**20


@dataclass(eq=False)
class _Bucket:
    """Consecutive parameters that travel together; `flags` count, behind them, the ranks that used each."""

    over: str
    group: dist.ProcessGroup
    parameters: list[nn.Parameter]
    factors: list[float]
    buffer: Tensor
    views: list[Tensor] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)  # ids of parameters whose gradient is not ready
    unused: list[int] = field(default_factory=list)  # indices of parameters that this rank did not use
    work: exchange.Work | None = None
    sent: Any = None  # when, where the recorder is detailed

    @property
    def flags(self) -> Tensor:
        return self.buffer[-len(self.parameters) :]


class GradientReducer:
    """Sums gradients, BatchNorm statistics and `extra` numbers over the ranks, once a step.

        reducer.arm()                  # before the step's last backward
        loss.backward()                # buckets leave while it runs
        reducer.finish()               # every p.grad is whole; reducer.extra is summed over the world
        reducer.commit_statistics()    # with the optimizer's step

    extra: (num_extra,) numbers, added up over all ranks by `finish`; fill it before. Where ranks saw the same
    samples, give each its share.
    """

    def __init__(
        self, network: ParallelNetwork, *, num_extra: int = 0, bucket_bytes: int = _BUCKET_BYTES
    ) -> None:
        self.network, self.mesh = network, network.mesh
        self._groups = {"data": self.mesh.data_group, "world": self.mesh.world_group}
        parameters = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in parameters]
        self._buckets = list(self._make_buckets(list(reversed(parameters)), bucket_bytes))
        self._of_group = {over: [b for b in self._buckets if b.over == over] for over in self._groups}
        self._where = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._next, self._armed = dict.fromkeys(self._groups, 0), False
        self.overlap = True  # False: nothing leaves before `finish`, for measuring
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._on_ready)
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]
        uses = Counter(p for _, p in network.named_parameters(remove_duplicate=False))
        network.wire.shared = frozenset(p for p, num_uses in uses.items() if num_uses > 1)
        network.wire.report = self._on_ready  # a weight gradient that autograd does not see
        self._statistics = self._make_statistics(num_extra)
        self.extra = self._statistics["world"].extra

    def _make_buckets(self, named: list[tuple[str, nn.Parameter]], limit: int) -> Iterator[_Bucket]:
        waiting: dict[_Kind, list[tuple[str, nn.Parameter]]] = {}
        first = {"data": True, "world": True}

        def close(key: _Kind) -> _Bucket:
            members, over = waiting.pop(key), key[0]
            first[over] = False
            parameters = [p for _, p in members]
            total = sum(p.numel() for p in parameters)
            buffer = torch.zeros(total + len(members), dtype=key[1], device=parameters[0].device)
            factors = [self.network.roles[n].factor for n, _ in members]
            bucket = _Bucket(over, self._groups[over], parameters, factors, buffer)
            parts = buffer[:total].split([p.numel() for p in parameters])
            bucket.views = [_like(part, p) for part, p in zip(parts, parameters, strict=True)]
            return bucket

        for name, parameter in named:
            over = self.network.roles[name].over
            if self._groups[over].size() == 1 or not parameter.numel():
                continue  # nobody to sum with, or nothing: of a block whose branches are all elsewhere
            key: _Kind = (over, parameter.dtype)
            waiting.setdefault(key, []).append((name, parameter))
            held = sum(p.numel() * p.element_size() for _, p in waiting[key])
            if held >= (min(_FIRST_BUCKET_BYTES, limit) if first[over] else limit):
                yield close(key)
        for key in list(waiting):
            yield close(key)

    def _make_statistics(self, num_extra: int) -> dict[str, StagedStatistics]:
        """Statistics by the axis they are summed over, and each world entry's share of this rank."""
        roles, norms = self.network.roles, dict[str, BatchNorm]()
        like: Tensor = next(self.network.parameters())
        for name, module in self.network.named_modules():
            if isinstance(module, BatchNorm) and module.running_mean is not None:
                norms[name], like = module, module.running_mean
        names = {over: [n for n in norms if roles[f"{n}.running_mean"].over == over] for over in self._groups}
        shares = [roles[f"{n}.running_mean"].factor for n in names["world"]]
        found = {
            over: StagedStatistics(
                [norms[n] for n in named], like.device, like.dtype, num_extra if over == "world" else 0
            )
            for over, named in names.items()
        }
        sizes = torch.tensor(found["world"].sizes, dtype=torch.long)
        share = torch.tensor(shares, dtype=like.dtype).repeat_interleave(sizes)
        self._share = share.to(like.device) if any(s != 1.0 for s in shares) else None
        return found

    def arm(self) -> None:
        """The next backward is the step's last: its gradients leave as they become ready."""
        for bucket in self._buckets:
            bucket.pending = {id(p) for p in bucket.parameters}
            bucket.work = None
        self._next, self._armed = dict.fromkeys(self._groups, 0), self.overlap

    def _on_ready(self, parameter: nn.Parameter) -> None:
        if not self._armed:
            return  # an earlier micro-batch: its gradient stays in .grad and is added to
        if id(parameter) not in self._where:
            return  # nobody to sum with
        bucket = self._where[id(parameter)]
        if bucket.work is not None:
            name = next(name for name, p in self.network.named_parameters() if p is parameter)
            raise RuntimeError(
                f"{name} has another gradient after its sum was sent: its module runs several times in a step. "
                'Set mesh.overlap to "off"; a checkpoint of your own around it needs use_reentrant=False'
            )
        bucket.pending.discard(id(parameter))
        over, in_order = bucket.over, self._of_group[bucket.over]
        while self._next[over] < len(in_order) and not in_order[self._next[over]].pending:
            self._send(in_order[self._next[over]])
            self._next[over] += 1

    def _send(self, bucket: _Bucket) -> None:
        grads = [p.grad for p in bucket.parameters]
        used = [grad is not None for grad in grads]
        bucket.flags.fill_(1.0)
        views = [view for view, grad in zip(bucket.views, grads, strict=True) if grad is not None]
        if views:  # a bucket of parameters that nobody here used still takes part
            torch._foreach_copy_(views, [grad for grad in grads if grad is not None])
        bucket.unused = [i for i, u in enumerate(used) if not u]
        for i in bucket.unused:
            bucket.views[i].zero_()
            bucket.flags[i].zero_()  # one by one: for a copy of `used` to a GPU the host would wait
        if any(factor != 1.0 for factor in bucket.factors):
            torch._foreach_mul_(bucket.views, bucket.factors)
        for parameter in bucket.parameters:
            parameter.grad = None
        if self.network.recorder.detailed:
            bucket.sent = self.network.recorder.now()
        bucket.work = exchange.all_reduce(bucket.buffer, bucket.group)

    def finish(self) -> None:
        """Sends what is left, waits, and hands out the sums: p.grad is whole on every rank that holds p.

        A parameter that no rank used keeps grad None everywhere; one used anywhere is summed with zeros.
        """
        self._armed = False
        for bucket in self._buckets:
            if bucket.work is None:
                self._send(bucket)
        works, recorder = [], self.network.recorder
        for over, statistics in self._statistics.items():
            if over == "world" and self._share is not None:
                statistics.rows.mul_(self._share)
            if self._groups[over].size() > 1 and statistics.buffer.numel():
                sent = recorder.now() if recorder.detailed else None
                work = exchange.all_reduce(statistics.buffer, self._groups[over])
                works.append((f"{over}_bucket", statistics.buffer.nbytes, sent, work))
        for bucket in self._buckets:
            assert bucket.work is not None
            start = recorder.started(f"{bucket.over}_bucket") if recorder.detailed else None
            bucket.work.wait()
            if recorder.detailed:
                recorder.reduced(f"{bucket.over}_bucket", bucket.buffer.nbytes, bucket.sent, start)
            num_users = bucket.flags.tolist() if bucket.unused else []  # at once: the host waits for a GPU's
            unused = {i for i in bucket.unused if not num_users[i]}
            for index, (parameter, view) in enumerate(zip(bucket.parameters, bucket.views, strict=True)):
                parameter.grad = None if index in unused else view
        for op, num_bytes, sent, work in works:
            start = recorder.started(op) if recorder.detailed else None
            work.wait()
            if recorder.detailed:
                recorder.reduced(op, num_bytes, sent, start)

    def commit_statistics(self) -> None:
        """Applies the step's statistics to the running ones on every rank that holds them."""
        for statistics in self._statistics.values():
            statistics.commit()

    def close(self) -> None:
        """Leaves the parameters to another reducer."""
        for hook in self._hooks:
            hook.remove()

    def discard(self) -> None:
        """Drops the step: gradients and staged statistics."""
        self._armed = False
        for parameter in self._parameters:
            parameter.grad = None
        for statistics in self._statistics.values():
            statistics.clear()


def _like(part: Tensor, parameter: Tensor) -> Tensor:
    """Part of a buffer as a gradient: in the parameter's memory format, so that copies and updates are straight."""
    if parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last):
        return part.as_strided(parameter.shape, parameter.stride(), part.storage_offset())
    return part.view_as(parameter)

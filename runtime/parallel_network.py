"""A one-device network becomes this rank's part of a plan.

Between the elements (stem, blocks, head) a rank holds either its *own* samples or, with the others of its
branch group, the whole *group*'s. Transitions are inserted where the plan changes:

    element           needs      BN statistics over          replicated parameters' gradients count
    split "sample"    own        own groups                  1      (each rank saw its own samples)
    split "branch"    group      the replica's groups        1 / M  (each rank of the group saw the same)
    "replicated"      group      the replica's groups        1 / M

        own ── gather_samples ──► group          group ── scatter_samples ──► own
                                                 group ── reduce_to_samples ─► own    a *fused edge*

An edge from group to own is fused where the element before is split `branch` and ends in skip_term(x, h) + s
(`closing_sum`): of s each rank then receives its own rows only. `enter`, `skip_term` and the branches run on the
group's rows as ever, and every rank gets the whole gradient of y, as at any other edge: BN groups and what
parameters' gradients count do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anabranch.blocks.batch import BatchLayout, GroupSync, batch_layout
from anabranch.blocks.branch_sum import BranchSum, BranchTensor, Execution, branch_sums, closing_sum
from anabranch.blocks.convert import prepare
from anabranch.blocks.network import named_blocks
from anabranch.runtime import exchange
from anabranch.runtime.branch_exchange import BranchExchange
from anabranch.runtime.collectives import gather_samples, scatter_samples
from anabranch.runtime.deal import Deal, Share
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.rank_batch import RankBatch, Rows
from anabranch.runtime.recorder import Recorder, marked
from anabranch.runtime.wire import Wire
from anabranch.schedulers import Plan, PlanError


@dataclass(frozen=True)
class Role:
    """What a parameter or buffer is to the gradient reduction and to checkpoints.

    tensor: which branches it belongs to; None: replicated by its block.
    over: the axis its gradient is summed over: "data" where this branch group holds it once, else "world".
    factor: what this rank's gradient counts in that sum.
    """

    tensor: BranchTensor | None
    over: Literal["data", "world"]
    factor: float


class ParallelNetwork(nn.Module):
    """This rank's part of a network; parameter names are those of the one-device network.

    roles: by parameter and buffer name. input_rows, output_rows: which samples `forward` takes and returns.
    recorder: told what this rank's time goes to. recompute: keep only what blocks read, and run each again in backward.
    compiled: forms of blocks that run in their place, by name.
    """

    def __init__(self, network: nn.Module, plan: Plan, mesh: Mesh) -> None:
        super().__init__()
        self.plan, self.mesh = plan, mesh
        self.recorder = Recorder(torch.device(mesh.device_mesh.device_type))
        self.wire = Wire(mesh.branch_group, self.recorder)
        self.stem, self.blocks, self.head = (
            network.get_submodule(name) for name in ("stem", "blocks", "head")
        )
        self.roles: dict[str, Role] = {}
        self.recompute = False
        self.compiled: Mapping[str, Callable[[Tensor], Tensor]] = {}

    def regroup(self, mesh: Mesh) -> None:
        """Goes on in other process groups. Whatever else holds groups (a `TrainStep`) must be made anew."""
        self.mesh, self.wire.group = mesh, mesh.branch_group

    @property
    def input_rows(self) -> Rows:
        return self._rows(self.plan.stem)

    @property
    def output_rows(self) -> Rows:
        return self._rows(self.plan.head)

    def _rows(self, split: str) -> Rows:
        return "own" if split == "sample" or self.mesh.branch == 1 else "group"

    @property
    def channels_last(self) -> bool:
        """Whether images and the kernels of convolutions lie in memory with their channels innermost."""
        return self.wire.channels_last

    def use_memory_format(self, *, channels_last: bool) -> None:
        """Changes how images and kernels lie in memory: their values stay. Before an optimizer or reducer is made."""
        self.wire.channels_last = channels_last
        set_memory_format(self, channels_last=channels_last)

    def elements(self) -> list[tuple[str, nn.Module, Rows]]:
        """(name, module, rows it works on) of stem, blocks and head, in order."""
        placed = self.plan.blocks
        blocks = [(name, block, self._rows(placed[name].split)) for name, block in named_blocks(self)]
        return [("stem", self.stem, self.input_rows), *blocks, ("head", self.head, self.output_rows)]

    def forward(self, x: Tensor, batch: RankBatch) -> Tensor:
        """Rows `input_rows` of the batch in, rows `output_rows` out."""
        rows, recorder = self.input_rows, self.recorder
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        elements = self.elements()
        rows_behind = [*(wanted for _, _, wanted in elements[1:]), self.output_rows]
        for (name, module, wanted), behind in zip(elements, rows_behind, strict=True):
            recorder.entered = name
            if recorder.detailed:
                recorder.at(name)
            if wanted != rows:
                change = gather_samples if wanted == "group" else scatter_samples
                x, rows = change(x, batch.sizes, self.wire), wanted
            last = closing_sum(module) if (rows, behind) == ("group", "own") else None
            edge: Callable[[], AbstractContextManager[None]] = nullcontext
            if last is not None and isinstance(last.exchange, BranchExchange):
                edge, rows = partial(last.exchange.to_samples, last, batch.sizes), behind
            x = self._run(module, x, batch.layout_of(wanted), name, edge)
            if recorder.detailed:
                x = marked(x, recorder, name)
        return x

    def _run(
        self,
        module: nn.Module,
        x: Tensor,
        layout: BatchLayout,
        name: str,
        edge: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with batch_layout(layout), edge():  # in backward, when run again, autograd's thread has none
                y: Tensor = self.compiled.get(name, module)(x)
                return y

        if not self.recompute or name in ("stem", "head") or not torch.is_grad_enabled():
            return run(x)
        # Of sums in a row a rank without branches may need nothing behind the first, and the others its total.
        sums: list[Tensor] = []
        is_row = len(branch_sums(module)) > 1

        y: Tensor = checkpoint(  # random choices depend on samples and the step only: no state to restore
            run, x, use_reentrant=False, preserve_rng_state=layout.sample_ids is None,
            context_fn=lambda: (
                (self.wire.keeping(sums), self.wire.repeating(sums)) if is_row else (nullcontext(), nullcontext())
            ),
        )  # fmt: skip
        return y

    def to_output_rows(self, target: Tensor, batch: RankBatch) -> Tensor:
        """Targets that came with the input rows, as the output's rows."""
        if self.input_rows == self.output_rows:
            return target
        if self.output_rows == "group":
            return self.wire.gather(target, batch.sizes)
        start = batch.own_range.start - batch.group_range.start
        return target[start : start + len(batch.own_range)]

    def rank_batch(self, deal: Deal, num_samples: int) -> RankBatch:
        """This rank's rows of a dealt batch, in a step of `num_samples` samples."""
        mesh = self.mesh
        replica, row = deal.replicas[mesh.data_rank], deal.ranks[mesh.data_rank]

        def layout(share: Share, spans: bool, part: int, num_parts: int, over: str) -> BatchLayout:
            sync = None
            if spans and num_parts > 1:
                sync = GroupSync(share.first_group, deal.group_sizes, part, num_parts, self._summing(over))
            return BatchLayout(share.group_sizes, num_samples, sync=sync)

        own = row[mesh.branch_rank]
        return RankBatch(
            layout(own, deal.groups_span_ranks, mesh.rank, mesh.world_size, "world"),
            layout(replica, deal.groups_span_replicas, mesh.data_rank, mesh.data, "data"),
            range(deal.start + own.start, deal.start + own.stop),
            range(deal.start + replica.start, deal.start + replica.stop),
            tuple(share.stop - share.start for share in row),
        )

    def _summing(self, over: str) -> Callable[[Tensor], Tensor]:
        group = self.mesh.world_group if over == "world" else self.mesh.data_group

        def all_reduce(x: Tensor) -> Tensor:
            start = self.recorder.started(f"{over}_sum")
            exchange.all_reduce(x, group).wait()
            self.recorder.exchanged(f"{over}_sum", x.nbytes, start)
            return x

        return all_reduce


def parallelize(
    network: nn.Module, plan: Plan, mesh: Mesh, *, execution: Execution = "fused"
) -> ParallelNetwork:
    """Changes a one-device network into this rank's part under a plan.

    `network` (stem, blocks, head) is consumed: its modules become the result's, with only the parameters that
    this rank holds. Do it before the network moves to the device. Its BatchNorm and Dropout are converted
    (see blocks.convert). Raises PlanError if the plan does not fit the network or the mesh.
    """
    prepare(network)
    plan.check(spec_of(network))
    if (plan.data, plan.branch) != (mesh.data, mesh.branch):
        raise PlanError(
            f"the plan is for {plan.data}x{plan.branch} ranks, the mesh is {mesh.data}x{mesh.branch}: "
            "make them equal"
        )
    result = ParallelNetwork(network, plan, mesh)
    memo: dict[int, object] = {}
    for name, block, rows in result.elements():
        placement = plan.blocks.get(name)
        sums = branch_sums(block)
        for path, block_sum in sums:
            block_sum.execution = execution
            if rows == "group" and placement is not None and placement.branches is not None:
                held = placement.branches[mesh.branch_rank]
                mine = block_sum.shard(held, memo)
                mine.exchange = BranchExchange(result.wire, name if len(sums) > 1 else "")
                _replace(result.blocks, f"{name}.{path}".rstrip("."), mine)
    result.roles = _roles(result)
    return result


def set_memory_format(module: nn.Module, *, channels_last: bool) -> None:
    """Lays a module's convolution kernels out; their values stay."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    module.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs do not know it


def branch_tensors(network: nn.Module) -> dict[str, BranchTensor]:
    """Which parameters and buffers of a network (or a rank's part of it) belong to branches, by full name."""
    found: dict[str, BranchTensor] = {}
    for prefix, block_sum in branch_sums(network):
        found |= {f"{prefix}.{name}": owner for name, owner in block_sum.branch_tensors().items()}
    return found


def _roles(network: ParallelNetwork) -> dict[str, Role]:
    roles, owned = {}, branch_tensors(network)
    for name, module, rows in network.elements():
        prefix = name if name in ("stem", "head") else f"blocks.{name}"
        is_split = any(block_sum.exchange is not None for _, block_sum in branch_sums(module))
        for tensor, _ in [*module.named_parameters(), *module.named_buffers()]:
            full = f"{prefix}.{tensor}"
            if is_split and full in owned:
                roles[full] = Role(owned[full], "data", 1.0)
            else:
                factor = 1.0 if rows == "own" else 1.0 / network.mesh.branch
                roles[full] = Role(owned.get(full), "world", factor)
    return roles


def _replace(root: nn.Module, path: str, module: BranchSum) -> None:
    parent, _, key = path.rpartition(".")
    setattr(root.get_submodule(parent), key, module)

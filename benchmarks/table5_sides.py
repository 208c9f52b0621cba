"""The variants of one row of Table V as training steps, on every rank: what each is, which memory format it takes."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.benchmarks.plain_resnet import PlainBlock, plain_pre_resnet
from anabranch.benchmarks.steps import images, make_ddp
from anabranch.blocks import build
from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.convert import prepare
from anabranch.runtime.compiling import BACKEND, COMPILED, FAILED, said, verdict
from anabranch.runtime.config import Config
from anabranch.runtime.execution import CLEARLY
from anabranch.runtime.loss import cross_entropy
from anabranch.runtime.mesh import Mesh
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.plan_step import PlanStep, StepSetting
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.step import autocast
from anabranch.schedulers import Plan

VARIANTS = {
    "a": "deeper pre-resnet, torch DDP, plain",
    "b": "deeper pre-resnet, torch DDP, tuned",
    "c": "Multi-ResNet, torch DDP, branches one after another",
    "d": "Multi-ResNet, ours, branches fused where that is faster, data parallel",
    "e": "Multi-ResNet, ours, all branches split (the paper's)",
    "f": "Multi-ResNet, ours, automatic plan",
    "d_shared": 'as d with preact="shared": not the paper\'s network, fewer parameters',
    "f_shared": 'as f with preact="shared": not the paper\'s network, fewer parameters',
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Rounds: where formats are far apart, most often, while they are close.
_FEW_PROBES, _PROBES, _MOST_PROBES = 2, 5, 15
_FAR, _CLOSE = 0.7, 0.9
DEPTH = 18  # blocks of a stage in the paper's Multi-ResNet-110


@dataclass(frozen=True)
class Row:
    """A row: batch samples a step, k branches a block, the mesh of (e), precision, and what its depth is divided by.

    whole_groups: a BN group is the whole batch, as on one GPU, instead of batch ÷ ranks. compiled: blocks through
    torch.compile where that is measured faster, in all variants but (a) and (c).
    """

    batch: int
    num_branches: int
    mesh: tuple[int, int] = (1, 2)
    precision: str = "fp32"
    fold: int = 1
    whole_groups: bool = False
    compiled: bool = False

    @property
    def bn_batch_size(self) -> int:
        return self.batch if self.whole_groups else self.batch // self.world_size

    @property
    def world_size(self) -> int:
        return self.mesh[0] * self.mesh[1]

    @property
    def depth(self) -> int:
        """Of the Multi-ResNet."""
        return 6 * (DEPTH // self.fold) + 2

    @property
    def deeper(self) -> int:
        """Of the pre-resnet with as many convolutions."""
        return 6 * (DEPTH // self.fold) * self.num_branches + 2

    def __str__(self) -> str:
        mesh = f" on {self.mesh[0]}x{self.mesh[1]}" if self.mesh[0] > 1 else ""
        return f"batch {self.batch}, k = {self.num_branches}, {self.precision}{mesh}"


def family(variant: str) -> str:
    """Variants of one family run the same modules: "plain", "looped", "fused" or "shared"."""
    return {"a": "plain", "b": "plain", "c": "looped"}.get(
        variant, "shared" if "shared" in variant else "fused"
    )


def network_of(
    row: Row,
    variant: str,
    memory_format: str = "contiguous",
    blocks_per_stage: Sequence[int] | None = None,
) -> nn.Module:
    """A variant's one-device network on the CPU, from seed 0; blocks_per_stage: a shorter one of the same blocks."""
    torch.manual_seed(0)
    network, kind = _network(row, family(variant), blocks_per_stage), FORMATS[memory_format]
    return network.to(memory_format=kind)  # type: ignore[call-overload, no-any-return]


def _network(row: Row, kind: str, blocks_per_stage: Sequence[int] | None) -> nn.Module:
    if kind == "plain":
        return plain_pre_resnet(build("pre_resnet", depth=row.deeper, blocks_per_stage=blocks_per_stage))
    preact = "shared" if kind == "shared" else "branch"
    network = prepare(
        build(
            "multi_resnet", depth=row.depth, num_branches=row.num_branches, preact=preact,
            blocks_per_stage=blocks_per_stage,
        )
    )  # fmt: skip
    for _, block_sum in branch_sums(network):
        block_sum.execution = "looped" if kind == "looped" else "fused"
    return network


def setting_of(row: Row, memory_format: str) -> StepSetting:
    """The step's samples in a memory format, and how they are trained."""
    x, target = images(row.batch)
    config = Config.from_dict(
        {
            "train": {
                "batch_size": row.batch,
                "bn_batch_size": row.bn_batch_size,
                "precision": row.precision,
            },
            "mesh": {
                "memory_format": memory_format,
                "execution": "auto",
                "compile": "on" if row.compiled and dist.get_backend() != "fake" else "off",
            },
            "optimizer": {"lr": 0.01},  # noise is learnt by heart without blowing up
        }
    )
    return StepSetting(x.to(memory_format=FORMATS[memory_format]), target, config, cross_entropy())


class DdpSide:
    """Steps of torch DDP (wrapped=False: of its network alone, without anything sent) on a rank's part of the batch.

    `loss` is that of the last step, this rank's mean. exchanges: collective, bytes, ranks of a step. sent_bytes: by a
    rank in a step. compiled: what became of the blocks (see `compile_plain`), "" where nobody asked.
    """

    def __init__(
        self, network: nn.Module, setting: StepSetting, part: slice, device: torch.device, *,
        tuned: bool, wrapped: bool = True, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.x, self.target = setting.x[part].to(device), setting.target[part].to(device)
        self.network: nn.Module = network.to(device)
        precision = setting.config.train.precision
        self.compiled = compile_plain(network, self.x, self.target, precision) if compiled else ""
        world = dist.get_world_size()
        self.exchanges = [("all_reduce", sum(p.nbytes for p in network.parameters()), world)]
        self.sent_bytes = ring_bytes(*self.exchanges[0])
        if not tuned and world > 1:
            self.sent_bytes += sum(b.nbytes for b in network.buffers())  # rank 0's, at every forward
        if wrapped:
            self.network = make_ddp(network, tuned=tuned, shared=tuned and device.type == "cpu")
        self.precision, self.loss = precision, 0.0
        self.optimizer = make_optimizer(setting.config.optimizer, self.network.parameters())

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.x.device):
            loss = F.cross_entropy(self.network(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.item()

    def counted(self) -> None:
        """One step; what it sends is known."""
        self()


class OurSide:
    """Steps of ours under a plan. `loss` is the last step's, over all ranks.

    exchanges, sent_bytes: as DdpSide's, of the last counted step.
    """

    def __init__(self, network: nn.Module, setting: StepSetting, plan: Plan, mesh: Mesh) -> None:
        self.step = PlanStep(network, plan, mesh, setting)
        self.mesh, self.loss, self.sent_bytes = mesh, 0.0, 0.0
        self.exchanges: list[tuple[str, int, int]] = []

    def __call__(self) -> None:
        train = self.step.train
        self.loss = train.gradients(self.step.batches).loss
        train.apply(train.optimizer.param_groups[0]["lr"])

    def counted(self) -> None:
        """One step whose exchanges are counted."""
        recorder, mesh = self.step.train.recorder, self.mesh
        recorder.detailed = True
        self()
        recorder.detailed = False
        self.exchanges = []
        for span in recorder.spans():
            if span.op and span.part != "sent":
                over = span.op.partition("_")[0]
                size = {"data": mesh.data, "world": mesh.world_size}.get(over)
                collective = "all_reduce" if size else span.op
                self.exchanges.append((collective, span.num_bytes, size or mesh.branch))
        self.sent_bytes = sum(ring_bytes(*exchange) for exchange in self.exchanges)


def ring_bytes(collective: str, num_bytes: float, size: int) -> float:
    """What each of `size` ranks sends in a ring; num_bytes: of the whole that is reduced or gathered."""
    return (2 if collective == "all_reduce" else 1) * (size - 1) / size * num_bytes


def probe_formats(row: Row, families: Sequence[str], device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward by family and memory format, all ranks' sum. Collective.

    Of short networks (two blocks a stage) on a rank's samples of this row; the best of five rounds: of two where a
    family's formats are far apart, of up to fifteen while they are close. All families and formats are in each round,
    so that who disturbs the machine for seconds does not decide for one of them.
    """
    variant_of = {"plain": "b", "looped": "c", "fused": "d", "shared": "d_shared"}
    runs: dict[str, list[Callable[[], None]]] = {kind: [] for kind in families}
    for kind, of_kind in runs.items():
        for name, memory_format in FORMATS.items():
            network = network_of(row, variant_of[kind], name, (2, 2, 2)).to(device)
            x, target = images(row.batch // row.world_size)
            x, target = x.to(device).to(memory_format=memory_format), target.to(device)
            of_kind.append(_forward_backward(network, x, target, row.precision))
            of_kind[-1]()
    best = {kind: torch.full((len(FORMATS),), torch.inf, dtype=torch.float64, device=device) for kind in runs}
    found: dict[str, dict[str, float]] = {}
    for turn in range(_MOST_PROBES):
        for kind in [kind for kind in families if kind in runs]:
            seconds = [_timed(run, device) for run in runs[kind]]
            best[kind] = torch.minimum(best[kind], torch.tensor(seconds, dtype=torch.float64, device=device))
            together = best[kind].clone()
            dist.all_reduce(together)
            found[kind] = dict(zip(FORMATS, together.tolist(), strict=True))
            ratio = together.min() / together.max()
            if (turn >= _FEW_PROBES - 1 and ratio < _FAR) or (turn >= _PROBES - 1 and ratio < _CLOSE):
                del runs[kind]
    return found


def faster_format(seconds: Mapping[str, float]) -> str:
    """Channels last only where that is clearly faster, as the runtime has it; one rule for all variants."""
    is_faster = seconds["channels_last"] < CLEARLY * seconds["contiguous"]
    return "channels_last" if is_faster else "contiguous"


def compile_plain(network: nn.Module, x: Tensor, target: Tensor, precision: str) -> str:
    """A plain network's blocks through torch.compile, distinct ones once, if a step is faster for it. Collective.

    "compiled", or why not, as `runtime.compiling` says it of ours.
    """
    torch._dynamo.config.recompile_limit = 64  # all blocks share their code, a graph for each distinct one
    backend = os.environ.get(BACKEND, "inductor")

    def compile_blocks(whole: nn.Module) -> None:
        for block in whole.children():
            if isinstance(block, PlainBlock):
                block.compile(fullgraph=True, dynamic=False, backend=backend)

    trial = copy.deepcopy(network)
    sides = [_forward_backward(one, x, target, precision) for one in (copy.deepcopy(network), trial)]
    mine: str | list[float] = [0.0, 0.0]
    try:
        compile_blocks(trial)
        for side in sides:
            side()
    except (
        Exception
    ) as error:  # whatever a backend raises: ranks must still agree, and the row goes on without
        mine = FAILED + said(error)
    if BACKEND not in os.environ and not any(isinstance(one, str) for one in gather_json(mine, x.device)):
        mine = [min(column) for column in zip(*_rounds(sides, x.device), strict=True)]
    found = verdict(gather_json(mine, x.device))
    if found == COMPILED:
        compile_blocks(network)
    return found


def _rounds(sides: Sequence[Callable[[], None]], device: torch.device) -> list[list[float]]:
    return [[_timed(side, device) for side in sides] for _ in range(_PROBES)]


def _forward_backward(network: nn.Module, x: Tensor, target: Tensor, precision: str) -> Callable[[], None]:
    def run() -> None:
        network.zero_grad(set_to_none=True)
        with autocast(precision, x.device):
            loss = F.cross_entropy(network(x), target)
        loss.backward()

    return run


def _timed(run: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun

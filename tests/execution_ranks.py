"""What tests of choosing an execution run on every rank."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from parity_cases import Chain, classifier
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.blocks import BranchSum, build, convolution
from anabranch.blocks.branch_sum import Hidden
from anabranch.blocks.network import named_blocks
from anabranch.runtime import exchange, execution
from anabranch.runtime.config import MeshConfig
from anabranch.runtime.deal import deal_step
from anabranch.runtime.execution import HowToRun, how_to_run, is_ours
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import ParallelNetwork, parallelize
from anabranch.runtime.rank_batch import RankBatch
from anabranch.schedulers import BranchPlacement, Plan


class SlowWhenFused(BranchSum):
    """Two branches whose fused form takes 20 ms longer."""

    def __init__(self) -> None:
        super().__init__(2)
        self.branch = nn.ModuleDict({str(i): nn.Conv2d(4, 4, 1) for i in range(2)})

    def branches(self, h: Hidden) -> Tensor:
        if self.execution == "fused":
            time.sleep(0.02)
        return sum((one(h) for one in self.branch.values()), torch.zeros(()))


class Flat(nn.Module):
    """As users flatten images, which are contiguous to them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class WithSlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([SlowWhenFused(), SlowWhenFused()])
        self.head = nn.Sequential(Flat(), nn.Linear(4 * 8 * 8, 10))


def placed(
    network: nn.Module, counts: Mapping[str, tuple[tuple[int, ...], ...]]
) -> tuple[ParallelNetwork, RankBatch]:
    torch.manual_seed(0)
    blocks = {b.name: BranchPlacement("branch", counts[b.name]) for b in spec_of(network).blocks}
    mesh = make_mesh(1, 2)
    parallel = parallelize(network, Plan(1, 2, blocks, "replicated", "replicated"), mesh)
    (deal,) = deal_step(8, bn_batch_size=4, data=1, branch=2)
    return parallel, parallel.rank_batch(deal, 8)


def chosen(rank: int, size: int, cache: str) -> dict[str, Any]:
    """With a cache folder: choices for two networks, how often blocks were timed, and what of their state moved."""
    os.environ["XDG_CACHE_HOME"] = cache
    auto = MeshConfig()
    with mock.patch.object(execution, "_timed", side_effect=execution._timed) as timed:
        slow = WithSlow()
        parallel, rows = placed(slow, {"0": ((0,), (1,)), "1": ((0, 1), ())})
        progress: list[tuple[int, int]] = []
        first = how_to_run(
            parallel, (3, 8, 8), rows, auto, precision="fp32", ours=is_ours(slow),
            on_progress=lambda done, total: progress.append((done, total)),
        )  # fmt: skip
        first.apply(parallel)
        ran = {name: one.execution for name, one in parallel.named_modules() if isinstance(one, BranchSum)}
        calls = [timed.call_count]
        again = how_to_run(parallel, (3, 8, 8), rows, auto, precision="fp32", ours=False)
        calls.append(timed.call_count)
        ours = build("multi_resnet", depth=8, num_branches=3)
        is_one = is_ours(ours)
        counts = {b.name: ((0, 1), (2,)) for b in spec_of(ours).blocks}
        parallel, rows = placed(ours, counts)
        before = {name: value.clone() for name, value in parallel.state_dict().items()}
        third = how_to_run(parallel, (3, 8, 8), rows, auto, precision="fp32", ours=is_one)
        moved = [n for n, value in parallel.state_dict().items() if not torch.equal(value, before[n])]
        told = how_to_run(
            parallel, (3, 8, 8), rows, MeshConfig(execution="looped", memory_format="channels_last"),
            precision="fp32", ours=True,
        )  # fmt: skip
        told.apply(parallel)
        kernels = [p for p in parallel.parameters() if p.dim() == 4]
        return {
            "first": first.to_dict(),
            "again": again.to_dict(),
            "ran": ran,
            "calls": calls,
            "progress": progress,
            "third": third.to_dict(),
            "moved": moved,
            "told": told.to_dict(),
            "channels_last": all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels),
        }


class _SlowLink:
    """Compute that takes 2 ms a sample, and a link that takes seconds a message and a sample while others compute."""

    def __init__(self, message_s: float, sample_s: float) -> None:
        self.message_s, self.sample_s = message_s, sample_s
        self.free = 0.0
        self.begin, self.conv2d = exchange.begin_sum, F.conv2d

    def begin_sum(self, x: Tensor, group: Any, sizes: Any = None) -> Any:
        work = self.begin(x, group, sizes)
        self.free = max(self.free, time.perf_counter()) + self.message_s + self.sample_s * len(x)
        return SimpleNamespace(wait=partial(self._wait, work, self.free))

    def _wait(self, work: exchange.Work, until: float) -> None:
        work.wait()
        time.sleep(max(until - time.perf_counter(), 0))

    def compute(self, x: Tensor, *args: Any) -> Tensor:
        time.sleep(0.002 * len(x))
        return self.conv2d(x, *args)


def chosen_chunks(rank: int, size: int, cache: str) -> dict[str, int]:
    """Over a link that takes as long as the compute, over one of high latency, and as told."""
    os.environ["XDG_CACHE_HOME"] = cache
    found = {}
    for name, link, told in (("wide", (0.0, 0.002), 0), ("late", (0.02, 0.0), 0), ("told", (0.0, 0.0), 3)):
        block = dict(named_blocks(build("multi_resnet", depth=8, num_branches=2)))["stage1.block1"]
        network = Chain(nn.Conv2d(3, 16, 1), [block], classifier(16))
        parallel, rows = placed(network, {"0": ((0,), (1,))})
        settings = MeshConfig(chunks=told, execution="fused", memory_format="contiguous")
        slow = _SlowLink(*link)
        with (
            mock.patch.object(exchange, "begin_sum", slow.begin_sum),
            mock.patch.object(convolution, "F", SimpleNamespace(conv2d=slow.compute)),
        ):
            how = how_to_run(parallel, (3, 8, 8), rows, settings, precision="fp32", ours=True)
        how.apply(parallel)
        assert HowToRun.from_dict(how.to_dict()).chunks == parallel.wire.chunks == how.chunks
        found[name] = how.chunks
    return found


def on_hosts(
    rank: int, size: int, homes: str, kinds: list[str], code: str, seconds: list[float]
) -> list[Any]:
    """Ranks on hosts of their own, each with a home and a kind of device: what is chosen for a block whose fused form
    takes this rank `seconds`, its looped one 1 s; whether anything was timed; and the figures that this host keeps."""
    os.environ["XDG_CACHE_HOME"] = f"{homes}/{rank}"
    block = dict(named_blocks(build("multi_resnet", depth=8, num_branches=2)))["stage1.block1"]
    network = Chain(nn.Conv2d(3, 16, 1), [block], classifier(16))
    settings = MeshConfig(memory_format="contiguous")
    taken = [{"fused": seconds[rank], "looped": 1.0}.get(form, 100.0) for form in execution._FORMS]
    with (
        mock.patch.object(execution, "_timed", return_value=taken) as timed,
        mock.patch.object(execution, "processor", return_value=kinds[rank]),
        mock.patch.object(execution, "code_digest", return_value=code),
        mock.patch("socket.gethostname", return_value=f"host-{rank}"),
    ):
        parallel, rows = placed(network, {"0": ((0,), (1,))})
        how = how_to_run(parallel, (3, 8, 8), rows, settings, precision="fp32", ours=True)
    kept = sorted(json.loads(path.read_text())[0] for path in Path(homes, str(rank)).rglob("*.json"))
    return [how.execution["0"], timed.called, sorted({*kept})]

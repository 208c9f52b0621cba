"""Compiled blocks: one graph for blocks alike, the same numbers, and the block as it is wherever that cannot be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anabranch.blocks import build
from anabranch.blocks.batch import BatchLayout, batch_layout
from anabranch.blocks.network import named_blocks
from anabranch.blocks.norm import BatchNorm, StagedStatistics
from anabranch.runtime import compiling
from anabranch.runtime.compiling import COMPILED, CompiledBlock, compile_blocks
from anabranch.runtime.config import Config
from anabranch.runtime.deal import deal_step
from anabranch.runtime.execution import HowToRun
from anabranch.runtime.launch import alone
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import parallelize
from anabranch.runtime.process_group import process_group
from anabranch.runtime.trainer import Trainer
from anabranch.schedulers import Plan
from anabranch.schedulers.plan import SAMPLE

X = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


NAMES = ["stage1.block1", "stage1.block2", "stage2.block1", "stage3.block1"]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.BACKEND, "aot_eager")


class Block(nn.Module):
    """Smaller than ours; whatever it is told to do on the way."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.breaks, self.conv, self.norm = breaks, nn.Conv2d(4, 4, 1).double(), BatchNorm(4).double()

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        y: Tensor = x + self.norm(self.conv(x))
        return y


def trained(function: Any, block: nn.Module, num: int = 4, sizes: tuple[int, ...] = ()) -> list[Tensor]:
    """Output, gradients and staged statistics of two steps."""
    norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
    staged = StagedStatistics(norms, torch.device("cpu"), torch.float64)
    x = X[:num].clone().requires_grad_()
    for step in range(2):
        with batch_layout(BatchLayout(sizes or (num,), num, torch.arange(num) + step, step)):
            y = function(x.clone())
        y.square().sum().backward()
    assert x.grad is not None
    found = [
        y.detach(),
        x.grad,
        staged.rows.clone(),
        *(p.grad.clone() for p in block.parameters() if p.grad is not None),
    ]
    block.zero_grad()
    return found


def compiled(block: nn.Module, graph: compiling._Graph, told: list[str]) -> CompiledBlock:
    return CompiledBlock("stage1.block2", block, graph, (4, 4, 6, 6), (4,), told.append)


def close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_blocks_alike_share_one_graph_and_compute_the_same() -> None:
    """Output, gradients and staged statistics of two steps each; other batches run as they are."""
    graph, told = compiling._Graph(), list[str]()
    for _ in range(2):
        block = Block()
        one = compiled(block, graph, told)
        close(trained(one, block), trained(block, block))
        close(trained(one, block, num=3), trained(block, block, num=3))
    other = CompiledBlock("stage1.block3", block, compiling._Graph(), (4, 4, 6, 6), (3, 1), told.append)
    close(trained(other, block, sizes=(3, 1)), trained(block, block, sizes=(3, 1)))
    assert graph.num_compiled == 1
    assert not told


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so() -> None:
    block, told = Block(breaks=True), list[str]()
    close(trained(compiled(block, compiling._Graph(), told), block), trained(block, block))
    (text,) = told
    assert text.startswith("stage1.block2 is not compiled, it runs as it is: ")
    assert "graph_break" in text


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_what_would_be_compiled_again_and_again_is_not() -> None:
    """A second graph of one block is refused: it would come from what changes with every step."""
    graph, told = compiling._Graph(), list[str]()
    block = Block()
    one = compiled(block, graph, told)
    trained(one, block)
    block.norm.eps = 0.5  # what its graph was made for
    close(trained(one, block), trained(block, block))
    assert graph.num_compiled == 1
    assert "again and again" in told[0]


def outcome(backend: str, monkeypatch: pytest.MonkeyPatch, **before: Any) -> tuple[HowToRun, list[str], int]:
    """How a small network runs, what was told, and how many of its blocks are compiled."""
    monkeypatch.setenv(compiling.BACKEND, backend)
    told = list[str]()
    with process_group(alone()):
        network = build("multi_resnet", depth=8, num_branches=2, blocks_per_stage=(2, 1, 1))
        plan = Plan(1, 1, {b.name: SAMPLE for b in spec_of(network).blocks}, "sample", "sample")
        names = [name for name, _ in named_blocks(network)]
        parallel = parallelize(network, plan, make_mesh(1, 1))
        (deal,) = deal_step(4, bn_batch_size=4, data=1, branch=1)
        rows = parallel.rank_batch(deal, 4)
        how = HowToRun(dict.fromkeys(["stem", *names, "head"], "fused"), "contiguous", **before)
        how = compile_blocks(parallel, how, (3, 8, 8), rows, precision="fp32", on_eager=told.append)
        parallel(torch.randn(4, 3, 8, 8), rows).sum().backward()
        num = sum(isinstance(one, CompiledBlock) and not one.reason for one in parallel.compiled.values())
        graphs = {
            id(one.graph): one.graph for one in parallel.compiled.values() if isinstance(one, CompiledBlock)
        }
        assert all(graph.num_compiled == 1 for graph in graphs.values())
        return how, told, num


def test_a_backend_that_fails_is_told_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> Any:
        raise OSError("no compiler here")

    torch._dynamo.register_backend(broken, name="broken")
    how, told, num = outcome("broken", monkeypatch)
    assert num == 0
    assert set(how.compiled) == set(NAMES)
    assert all("no compiler here" in reason for reason in how.compiled.values())
    assert len(told) == 1
    assert "stage1.block1, stage1.block2" in told[0]


def test_what_a_run_knows_is_kept_when_it_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is timed, none compiled that was not, and no other rank is asked."""
    known = {**dict.fromkeys(NAMES, "not faster: 1.20 of the time"), "stage1.block2": COMPILED}
    monkeypatch.setattr(compiling, "gather_json", None)
    how, told, num = outcome("aot_eager", monkeypatch, compiled=known)
    assert how.compiled == known
    assert num == 1
    assert not told


def test_why_blocks_could_not_be_compiled_is_no_reason_where_a_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under another plan, or on another machine, they may be."""
    reasons = [
        "not faster: 1.20 of the time",
        "split by branch: it exchanges while it runs",
        compiling.FAILED + "no",
    ]
    before = HowToRun(
        dict.fromkeys(NAMES, "fused"), "contiguous", compiled=dict(zip(NAMES, reasons, strict=False))
    )
    trainer: Any = SimpleNamespace(
        resume=SimpleNamespace(position={"how_to_run": before.to_dict()}),
        network=SimpleNamespace(elements=lambda: [(name, None, "own") for name in NAMES]),
        config=Config(),
    )
    kept = Trainer._how_to_run(trainer, ours=True)
    assert kept.compiled == {NAMES[0]: reasons[0]}
    how, told, num = outcome("aot_eager", monkeypatch, compiled=kept.compiled)
    assert how.compiled == {NAMES[0]: reasons[0], **dict.fromkeys(NAMES[1:], COMPILED)}
    assert num == len(NAMES) - 1
    assert not told


def test_the_faster_way_over_all_ranks() -> None:
    assert compiling.verdict([[1.0, 0.8], [1.0, 1.1]]) == COMPILED
    assert compiling.verdict([[1.0, 0.9], [1.0, 1.1]]) == "not faster: 1.00 of the time"
    assert compiling.verdict([[1.0, 0.5], "why not"]) == "why not"


@pytest.mark.optin
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler")
@pytest.mark.timeout(900)
def test_inductors_code_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiling.BACKEND, "inductor")
    block = dict(named_blocks(build("multi_resnet", depth=14, num_branches=2).double()))["stage1.block2"]
    graph, told = compiling._Graph(), list[str]()
    one = CompiledBlock("stage1.block2", block, graph, (4, 16, 6, 6), (4,), told.append)
    global X
    before, X = X, torch.randn(4, 16, 6, 6, dtype=torch.float64)
    try:
        close(trained(one, block), trained(block, block))
        close(trained(replace(one), block), trained(block, block))
    finally:
        X = before
    assert graph.num_compiled == 1
    assert not told

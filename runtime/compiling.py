"""Blocks through torch.compile: a graph for each distinct block, where that is faster than running it as it is.

block ── as it is ──────────────────────────────► y      other batch sizes, evaluation, what was not faster
  └───── compiled: y, and BatchNorm's statistics ► y      staged behind it: a graph changes no state

Blocks alike (modules, shapes, branches held, input) share one graph. What cannot be compiled runs as it is, and the
reason is told. Needs torch.compile's backend: inductor, which wants a C++ compiler on CPUs and Triton on GPUs.
"""

from __future__ import annotations

import copy
import os
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.blocks.batch import BatchLayout, batch_layout, current_layout
from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.norm import BatchNorm
from anabranch.runtime.element_run import alone, key_of, run
from anabranch.runtime.execution import CLEARLY, HowToRun
from anabranch.runtime.parallel_network import ParallelNetwork
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.rank_batch import RankBatch
from anabranch.runtime.step import autocast

COMPILED, FAILED, NOT_FASTER = "compiled", "torch.compile failed: ", "not faster: "
BACKEND = "ANABRANCH_COMPILE_BACKEND"  # another one of torch.compile's, for tests: whatever compiles is used, not timed
_REPEATS = 5

OnEager = Callable[[str], object]


class CompiledBlocks:
    """The compiled forms of a network's blocks, as `ParallelNetwork.compiled` calls them.

    num_graphs: compiled so far, by distinct block.
    """

    def __init__(self, on_eager: OnEager) -> None:
        self.on_eager = on_eager
        self._graphs: dict[str, _Graph] = {}

    @property
    def num_graphs(self) -> dict[str, int]:
        return {key: graph.num_compiled for key, graph in self._graphs.items()}

    def graph(self, key: str) -> _Graph:
        """The one of all blocks of this key."""
        return self._graphs.setdefault(key, _Graph())


class _Graph:
    """What blocks alike are compiled to: one graph, and an error where a second one would be made."""

    def __init__(self) -> None:
        self.num_compiled = 0
        # torch keeps graphs by code, a few of each: every distinct block has code of its own
        code = types.FunctionType(_call.__code__.replace(), globals(), "block")
        self.run: Callable[[nn.Module, Tensor], Tensor] = torch.compile(
            code, fullgraph=True, dynamic=False, backend=self._backend
        )

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if self.num_compiled:
            raise RuntimeError(
                "what it reads changes from step to step: it would be compiled again and again"
            )
        name = os.environ.get(BACKEND, "inductor")
        found: Callable[..., Any] = torch._dynamo.backends.registry.lookup_backend(name)(graph, inputs)
        self.num_compiled += 1
        return found


def _call(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


@dataclass(eq=False)
class CompiledBlock:
    """A block's forward through the graph of its kind, for inputs of one shape and layout; as it is for others."""

    name: str
    block: nn.Module
    graph: _Graph
    shape: tuple[int, ...]
    group_sizes: tuple[int, ...]
    on_eager: OnEager
    reason: str = ""  # why it runs as it is

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor
        layout = current_layout()
        fits = layout is not None and layout.group_sizes == self.group_sizes and layout.sync is None
        fits = fits and tuple(x.shape) == self.shape and self.block.training and torch.is_grad_enabled()
        if self.reason or not fits:
            y = self.block(x)
            return y
        norms = [module for module in self.block.modules() if isinstance(module, BatchNorm)]
        for norm in norms:
            norm.found = ()
        try:
            with nullcontext() if self.graph.num_compiled else warnings.catch_warnings(action="ignore"):
                y = self.graph.run(self.block, x)  # the compiler looks at whatever torch warns of
            for norm in norms:
                norm.stage_found()
            return y
        except torch._dynamo.exc.TorchDynamoException as error:  # nothing has run yet
            self.reason = said(error)
        finally:  # also where activations are made again, which ends with an exception of torch's own
            for norm in norms:
                norm.found = None
        self.on_eager(f"{self.name} is not compiled, it runs as it is: {self.reason}")
        y = self.block(x)
        return y


def where_it_goes_on(how: HowToRun) -> HowToRun:
    """Of a run that is resumed: what was timed stays. Why others could not be compiled was its plan's or machine's."""
    timed = {name: told for name, told in how.compiled.items() if told.startswith((COMPILED, NOT_FASTER))}
    return replace(how, compiled=timed)


def compile_blocks(
    network: ParallelNetwork,
    how: HowToRun,
    image_shape: tuple[int, ...],
    rows: RankBatch,
    *,
    precision: str,
    on_eager: OnEager = warnings.warn,
) -> HowToRun:
    """Compiles the blocks of a network that `how` was applied to; what became of each is in the result. Collective.

    image_shape: (C, H, W). rows: a micro-batch, whose sizes are the only ones compiled for. on_eager: told of what
    cannot be compiled, and why. Blocks that `how` knows already (see `where_it_goes_on`) are not timed.
    """
    blocks = CompiledBlocks(on_eager)
    mine: dict[str, Any] = {}  # by block: [seconds as it is, compiled], or the reason for neither
    made: dict[str, CompiledBlock] = {}
    timed: dict[str, Any] = {}  # by key
    for name, block, layout, x in _inputs(network, image_shape, rows, precision):
        before = how.compiled.get(name, COMPILED)
        if before != COMPILED or (reason := _unfit(block, layout)):
            mine[name] = before if before != COMPILED else reason
            continue
        trained = [parameter.requires_grad for parameter in block.parameters()]
        key = f"{key_of(block, tuple(x.shape))} {layout.group_sizes} {x.dtype} {x.stride()} {trained}"
        one = CompiledBlock(
            name, block, blocks.graph(key), tuple(x.shape), layout.group_sizes, lambda text: None
        )
        if key not in timed:
            is_settled = name in how.compiled or BACKEND in os.environ
            timed[key] = _timed(one, x, layout, precision, 0 if is_settled else _REPEATS)
        mine[name], one.on_eager = timed[key], on_eager
        made[name] = one
    # What is known is compiled by a rank that comes to others too, which take no part in it.
    known = mine.keys() <= how.compiled.keys()
    told = [mine] if known else gather_json(mine, next(network.parameters()).device)
    compiled = {name: verdict([one[name] for one in told]) for name in mine}
    network.compiled = {name: one for name, one in made.items() if compiled[name] == COMPILED}
    for reason in sorted({text for text in compiled.values() if text.startswith(FAILED)}):
        names = [name for name, text in compiled.items() if text == reason]
        on_eager(f"{', '.join(names)}: {reason}: mesh.compile changes nothing there, they run as they are")
    return replace(how, compiled=compiled)


def verdict(told: list[Any]) -> str:
    """Of what every rank timed, [seconds as it is, compiled] (zeros: not timed) or a text: "compiled", or why not."""
    reasons = [one for one in told if isinstance(one, str)]
    if reasons:
        return str(reasons[0])
    eager, compiled = (sum(column) for column in zip(*told, strict=True))
    if not eager or compiled < CLEARLY * eager:
        return COMPILED
    return f"{NOT_FASTER}{compiled / eager:.2f} of the time"


def _unfit(block: nn.Module, layout: BatchLayout) -> str:
    if any(one.exchange is not None for _, one in branch_sums(block)):
        return "split by branch: it exchanges while it runs"
    if layout.sync is not None:
        return "its BatchNorm groups lie on several ranks"
    return "" if sum(layout.group_sizes) else "no samples here"


def _inputs(
    network: ParallelNetwork, image_shape: tuple[int, ...], rows: RankBatch, precision: str
) -> Iterator[tuple[str, nn.Module, BatchLayout, Tensor]]:
    """(name, block, layout, an input like its own) of every block."""
    like = next(network.parameters())
    y = torch.randn(2, *image_shape, dtype=like.dtype, device=like.device)
    for name, module, wanted in network.elements():
        layout = rows.layout_of(wanted)
        shape = (len(rows.range_of(wanted)), *y.shape[1:])
        laid_out = (
            torch.channels_last if network.channels_last and len(shape) == 4 else torch.contiguous_format
        )
        x = torch.randn(shape, dtype=like.dtype, device=like.device).to(y.dtype, memory_format=laid_out)
        if name not in ("stem", "head"):
            yield name, module, layout, x
        module.eval()
        with (
            alone(module) as by_itself, torch.no_grad(), autocast(precision, like.device),
            batch_layout(BatchLayout((2,), 2)),
        ):  # fmt: skip
            y = by_itself(torch.zeros((2, *shape[1:]), dtype=y.dtype, device=like.device))
        module.train()


def _timed(
    one: CompiledBlock, x: Tensor, layout: BatchLayout, precision: str, repeats: int
) -> list[float] | str:
    """Seconds [as it is, compiled] forward and backward, zeros without repeats; a text where it cannot be compiled."""
    side = copy.deepcopy(one.block)
    compiled = replace(one, block=side)
    trials = [
        replace(layout, sample_ids=torch.arange(len(x), device=x.device), random_key=key) for key in (1, 2)
    ]
    for trial in trials:
        try:
            run(compiled, x, precision, layout=trial, block=side)
        except Exception as error:  # whatever a backend raises
            return FAILED + said(error)
        if compiled.reason:
            return FAILED + compiled.reason
    if not repeats:
        return [0.0, 0.0]
    samples: list[list[float]] = [[], []]
    sides: list[Callable[[Tensor], Tensor]] = [side, compiled]
    for _ in range(repeats):
        for index, function in enumerate(sides):
            samples[index].append(run(function, x, precision, layout=trials[0], block=side))
    return [min(seconds) for seconds in samples]


def said(error: BaseException) -> str:
    """What an error of torch.compile says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    both = " ".join(lines[:2])  # the first may name no more than the backend
    return f"{type(error).__name__}: {both}"[:300]

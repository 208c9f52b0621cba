"""How each block runs here, chosen by measurement: branches fused, mixed or looped, and where channels lie in memory.

Each *distinct* block (modules, shapes, branches held, input) is run forward and backward in all ways, once a kind of
device: the figures are kept on every host, so that a run that is repeated or resumed runs alike to the last bit.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from anabranch.blocks.branch_sum import Execution, branch_sums
from anabranch.blocks.network import Network
from anabranch.runtime.chunks import fastest_chunks
from anabranch.runtime.countdown import OnProgress, silent
from anabranch.runtime.element_run import alone, input_shapes, key_of, run
from anabranch.runtime.machine import cache_folder, code_digest, keep, processor
from anabranch.runtime.parallel_network import ParallelNetwork, set_memory_format
from anabranch.runtime.process_group import gather_json
from anabranch.runtime.rank_batch import RankBatch

MemoryFormat = Literal["contiguous", "channels_last"]
_Way = tuple[Execution, MemoryFormat]
_FORMS: tuple[Execution, ...] = get_args(Execution)
_FIRST = _FORMS[0]  # taken where no other is clearly faster
_REPEATS, _MOST_REPEATS = 5, 10  # more of them while two forms are close, for _ENOUGH_S at most
_CLOSE = 0.9
_FEW_REPEATS, _HOPELESS = 3, 1.3  # a form that takes so much more than the fastest after so many is left out
_ENOUGH_S = 10.0
_LONG_S = 0.5  # a block that takes longer is measured on fewer samples; another form may then be the fastest
CLEARLY = 0.97  # what is not at least as much faster is noise: contiguous, one chunk, not compiled
_FORM_CLEARLY = 0.985  # of forms, which are run again while they are close: else fused


@dataclass(frozen=True)
class HowToRun:
    """The same on all ranks. execution: by block name. memory_format: of the whole network. Others: as in `[mesh]`.

    compiled: by block what became of `mesh.compile` ("compiled", or why it runs as it is); empty where it is off.
    Branches one by one leave their weight gradients to autograd, so that `overlap` hides nothing behind them: only
    those of wide convolutions are computed while the input's gradient travels.
    """

    execution: dict[str, Execution]
    memory_format: MemoryFormat
    wire: Literal["fp32", "bf16"] = "fp32"
    overlap: bool = False
    recompute: bool = False
    chunks: int = 1
    compiled: dict[str, str] = field(default_factory=dict)

    def apply(self, network: ParallelNetwork) -> None:
        """Before an optimizer or reducer is made."""
        network.use_memory_format(channels_last=self.memory_format == "channels_last")
        network.wire.half, network.wire.overlap = self.wire == "bf16", self.overlap
        network.wire.chunks = self.chunks
        network.recompute = self.recompute
        for name, block, _ in network.elements():
            for _, block_sum in branch_sums(block):
                block_sum.execution = self.execution[name]

    def differs_from(self, settings: Settings) -> list[str]:
        """Fields that settings state otherwise; what they leave open ("auto", chunks 0) is no other."""
        stated: dict[str, Any] = {"wire": settings.wire, "recompute": settings.recompute}
        if settings.chunks:
            stated["chunks"] = settings.chunks
        if settings.memory_format != "auto":
            stated["memory_format"] = settings.memory_format
        if settings.overlap != "auto":
            stated["overlap"] = settings.overlap == "on"
        found = [name for name, value in stated.items() if value != getattr(self, name)]
        if settings.execution != "auto" and {*self.execution.values()} - {settings.execution}:
            found.append("execution")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, which `from_dict` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> HowToRun:
        return cls(**told)


class Settings(Protocol):
    """Of `[mesh]`; "auto" where it is to be found out."""

    @property
    def execution(self) -> str: ...
    @property
    def memory_format(self) -> str: ...
    @property
    def wire(self) -> str: ...
    @property
    def overlap(self) -> str: ...
    @property
    def recompute(self) -> bool: ...
    @property
    def chunks(self) -> int: ...


def how_to_run(
    network: ParallelNetwork,
    image_shape: tuple[int, ...],
    rows: RankBatch,
    settings: Settings,
    *,
    precision: str,
    ours: bool,
    on_progress: OnProgress = silent,
) -> HowToRun:
    """What the configuration says, and where it says "auto" the fastest way. Collective.

    image_shape: (C, H, W). rows: a micro-batch. ours: a network of this project (`is_ours`, asked before it is
    parallelized); others may be written for contiguous images, which they then get. on_progress: is told how many
    distinct blocks are timed.
    """
    how = _ways_to_run(network, image_shape, rows, settings, precision, ours, on_progress)
    if how.chunks == 0:
        wire = replace(
            network.wire, recorder=None, report=lambda parameter: None, half=how.wire == "bf16", overlap=how.overlap,
            channels_last=how.memory_format == "channels_last",
        )  # fmt: skip
        chunks = fastest_chunks(
            network, image_shape, len(rows.group_range), how.execution, wire, precision, CLEARLY
        )
        how = replace(how, chunks=chunks)
    return how


def _ways_to_run(
    network: ParallelNetwork, image_shape: tuple[int, ...], rows: RankBatch, settings: Settings, precision: str,
    ours: bool, on_progress: OnProgress,
) -> HowToRun:  # fmt: skip
    """`how_to_run`, with the chunks as configured."""
    execution, memory_format = settings.execution, settings.memory_format
    names = [name for name, _, _ in network.elements()]
    is_cuda = next(network.parameters()).is_cuda
    overlap = settings.overlap == "on" or (settings.overlap == "auto" and is_cuda)

    def settle(by_name: dict[str, Execution], layout: MemoryFormat) -> HowToRun:
        return HowToRun(by_name, layout, settings.wire, overlap, settings.recompute, settings.chunks)  # type: ignore[arg-type]

    formats: list[MemoryFormat] = ["contiguous", "channels_last"]
    if memory_format != "auto":
        formats = ["channels_last" if memory_format == "channels_last" else "contiguous"]
    elif not ours or len(image_shape) != 3:
        formats = ["contiguous"]
    if execution != "auto" and len(formats) == 1:
        return settle(dict.fromkeys(names, _told(execution)), formats[0])
    ways: list[_Way] = [(form, layout) for layout in formats for form in _FORMS]
    cache = _Cache(network, precision, ways)
    num_rows = {"own": len(rows.own_range), "group": len(rows.group_range)}
    keys = _measured(network, image_shape, num_rows, precision, cache, on_progress)
    mine = {"host": socket.gethostname(), "keys": keys, "kept": cache.kept, "measured": cache.measured}
    told = gather_json(mine, next(network.parameters()).device)
    agreed = _agreed(told)
    if [one["host"] for one in told].index(mine["host"]) == network.mesh.rank:  # the first of its host
        cache.keep(agreed)

    def seconds(name: str, way: _Way) -> float:
        """Over all ranks, which may hold different numbers of branches."""
        index = ways.index(way)
        return sum(agreed[key][index] for one in told if (key := one["keys"].get(name)))

    def best(name: str, layout: MemoryFormat) -> Execution:
        if execution != "auto":
            return _told(execution)
        by_form = {form: seconds(name, (form, layout)) for form in _FORMS}
        fastest = min(_FORMS, key=by_form.__getitem__)
        return fastest if by_form[fastest] < _FORM_CLEARLY * by_form[_FIRST] else _FIRST

    totals = [sum(seconds(name, (best(name, layout), layout)) for name in names) for layout in formats]
    chosen = formats[1] if len(formats) > 1 and totals[1] < CLEARLY * totals[0] else formats[0]
    return settle({name: best(name, chosen) for name in names}, chosen)


def _told(execution: str) -> Execution:
    """A configuration's, which may also say "auto": then nothing is to be measured."""
    return next((form for form in _FORMS if form == execution), _FIRST)


def is_ours(network: nn.Module) -> bool:
    """Whether a network is one of this project's, whose modules take any memory format."""
    return isinstance(network, Network)


def _agreed(told: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Of every block the mean over the ranks: of what was kept, and only where nothing was of what was measured now.

    For a run that is repeated finds what was agreed on, on all hosts.
    """
    found: dict[str, list[float]] = {}
    for source in ("kept", "measured"):
        for key in {key for one in told for key in one[source]} - found.keys():
            seen = [one[source][key] for one in told if key in one[source]]
            found[key] = [statistics.mean(column) for column in zip(*seen, strict=True)]
    return found


class _Cache:
    """Seconds by block, for each of `ways`: a file a block, in a folder a kind of device, version and ways.

    The first figures stay, so that all later runs choose alike. kept, measured: those that this network asked for, by
    folder and block: ranks on devices of another kind have others.
    """

    def __init__(self, network: ParallelNetwork, precision: str, ways: Sequence[_Way]) -> None:
        device = next(network.parameters()).device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        parts = [
            kind,
            torch.__version__,
            code_digest(),
            torch.get_num_threads(),
            precision,
            os.environ.get("LD_PRELOAD", ""),
            # figures made in another way are others
            (ways, _FEW_REPEATS, _HOPELESS, _REPEATS, _MOST_REPEATS, _ENOUGH_S, _LONG_S),
        ]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        self._folder = f"execution-{digest}"
        self.ways = ways
        self.kept: dict[str, list[float]] = {}
        self.measured: dict[str, list[float]] = {}

    def key(self, element: nn.Module, x_shape: tuple[int, ...]) -> str:
        """Of an element's figures on this kind of device, for an input of this shape."""
        return f"{self._folder}/{key_of(element, x_shape)}"

    def read(self, key: str) -> list[float] | None:
        """What is kept, if anything whole is."""
        try:
            seconds = [float(s) for s in json.loads(self._path(key).read_text())]
        except (OSError, ValueError, TypeError):
            return None
        return seconds if len(seconds) == len(self.ways) else None

    def keep(self, agreed: Mapping[str, list[float]]) -> None:
        """Writes what was not there."""
        for key, seconds in agreed.items():
            if self.read(key) is None:
                keep(self._path(key), json.dumps(seconds).encode())

    @staticmethod
    def _path(key: str) -> Path:
        return cache_folder() / f"{key}.json"


def _measured(
    network: ParallelNetwork,
    image_shape: tuple[int, ...],
    num_rows: Mapping[str, int],
    precision: str,
    cache: _Cache,
    on_progress: OnProgress,
) -> dict[str, str]:
    """The key of every element that runs samples here; figures of them all are in `cache` afterwards."""
    keys: dict[str, str] = {}
    unknown: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    parameter = next(network.parameters())
    for name, module, rows, shape in input_shapes(network.elements(), image_shape, parameter):
        if not (num_rows[rows] and shape):
            continue
        with alone(module) as element:
            keys[name] = key = cache.key(element, (num_rows[rows], *shape))
        if key in cache.kept or key in unknown:
            continue
        if kept := cache.read(key):
            cache.kept[key] = kept
        else:
            # at least two samples: BatchNorm refuses one number a channel
            unknown[key] = module, (max(num_rows[rows], 2), *shape)
    for done, (key, (module, size)) in enumerate(unknown.items()):
        on_progress(done, len(unknown))
        x = torch.randn(size, dtype=parameter.dtype, device=parameter.device)
        with alone(module) as element:
            cache.measured[key] = _timed(element, x, precision, cache.ways)
    return keys


def _timed(element: nn.Module, x: Tensor, precision: str, ways: Sequence[_Way]) -> list[float]:
    """Seconds forward and backward, for each of `ways`; forms that do not differ take what the first takes."""
    forms = {form for _, one in branch_sums(element) for form in one.executions} | {_FIRST}
    sides: dict[_Way, nn.Module] = {}
    for execution, layout in ways:
        if execution not in forms:
            continue
        sides[execution, layout] = side = copy.deepcopy(element)
        set_memory_format(side, channels_last=layout == "channels_last")
        for _, block_sum in branch_sums(side):
            block_sum.execution = execution
    few = x if x.is_cuda else x[:2]  # on a GPU few samples take what starting kernels takes
    for side in sides.values():
        run(side, few, precision)  # the first run of a shape sets its kernels up
    x = x[: max(2, int(_LONG_S / (run(sides[ways[0]], few, precision) / len(few))))]
    images = {"contiguous": x, "channels_last": x}
    if x.dim() == 4:
        images["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    samples: dict[_Way, list[float]] = {way: [] for way in sides}
    begun = time.perf_counter()
    for turn in range(_MOST_REPEATS):
        if turn >= _REPEATS and (not _any_close(samples) or time.perf_counter() - begun > _ENOUGH_S):
            break
        for way, side in sides.items():
            if turn >= _FEW_REPEATS and min(samples[way]) > _HOPELESS * min(map(min, samples.values())):
                continue
            samples[way].append(run(side, images[way[1]], precision))
    return [min(samples.get((execution, layout)) or samples[_FIRST, layout]) for execution, layout in ways]


def _any_close(samples: Mapping[_Way, Sequence[float]]) -> bool:
    """Whether the two fastest forms take nearly the same in a memory format."""
    for layout in get_args(MemoryFormat):
        fastest = sorted(min(seconds) for (_, of), seconds in samples.items() if of == layout)
        if len(fastest) > 1 and fastest[0] > _CLOSE * fastest[1]:
            return True
    return False

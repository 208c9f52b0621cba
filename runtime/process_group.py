"""The process group of a worker, and small talk between ranks without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from anabranch.cluster import WorkerContext
from anabranch.cluster.environment import keep_freed_memory
from anabranch.runtime import exchange
from anabranch.runtime.numerics import use_numerics

_HEAD = 512  # bytes of a message that travel in the first exchange, mostly all; the first _DIGITS: how many it has
_DIGITS = 12
_TIMEOUT_S = 600.0
_timeout_s = _TIMEOUT_S  # of the default process group


def group_timeout_s() -> float:
    """How long exchanges wait for a rank, in all groups: what `process_group` was told."""
    return _timeout_s


@contextmanager
def process_group(
    context: WorkerContext,
    timeout_s: float = _TIMEOUT_S,
    precision: str = "fp32",
    join_s: float | None = None,
) -> Iterator[None]:
    """The default process group over all ranks, left at the end; one rank alone gets one of its own.

    Inside a group that stands already it is that one, with that one's timeout. precision: `train.precision`, from here
    on this process's. join_s: in place of timeout_s, for the ranks to come and for this group's own exchanges.
    """
    global _timeout_s
    use_numerics(precision)
    if dist.is_initialized():
        yield
        return
    if context.device.startswith("cuda"):
        torch.cuda.set_device(context.device)
    else:
        keep_freed_memory()
    torch.set_num_threads(context.num_threads)
    if (
        context.recovers
    ):  # else torch ends this process where a peer is gone, and nothing of it is left to go on with
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    timeout = timedelta(seconds=timeout_s if join_s is None else join_s)
    _timeout_s = timeout_s
    _forget_groups()
    if context.init_method.startswith("tcp://"):
        # The port may be the one of the generation before: who is late for that one must not be taken for one of us.
        store, _, _ = next(rendezvous(context.init_method, context.rank, context.world_size, timeout=timeout))
        own = dist.PrefixStore(f"generation-{context.generation}", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            context.backend, store=own, rank=context.rank, world_size=context.world_size, timeout=timeout
        )
    elif context.init_method:
        dist.init_process_group(
            context.backend, init_method=context.init_method, rank=context.rank, world_size=context.world_size,
            timeout=timeout,
        )  # fmt: skip
    else:
        dist.init_process_group(
            context.backend,
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=context.rank,
            world_size=context.world_size,
            timeout=timeout,
        )
    try:
        yield
    finally:
        try:
            exchange.close()
        finally:
            if dist.is_initialized():
                with suppress(RuntimeError):  # of groups that were given up
                    dist.destroy_process_group()
            _forget_groups()
            _timeout_s = _TIMEOUT_S


def _forget_groups() -> None:
    """What torch keeps of a group that could not be formed, or ended: it counts names up.

    Ranks that failed to form one, others of them than the rest, would look for each other under different names from
    then on, and never meet.
    """
    c10d = dist.distributed_c10d  # as destroy_process_group does it, which wants a group that stands
    c10d._update_default_pg(None)
    world = c10d._world
    for kept in (
        world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag,
        world.tags_to_pg, world.pg_coalesce_state,
    ):  # fmt: skip
        kept.clear()
    c10d._unregister_all_process_groups()  # type: ignore[attr-defined]
    world.group_count = 0


def share_memory(group: dist.ProcessGroup) -> None:
    """Let exchanges of CPU tensors over the group go through shared memory, where all its ranks are on one host.
    Collective."""
    if group.size() > 1 and dist.get_backend(group) == "gloo" and not exchange.shares_memory(group):
        exchange.share_memory(group, partial(gather_json, device="cpu", group=group), _timeout_s)


def broadcast_json(value: Any, device: torch.device | str, source: int = 0) -> Any:
    """Plain data from one rank to all: as text, so that nothing received can run code."""
    return gather_json(value, device)[source]


def gather_json(value: Any, device: torch.device | str, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's plain data, by rank, on all ranks of the group (default: all)."""
    group = group or dist.group.WORLD
    assert group is not None, "in a process group"
    text = json.dumps(value).encode()
    if group.size() == 1:
        return [json.loads(text)]
    head = f"{len(text):{_DIGITS}}".encode() + text[: _HEAD - _DIGITS]
    heads = _gather_bytes(head.ljust(_HEAD), [_HEAD] * group.size(), device, group)
    sizes = [int(one[:_DIGITS]) for one in heads]
    if max(sizes) <= _HEAD - _DIGITS:
        return [json.loads(one[_DIGITS:]) for one in heads]
    return [json.loads(one) for one in _gather_bytes(text, sizes, device, group)]


def _gather_bytes(
    mine: bytes, sizes: list[int], device: torch.device | str, group: dist.ProcessGroup
) -> list[bytes]:
    """Every rank's bytes; sizes: how many, by rank."""
    rows = exchange.all_gather(torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device), sizes, group)
    exchange.wait_for(rows.device)
    return [row.numpy().tobytes() for row in rows.cpu().split(sizes)]

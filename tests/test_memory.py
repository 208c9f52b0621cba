"""A rank holds its branches and what is replicated, and nothing else: bytes counted by hand against storages."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence

import pytest
import torch
from parity_cases import Case, S, seeded
from ranks import run_ranks
from torch import Tensor

from anabranch.runtime.config import OptimizerConfig
from anabranch.runtime.deal import deal_step
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.optimizer import make_optimizer
from anabranch.runtime.parallel_network import branch_tensors, parallelize
from anabranch.runtime.step import TrainStep
from anabranch.runtime.verify import micro_batches

FLOAT, LONG = 4, 8

# The network "basic": 5 branches; blocks (in, out) channels, whether the first BN-ReLU is shared.
BLOCKS = [(16, 16, True), (16, 16, False), (16, 32, True), (32, 64, True)]
BRANCHES = 5


def parameters_by_hand(held: Sequence[int]) -> int:
    """Numbers in the parameters of a rank that holds so many branches of each block."""
    total = 2 * 16 * 9  # the stem's 3×3 convolution of 2 channels
    for (inputs, outputs, shared), branches in zip(BLOCKS, held, strict=True):
        total += 2 * inputs if shared else 0  # the shared BN
        own = 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs  # conv, BN, conv
        total += branches * (own + (0 if shared else 2 * inputs))
    return total + 2 * 64 + 64 * 5 + 5  # the head's BN and linear layer


def buffer_bytes_by_hand(held: Sequence[int]) -> int:
    """Running means, variances and counters of the BatchNorms: two a block, one in the head."""
    channels = 64 + sum(
        inputs + branches * outputs for (inputs, outputs, _), branches in zip(BLOCKS, held, strict=True)
    )
    return 2 * channels * FLOAT + (2 * len(BLOCKS) + 1) * LONG


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under these tensors: a view holds all of what it looks at."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def live_tensors() -> list[Tensor]:
    """Every tensor of the process that takes memory."""
    gc.collect()
    return [t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type != "meta"]


def measured(rank: int, world_size: int, case: Case, optimizer: str) -> dict[str, int]:
    mesh = make_mesh(*case.mesh)
    before = live_tensors()  # kept alive: what an exchange still holds would be let go of in between
    assert storage_bytes(before) < 10_000, "a fresh process: at most what the ranks have just told each other"
    network = seeded(case.network)
    whole = storage_bytes([*network.parameters(), *network.buffers()])
    owned = branch_tensors(network)
    tensors = [*network.named_parameters(), *network.named_buffers()]
    originals = {name: weakref.ref(t) for name, t in tensors if name in owned}
    del tensors
    parallel = parallelize(network, case.plan(), mesh)
    del network
    after = storage_bytes(live_tensors()) - storage_bytes(before)
    for name, role in parallel.roles.items():
        if role.tensor is not None and len(role.tensor.held) < BRANCHES:
            assert originals[name]() is None, f"the original of {name} is alive"
    config = OptimizerConfig(name="adamw" if optimizer == "adamw" else "sgd")
    made = make_optimizer(config, parallel.parameters())
    step = TrainStep(parallel, made, case.made_trial().loss)
    deals = deal_step(16, bn_batch_size=4, data=mesh.data, branch=mesh.branch)
    trial = case.made_trial()
    step.gradients(micro_batches(parallel, trial, torch.arange(16), deals, 0, "cpu"))
    step.apply(0.1)
    state = [v for s in made.state.values() for v in s.values() if isinstance(v, Tensor) and v.dim()]
    return {
        "whole": whole,
        "network": after,
        "parameters": storage_bytes(parallel.parameters()),
        "state": storage_bytes(state),
    }


@pytest.mark.parametrize(
    ("case", "optimizer"),
    [
        (Case("basic", (1, 2), ((3, 2),), "rr", trial={"precision": "fp32"}), "sgd"),
        (Case("basic", (1, 2), ((5, 0), (0, 5), S, (4, 1)), "ss", trial={"precision": "fp32"}), "adamw"),
        (Case("basic", (2, 1), (S,), "ss", trial={"precision": "fp32"}), "sgd"),
        (Case("basic", (2, 2), ((3, 2), S, (5, 0), (1, 4)), "rr", trial={"precision": "fp32"}), "sgd"),
    ],
    ids=["even", "mixed", "data", "2x2"],
)
def test_a_rank_holds_its_branches_and_the_replicated_tensors(case: Case, optimizer: str) -> None:
    placements = case.blocks * len(BLOCKS) if len(case.blocks) == 1 else case.blocks
    everything = [BRANCHES] * len(BLOCKS)
    for rank, found in enumerate(run_ranks(case.world_size, measured, case, optimizer)):
        branch_rank = rank % case.mesh[1]
        held = [BRANCHES if isinstance(p, str) else p[branch_rank] for p in placements]
        parameters = parameters_by_hand(held) * FLOAT
        assert found["whole"] == parameters_by_hand(everything) * FLOAT + buffer_bytes_by_hand(everything)
        assert found["network"] == parameters + buffer_bytes_by_hand(held)
        assert found["parameters"] == parameters
        assert found["state"] == parameters * (2 if optimizer == "adamw" else 1)

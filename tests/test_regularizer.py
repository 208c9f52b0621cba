"""The orthogonality regularizer, on one device and with elements on different ranks, and the two analyses of bases."""

from __future__ import annotations

import importlib.util
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from basis_cases import Case, Layout, plan_for, seeded
from ranks import run_ranks
from rich.console import Console
from torch import nn

from anabranch.blocks.mobilenet import mobilenet_v2
from anabranch.blocks.shared_basis import basis_groups
from anabranch.blocks.shared_resnet import cifar_resnet
from anabranch.blocks.shared_transform import share_bases, tie_convolutions
from anabranch.runtime import basis_analysis, commands
from anabranch.runtime.assemble import make_data, make_network
from anabranch.runtime.basis_analysis import (
    GradientFlow,
    coefficient_similarity,
    plot_coefficient_similarity,
    plot_gradient_flow,
)
from anabranch.runtime.basis_record import check_recordable, read_gradient_flow
from anabranch.runtime.branch_state import by_branch
from anabranch.runtime.callbacks import Callback
from anabranch.runtime.config import Config, ModelConfig
from anabranch.runtime.driver import Driver
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.mesh import make_mesh
from anabranch.runtime.model_spec import spec_of
from anabranch.runtime.parallel_network import ParallelNetwork, branch_tensors, parallelize
from anabranch.runtime.regularizer import OrthogonalityPenalty, OrthogonalityRegularizer, one_device_penalty
from anabranch.runtime.trainer import Trainer


def matrices(network: nn.Module, joint: bool = True) -> dict[str, torch.Tensor]:
    held = dict(network.named_parameters(remove_duplicate=False))
    return {
        group.name: torch.cat([held[name].detach().flatten(1) for name in group.parameters])
        for group in basis_groups(network, joint=joint)
    }


def value(network: nn.Module, **options: Any) -> float:
    return float(one_device_penalty(network, OrthogonalityPenalty(**options)).detach())


def distance(rows: torch.Tensor) -> float:
    return float((rows @ rows.T - torch.eye(len(rows))).square().sum())


def test_the_mean_divides_by_all_gram_entries() -> None:
    network = seeded("double")
    bases = matrices(network).values()
    assert [tuple(rows.shape) for rows in bases] == [(8, 36), (16, 72)]
    total = sum(distance(rows) for rows in bases)
    assert value(network) == pytest.approx(10 * total / (8**2 + 16**2), rel=1e-5)
    assert value(network, weight=0.5, normalisation="sum") == pytest.approx(0.5 * total, rel=1e-5)


def test_places_have_means_of_their_own() -> None:
    """As the authors: the mean over all 3×3 bases plus the mean over all 1×1 bases."""
    network = seeded("tied")
    basis, coefficients = matrices(network).values()
    expected = 10 * (distance(basis) / len(basis) ** 2 + distance(coefficients) / len(coefficients) ** 2)
    assert value(network) == pytest.approx(expected, rel=1e-5)


def test_separate_bases_leave_out_what_is_between_them() -> None:
    network = seeded("double")
    first = [rows for name, rows in matrices(network, joint=False).items() if name.endswith("1")]
    second = [rows for name, rows in matrices(network, joint=False).items() if name.endswith("2")]
    expected = 0.0
    for kind in (first, second):
        expected += sum(distance(rows) for rows in kind) / sum(len(rows) ** 2 for rows in kind)
    assert value(network, joint=False) == pytest.approx(10 * expected, rel=1e-5)


def test_own_elements_are_rows_where_the_network_says_so() -> None:
    shapes = {name: tuple(rows.shape) for name, rows in matrices(seeded("single")).items()}
    assert shapes == {"stage1.basis": (8, 36), "stage2.basis": (12, 72)}  # 4 + 4 own, 8 + 2·2 own


def test_groups_have_weights() -> None:
    network = seeded("double")
    bases = matrices(network)
    weighted = value(
        network, weight=1.0, normalisation="sum", group_weights={"stage1.basis": 0.25, "stage2.basis": 0.0}
    )
    assert weighted == pytest.approx(0.25 * distance(bases["stage1.basis"]), rel=1e-5)
    with pytest.raises(ConfigError, match=r"stage3\.basis; the groups are stage1\.basis, stage2\.basis"):
        one_device_penalty(network, OrthogonalityPenalty(group_weights={"stage3.basis": 1.0}))


def test_its_gradient_is_four_times_the_residual_times_the_basis() -> None:
    network = seeded("double").double()
    one_device_penalty(network, OrthogonalityPenalty(2.0, "sum")).backward()
    held = dict(network.named_parameters(remove_duplicate=False))
    for group in basis_groups(network):
        rows = torch.cat([held[name].detach().flatten(1) for name in group.parameters])
        expected = 8 * (rows @ rows.T - torch.eye(len(rows))) @ rows
        grads = [held[name].grad for name in group.parameters]
        actual = torch.cat([grad.flatten(1) for grad in grads if grad is not None])
        torch.testing.assert_close(actual, expected)


def test_descent_makes_bases_orthonormal() -> None:
    network = share_bases(cifar_resnet(14, width=4), 4, 1, own_in_basis=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)  # at 0.05 most draws diverge
    for _ in range(400):
        optimizer.zero_grad()
        penalty = one_device_penalty(network, OrthogonalityPenalty(1.0, "sum"))
        penalty.backward()
        optimizer.step()
    assert float(penalty.detach()) < 1e-6


def test_too_many_elements_are_told() -> None:
    """An expansion c → 6c has 6c rows of c numbers: the minimum is 5c."""
    network = tie_convolutions(mobilenet_v2(0.25), ("basis", "coefficients"))
    penalty = OrthogonalityPenalty(weight=1.0, normalisation="sum")
    groups = penalty.groups(network)
    shapes = {name: tensor.shape for name, tensor in network.named_parameters(remove_duplicate=False)}
    told = penalty.warnings(groups, shapes)
    assert len(told) == sum(group.kind == "basis" for group in groups) == 4
    assert told[0] == (
        "basis stage3.basis has 48 elements of 8 numbers, which cannot be orthonormal: "
        "its ‖BBᵀ − I‖² is at least 40, not 0"
    )
    rows = matrices(network)["stage3.basis"]  # orthogonal init reaches the minimum
    assert distance(rows) == pytest.approx(40, rel=1e-4)


def test_the_command_line_tells_it_before_training(tmp_path: Path) -> None:
    options = {"base": "resnet50", "tied": ["basis", "coefficients"], "blocks_per_stage": [3, 1, 1, 1]}
    layer = {"model": {"name": "shared_basis", "options": options}}
    config = Config.from_dict(short_run(tmp_path).to_dict(), layer)
    said = io.StringIO()
    with Driver(config, Console(file=said, width=80)):
        pass
    assert (
        "warning: basis stage1.coefficients has 256 elements of 64 numbers, which cannot be orthonormal: "
        "its ‖BBᵀ − I‖² is at least 192, not 0" in said.getvalue()
    )


def test_what_cannot_be_regularized_is_refused() -> None:
    with pytest.raises(ConfigError, match="shares no filter basis"):
        one_device_penalty(cifar_resnet(8), OrthogonalityPenalty())
    with pytest.raises(ConfigError, match='normalisation is "mean" or "sum"'):
        one_device_penalty(seeded("double"), OrthogonalityPenalty(normalisation="max"))  # type: ignore[arg-type]


# --- elements on different ranks ---


def penalty_on_ranks(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    """For each case: how far value and gradients are from autograd on one device, and the two analyses."""
    found = []
    for case in cases:
        network, reference = seeded(case.network).double(), seeded(case.network).double()
        expected = one_device_penalty(reference, OrthogonalityPenalty(**(case.penalty or {})))
        expected.backward()
        whole = branch_tensors(reference)
        mesh = make_mesh(*case.mesh)
        parallel = parallelize(network, plan_for(spec_of(network), case), mesh)
        regularizer = OrthogonalityRegularizer(parallel, OrthogonalityPenalty(**(case.penalty or {})))
        flow, one_flow = GradientFlow(parallel, 10), GradientFlow(reference, 10)
        penalty = regularizer.add_gradients()
        held = branch_tensors(parallel)
        reference_grads = {n: p.grad for n, p in reference.named_parameters(remove_duplicate=False)}
        worst = 0.0
        for name, parameter in parallel.named_parameters(remove_duplicate=False):
            theirs = reference_grads[name]
            assert (parameter.grad is None) == (theirs is None), name
            if parameter.grad is None or theirs is None:
                continue
            parts = by_branch(name, theirs, whole)
            for key, part in by_branch(name, parameter.grad, held).items():
                worst = max(worst, float((part - parts[key]).abs().max() / theirs.abs().max()))
        for step in range(0, 25, 5):
            flow.on_gradients(step)
            one_flow.on_gradients(step)
        similar, one_similar = coefficient_similarity(parallel), coefficient_similarity(reference)
        found.append(
            {
                "value": abs(float(penalty / expected.detach()) - 1.0),
                "gradient": worst,
                "flow": flow.history,
                "one_flow": one_flow.history,
                "similarity": max(float((similar[n] - one_similar[n]).abs().max()) for n in one_similar),
                "warnings": regularizer.warnings,
            }
        )
    return found


LAYOUTS: list[tuple[str, tuple[int, int], Layout]] = [
    ("single", (1, 2), "strided"), ("double", (1, 2), "none"), ("tied", (1, 2), "even"), ("mobilenet", (1, 2), "mixed"),
    ("single", (2, 2), "even"), ("double", (2, 2), "mixed"), ("all", (1, 4), "strided"), ("resnext", (2, 2), "strided"),
]  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_gets_its_rows_of_the_one_device_gradient(world_size: int) -> None:
    cases = [Case(name, mesh, layout) for name, mesh, layout in LAYOUTS if math.prod(mesh) == world_size]
    cases.append(Case("double", (1, world_size), "strided", penalty={"joint": False, "normalisation": "sum"}))
    for by_case in run_ranks(world_size, penalty_on_ranks, cases):
        for case, result in zip(cases, by_case, strict=True):
            assert result["value"] < 1e-12, case
            assert result["gradient"] < 1e-12, case
            assert result["similarity"] < 1e-12, case
            assert bool(result["warnings"]) == (case.network in ("tied", "all", "mobilenet")), case
            assert result["flow"].keys() == result["one_flow"].keys()
            for name, samples in result["flow"].items():
                assert [sample["step"] for sample in samples] == [0, 10, 20]
                for sample, expected in zip(samples, result["one_flow"][name], strict=True):
                    assert sample == pytest.approx(expected, rel=1e-9), (case, name)


# --- analyses ---


def test_gradient_flow_is_of_the_shared_elements() -> None:
    network = seeded("single")
    flow = GradientFlow(network, every_steps=2)
    one_device_penalty(network, OrthogonalityPenalty()).backward()
    for step in range(5):
        flow.on_gradients(step)
    held = dict(network.named_parameters(remove_duplicate=False))
    group = basis_groups(network)[0]
    grad = held[group.shared[0]].grad
    assert grad is not None
    expected = {"step": 4, "max": float(grad.abs().max()), "mean": float(grad.abs().mean())}
    assert flow.history["stage1.basis"][-1] == pytest.approx(expected, rel=1e-5)
    assert len(flow.history["stage1.basis"]) == 3


def test_similarity_is_of_coefficients_of_one_basis() -> None:
    network = seeded("double")
    found = coefficient_similarity(network)
    assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {
        "stage1.basis1": (8, 8), "stage1.basis2": (8, 8),
        "stage2.basis1": (8, 8), "stage2.basis2": (8, 8),
    }  # fmt: skip
    held = dict(network.named_parameters())
    weights = [held[f"blocks.stage1.block{b}.first.coefficients.weight"][:, 1:, 0, 0] for b in (2, 3)]
    rows = torch.cat(weights).double()  # without the own element's coefficient
    expected = torch.cosine_similarity(rows[:, None], rows[None], dim=2).abs()
    torch.testing.assert_close(found["stage1.basis1"], expected)
    with mock.patch.object(basis_analysis, "_MOST_ROWS", 3):
        fewer = coefficient_similarity(network)
    assert torch.equal(fewer["stage1.basis1"], found["stage1.basis1"][::3, ::3]), "every third of eight"


def test_plots_are_written(tmp_path: Path) -> None:
    network = seeded("double")
    flow = GradientFlow(network, every_steps=1)
    one_device_penalty(network, OrthogonalityPenalty()).backward()
    flow.on_gradients(0)
    flow.on_gradients(1)
    plot_gradient_flow({"without": flow.history, "with": flow.history}, tmp_path / "figure3.png")
    plot_coefficient_similarity(coefficient_similarity(network), tmp_path / "figure4.png")
    for name in ("figure3.png", "figure4.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_figures_of_long_runs_are_thinned(tmp_path: Path) -> None:
    """A figure of a million steps is drawn in the time of a hundred."""
    samples = [{"step": step, "max": 1.0, "mean": 0.5} for step in range(0, 1_000_000, 10)]
    plot_gradient_flow({"": {"stage1.basis": samples}}, tmp_path / "figure3.png")
    assert (tmp_path / "figure3.png").stat().st_size > 1000


class Norms(Callback):
    """A user's look at gradients, and at what the network is in the end."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.num_trained = 0

    def on_gradients(self, step: int, network: ParallelNetwork) -> None:
        grads = [p.grad for p in network.parameters()]
        assert all(grad is not None for grad in grads)
        self.steps.append(step)

    def on_trained(self, network: ParallelNetwork) -> None:
        assert all(p.grad is None for p in network.parameters())
        self.num_trained += 1


def short_run(folder: Path, **profile: int) -> Config:
    """Five steps of a small network with shared bases on the digits."""
    return Config.from_dict(
        {
            "model": {
                "name": "c10_resnet32_s16u1x2", "options": {"shared": 4, "width": 4, "depth": 14}
            },
            "data": {"name": "digits"},
            "train": {"max_steps": 5, "batch_size": 16, "epochs": 1, "orthogonality": 10.0},
            "launch": {"launcher": "none", "run_dir": str(folder)},
            "mesh": {
                "shape": "1x1", "num_workers": 1, "execution": "fused", "memory_format": "contiguous"
            },
            "profile": profile,
        }
    )  # fmt: skip


def test_train_writes_analyses_beside_the_run(tmp_path: Path) -> None:
    commands.train(short_run(tmp_path / "run", basis_every_steps=2), Console(quiet=True))
    assert {path.name for path in (tmp_path / "run/basis").iterdir()} == {
        "gradient_flow.jsonl", "gradient_flow.png", "coefficient_similarity.safetensors", "coefficient_similarity.png"
    }  # fmt: skip
    history = read_gradient_flow(tmp_path / "run")
    assert len(history) == 6
    assert [sample["step"] for sample in history["stage2.basis1"]] == [0, 2, 4]
    commands.train(short_run(tmp_path / "off"), Console(quiet=True))
    tied = replace(
        short_run(tmp_path / "tied", basis_every_steps=2),
        model=ModelConfig(
            "shared_basis", {"base": "cifar_resnet", "tied": ["coefficients"], "width": 4, "depth": 20}
        ),
    )
    commands.train(tied, Console(quiet=True))
    assert {path.name for path in (tmp_path / "tied/basis").iterdir()} == {
        "gradient_flow.jsonl", "gradient_flow.png"
    }, "no elements are shared: there are no coefficients over them"  # fmt: skip
    with pytest.raises(ConfigError, match=r"gradient_flow\.jsonl: train with --profile\.basis-every-steps"):
        read_gradient_flow(tmp_path / "off")


def test_analyses_that_cannot_be_made_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_run(tmp_path / "run", basis_every_steps=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="draws figures with matplotlib, which is not installed: pip install"
    ):
        commands.train(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="shares no filter basis"):
        check_recordable(cifar_resnet(8))


def test_callbacks_see_gradients_of_every_step_and_the_trained_network() -> None:
    config, callback = short_run(Path()), Norms()
    data = make_data(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        Trainer(make_network(config, data), data, config, callbacks=[callback]).fit()
    assert callback.steps == [0, 1, 2, 3, 4]
    assert callback.num_trained == 1

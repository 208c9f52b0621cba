"""Two looks at shared filter bases, as data and as the paper's Figures 3 and 4.

`GradientFlow` records the largest and the mean |gradient| that reaches each basis, every ten iterations.
`coefficient_similarity` gives |cosine| between all coefficient vectors of blocks that share a basis. Both work on a
one-device network and on a rank's part of one, where every rank calls them. Plots need matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.blocks.branch_sum import branch_sums
from anabranch.blocks.filter_sum import FilterSum
from anabranch.blocks.network import named_blocks
from anabranch.blocks.shared_basis import basis_groups
from anabranch.runtime.errors import ConfigError
from anabranch.runtime.parallel_network import ParallelNetwork

_MOST_BARS = 100
_MOST_ROWS = 4096  # a ResNet-101's third stage has 22,528, and 4 GB of cosines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class GradientFlow:
    """Gradients in the shared elements of each basis during training.

    history: basis name → one {"step", "max", "mean"} of |gradient| for each step recorded; plain data, the same on
        every rank. Two bases of a stage ("double") are two.
    """

    def __init__(self, network: nn.Module, every_steps: int = 10) -> None:
        self.network, self.every_steps = network, every_steps
        self.bases = {group.name: group.shared for group in basis_groups(network, joint=False)}
        if not self.bases:
            raise ConfigError("the network shares no filter basis: there is no gradient flow to record")
        self.history: dict[str, list[dict[str, float]]] = {name: [] for name in self.bases}
        self._parameters = dict(network.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def on_gradients(self, step: int) -> bool:
        """Records if `step` is a multiple of `every_steps`, and says so: call it when gradients are whole, before the
        update."""
        if step % self.every_steps:
            return False
        sums, tops = [], []
        for names in self.bases.values():
            total = torch.zeros(2, dtype=torch.float64)
            top = torch.zeros((), dtype=torch.float64)
            for name in names:
                grad = self._parameters[name].grad
                if grad is not None and grad.numel():
                    size = grad.abs()
                    total += torch.stack([size.sum().double().cpu(), torch.tensor(float(size.numel()))])
                    top = torch.maximum(top, size.max().double().cpu())
            sums.append(total)
            tops.append(top)
        # where ranks hold the same, both parts of a mean count M times
        total, top = torch.stack(sums), torch.stack(tops)
        if isinstance(self.network, ParallelNetwork) and self.network.mesh.branch > 1:
            device = next(iter(self._parameters.values())).device
            total, top = total.to(device), top.to(device)
            dist.all_reduce(total, group=self.network.mesh.branch_group)
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.network.mesh.branch_group)
        for name, (size, number), most in zip(self.bases, total.tolist(), top.tolist(), strict=True):
            self.history[name].append({"step": step, "max": most, "mean": size / max(number, 1.0)})
        return True


@torch.no_grad()
def coefficient_similarity(network: nn.Module) -> dict[str, Tensor]:
    """|cosine| of the coefficient vectors α_t ∈ R^s over the shared elements, by basis: (n, n) float64 on the CPU.

    Rows: output channels of all convolutions that use the basis, block after block, or some thousands of them, evenly
    spaced. Own elements are left out: those of two convolutions are not the same direction. Empty where no elements are
    shared: of convolutions that are tied before or after them there are no coefficients to compare.
    """
    users: dict[str, dict[int, FilterSum]] = {}
    by_parameter: dict[int, str] = {}
    held = dict(network.named_parameters(remove_duplicate=False))
    for group in basis_groups(network, joint=False):
        by_parameter |= {id(held[name]): group.name for name in group.shared}
    for _, block in named_blocks(network):
        for _, block_sum in branch_sums(block):
            if isinstance(block_sum, FilterSum) and block_sum.basis.shared is not None:
                name = by_parameter[id(block_sum.basis.shared)]
                users.setdefault(name, {}).setdefault(id(block_sum.coefficients.weight), block_sum)
    found = {}
    for name, sums in users.items():
        rows = torch.cat([block_sum.shared_coefficients().double() for block_sum in sums.values()])
        rows = rows[:: -(-len(rows) // _MOST_ROWS)]
        gram = rows @ rows.T
        if any(block_sum.exchange is not None for block_sum in sums.values()):
            assert isinstance(network, ParallelNetwork), "only parallelize() sets an exchange"
            dist.all_reduce(gram, group=network.mesh.branch_group)  # Σ over the branches that each rank holds
        gram = gram.cpu()
        norms = gram.diagonal().sqrt().clamp(min=torch.finfo(gram.dtype).tiny)
        found[name] = (gram / torch.outer(norms, norms)).abs().clamp(max=1.0)
    return found


def plot_gradient_flow(
    histories: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], path: Path
) -> None:
    """Writes a figure like the paper's Figure 3: one panel a run (title → `GradientFlow.history`).

    For each basis the bars of the recorded steps (of 100 of them, evenly spaced, where there are more) lie over each
    other, light ones the maximum, dark ones the mean.
    """
    figure = _figure(3.2 * len(histories), 3.2)
    axes = figure.subplots(1, len(histories), squeeze=False, sharey=True)[0]
    for axis, (title, history) in zip(axes, histories.items(), strict=True):
        for position, recorded in enumerate(history.values()):
            samples = recorded[:: -(-len(recorded) // _MOST_BARS) or 1]
            alpha = max(0.05, 1.0 / max(len(samples), 1))
            for key, color in (("max", "tab:cyan"), ("mean", "tab:blue")):
                axis.bar([position] * len(samples), [s[key] for s in samples], color=color, alpha=alpha)
        axis.set_xticks(range(len(history)), list(history), rotation=30, ha="right")
        axis.set_title(title)
    axes[0].set_ylabel("|gradient|: max (light), mean (dark)")
    figure.savefig(path)


def plot_coefficient_similarity(similarities: Mapping[str, Tensor], path: Path) -> None:
    """Writes a figure like the paper's Figure 4: one panel a matrix of `coefficient_similarity`, 0 dark to 1 bright."""
    figure = _figure(3.4 * len(similarities), 3.4)
    axes = figure.subplots(1, len(similarities), squeeze=False)[0]
    for axis, (title, matrix) in zip(axes, similarities.items(), strict=True):
        image = axis.imshow(matrix.cpu().numpy(), vmin=0.0, vmax=1.0, cmap="viridis", interpolation="nearest")
        axis.set_title(title)
    figure.colorbar(image, ax=axes.tolist(), label="|cosine|")
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=150)

"""A block of a user's own branches, unequal ones too: y = shortcut(x) + f_1(h) + … + f_k(h)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from anabranch.blocks.branch_sum import BranchSum, Hidden
from anabranch.blocks.convert import prepare
from anabranch.blocks.errors import ModelError

# may return their input itself, or a view of it: a dropout in evaluation; as a leaf, a Sequential is empty
_PASSING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.Sequential)


class MultiResidual(BranchSum):
    """y = after(shortcut(x) + Σ_i branches[i](h)), h = before(x) (Multi-ResNet, Eq. 3).

    branches: modules from h to equally shaped tensors; they may differ in everything else. `nn.BatchNorm*`
        and `nn.Dropout` in them are converted to ours.
    before, shortcut, after: replicated modules; identity where None. The shortcut reads x, or h with
        `shortcut_reads="h"`.

    Raises ModelError if a first layer that computes works in place: it would change what the other branches read.
    """

    def __init__(
        self,
        branches: Sequence[nn.Module],
        *,
        before: nn.Module | None = None,
        shortcut: nn.Module | None = None,
        after: nn.Module | None = None,
        shortcut_reads: str = "x",
    ) -> None:
        super().__init__(len(branches))
        if shortcut_reads not in ("x", "h"):
            raise ModelError(f'shortcut_reads is "x" or "h", got {shortcut_reads!r}')
        self.branch = nn.ModuleDict({str(i): branch for i, branch in enumerate(branches)})
        self.before, self.shortcut, self.after = before, shortcut, after
        self.shortcut_reads = shortcut_reads
        readers = {"before": before, "shortcut": shortcut}
        for name, module in [*readers.items(), *((f"branch {i}", b) for i, b in enumerate(branches))]:
            if module is not None:
                _refuse_in_place_start(name, module)
        prepare(self)

    def enter(self, x: Tensor) -> Tensor:
        return x if self.before is None else self.before(x)

    def branches(self, h: Hidden) -> Tensor:
        terms = iter(self.branch.values())
        total: Tensor = next(terms)(h)
        for term in terms:
            total = total + term(h)
        return total

    def skip_term(self, x: Tensor, h: Hidden) -> Tensor:
        assert isinstance(h, Tensor), "`enter` gives one tensor"
        source = h if self.shortcut_reads == "h" else x
        return source if self.shortcut is None else self.shortcut(source)

    def join(self, x: Tensor, h: Hidden, s: Tensor) -> Tensor:
        y = super().join(x, h, s)
        return y if self.after is None else self.after(y)

    @property
    def ends_in_sum(self) -> bool:
        mine = type(self).join is MultiResidual.join and type(self).forward is BranchSum.forward
        return mine and self.after is None


def _refuse_in_place_start(name: str, module: nn.Module) -> None:
    leaves = (m for m in module.modules() if not m._modules)
    first = next((m for m in leaves if getattr(m, "inplace", False) or not isinstance(m, _PASSING)), None)
    if first is not None and getattr(first, "inplace", False):
        raise ModelError(
            f"{name} starts with {type(first).__name__}(inplace=True), which would change the input that the "
            "other branches and the shortcut read: use inplace=False there"
        )

"""The best plan under `predict`, over meshes, device orders, sample weights and placements.

    every setting (mesh, order, weights)   a lower bound: each element's best way, no backlog, no memory
    in the order of these bounds           without memory limits: exact (`chain.solve`)
        the best does not fit              with them: exact while labels last, else the limit is priced
                                           (`fit`), which leaves a plan that fits and a proven bound
    a setting whose bound is no better than the best plan so far is left out

What was not proven is the gap: how much faster a plan could still be, 0 where none is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from time import perf_counter
from typing import NamedTuple

from anabranch.schedulers.chain import Chain, Solution, solve, to_go
from anabranch.schedulers.errors import PlanError
from anabranch.schedulers.fit import cheapest, fit, least_memory
from anabranch.schedulers.layout import make_layout
from anabranch.schedulers.options import Options
from anabranch.schedulers.orders import Setting, settings
from anabranch.schedulers.plan import BranchPlacement, EdgeSplit, Plan
from anabranch.schedulers.predict import Prediction, Predictor
from anabranch.schedulers.pricing import Pricing
from anabranch.schedulers.request import Request

Told = Callable[[int, int], None]
"""Given how much of a search is done, and of how much: the rest may turn out not to be needed."""

_INFINITE = float("inf")
_EFFORT = 60_000  # labels and pairs of labels with memory limits, in a search, before limits are priced
_QUICK = 2  # labels of a state, at first
_MOST_ELEMENTS = 200  # of a chain, likewise; and before a way is looked for that memory leaves no room for
_FREE_EFFORT = 60_000  # labels and pairs of labels without memory limits, in a search
_MOST_OPTIONS = 2_000  # of a chain, likewise
_PRICED_NOTE = "memory limits were priced: there are more partial plans than can be looked at"
_EVEN_NOTE = "with memory limits, branches were dealt evenly among like devices"
_TOLERANCE = 1e-12  # of seconds added up in another order


@dataclass(frozen=True)
class SearchResult:
    """gap: by what part of its step time the plan may miss the best, 0 where it is the best.

    seconds: of the search. settings: meshes, orders and weights looked at; labels: partial plans.
    notes: what was not looked at in full, in words.
    """

    plan: Plan
    prediction: Prediction
    gap: float
    seconds: float
    settings: int
    labels: int
    notes: tuple[str, ...]


class _Priced(NamedTuple):
    """A setting with its options and its lower bound."""

    bound_s: float
    number: int
    setting: Setting
    options: Options
    chain: Chain


def search(request: Request, told: Told = lambda done, total: None) -> SearchResult:
    """The best plan that keeps what the request settles.

    Raises PlanError where the request has no costs or batch, or no plan fits the devices' memory: then with
    the device that lacks least.
    """
    return Search(request, told).run()


class Search:
    """One request's. found: the best plan of each setting that was looked at, with its predicted seconds."""

    def __init__(self, request: Request, told: Told = lambda done, total: None) -> None:
        if request.costs is None or request.batch is None:
            raise PlanError("the search needs costs and a batch size: measure first, or give a cost file")
        self.request, self.batch, self.told = request, request.batch, told
        self.predictor = Predictor(request.model, request.cluster, request.costs, request.batch)
        self.pricing: Pricing = self.predictor.pricing
        self.labels = self.effort = self.free_effort = 0
        self.found: list[tuple[float, Plan]] = []
        self.unproven: list[float] = []  # bounds of what may be better than what was found
        self.notes: dict[str, None] = {}

    def run(self, *, leave_out: bool = True) -> SearchResult:
        """leave_out: settings that cannot be the best are not solved."""
        start = perf_counter()
        priced = self._priced()
        best = _INFINITE
        for number, entry in enumerate(priced):
            self.told(len(priced) + number, 2 * len(priced))
            if leave_out and entry.bound_s >= best:
                break
            seconds, plan = self._solve(entry, best if leave_out else _INFINITE)
            if plan is not None:
                self.found.append((seconds, plan))
                best = min(best, seconds)
        if not self.found:
            raise PlanError(self._too_large(priced))
        _, plan = min(self.found, key=lambda pair: pair[0])
        prediction = self.predictor(plan)
        total = prediction.total_s
        least = min([total, *self.unproven])
        gap = (total - least) / total if total > least * (1 + _TOLERANCE) else 0.0
        seconds = perf_counter() - start
        return SearchResult(plan, prediction, gap, seconds, len(priced), self.labels, tuple(self.notes))

    def _priced(self) -> list[_Priced]:
        found, all_orders = [], True
        tried = list(settings(self.request, self.batch))
        for number, setting in enumerate(tried):
            self.told(number, 2 * len(tried))
            all_orders &= setting.is_all
            layout = make_layout(setting.devices, self.request.cluster, self.batch, setting.samples)
            options = Options(self.pricing, layout, self.request)
            chain = options.chain()
            if all(chain.options):
                bound = min(to_go(chain)[-1]) + self.pricing.step_s
                found.append(_Priced(bound, number, setting, options, chain))
        if not all_orders:
            self.notes["of device orders and sample weights only block-shaped and by-speed ones"] = None
        return sorted(found, key=lambda entry: entry[:2])

    def _solve(self, entry: _Priced, best: float) -> tuple[float, Plan | None]:
        below = best - self.pricing.step_s
        if not entry.options.is_exact:
            self.notes["unequal branches were placed longest first: too many to place exactly"] = None
            self.unproven.append(entry.options.bound_s())
        if len(entry.chain.options) > _MOST_ELEMENTS and not self._fits(entry, cheapest(entry.chain)[1]):
            return self._solve_limited(entry, below, entry.bound_s - self.pricing.step_s)
        solution = solve(entry.chain, below, width=_QUICK)
        self.labels += solution.labels
        if not solution.path or self._fits(entry, solution.path):
            solution = self._solve_free(entry, below, solution)
            if solution.path and not self._fits(entry, solution.path):
                return self._solve_limited(entry, below, solution.bound)
            if solution.bound < solution.seconds:
                self._unproven(solution.bound, "not all partial plans could be looked at")
            return self._answer(entry, entry.chain, solution)
        return self._solve_limited(entry, below, max(solution.bound, entry.bound_s - self.pricing.step_s))

    def _solve_free(self, entry: _Priced, below: float, quick: Solution) -> Solution:
        """Without memory limits: all partial plans that are below what few labels of each state found."""
        if quick.is_exact:
            return quick
        least = min(below, quick.seconds)
        whole = solve(entry.chain, least, budget=_FREE_EFFORT - self.free_effort)
        self.labels += whole.labels
        self.free_effort += whole.labels
        if whole.path:
            return whole
        bound = entry.bound_s - self.pricing.step_s
        return quick._replace(bound=max(quick.bound, min(whole.bound, least), bound))

    def _answer(self, entry: _Priced, chain: Chain, solution: Solution) -> tuple[float, Plan | None]:
        if not solution.path:
            return _INFINITE, None
        return solution.seconds + self.pricing.step_s, self._plan(entry.setting, chain, solution.path)

    def _solve_limited(self, entry: _Priced, below: float, least: float) -> tuple[float, Plan | None]:
        """With memory limits. least: a bound of the best without them."""
        layout = entry.options.layout
        is_small = self._num_divisions(layout.branch) <= _MOST_OPTIONS
        options = Options(self.pricing, layout, self.request, "each" if is_small else "fullest")
        chain = options.chain()
        if self.effort < _EFFORT and (
            is_small or (options.is_exact and len(chain.options) <= _MOST_ELEMENTS)
        ):
            solution = solve(chain, below, budget=_EFFORT - self.effort)
            self.labels += solution.labels
            self.effort += solution.labels
            if solution.is_exact:
                if not options.is_exact:
                    self._unproven(least, _EVEN_NOTE)
                return self._answer(entry, chain, solution)
            self.effort = _EFFORT
        if is_small:
            options = Options(self.pricing, layout, self.request, "fullest")
            chain = options.chain()
        solution = fit(chain, below)
        self.labels += solution.labels
        bound = solution.bound
        if not options.is_exact:  # as if memory could be evened out
            average = Options(self.pricing, layout, self.request, "average")
            bound = max(least, fit(average.chain(), below).bound)
            self.notes[_EVEN_NOTE] = None
        self._unproven(max(least, bound), _PRICED_NOTE)
        return self._answer(entry, chain, solution)

    def _num_divisions(self, branch: int) -> int:
        """Ways to divide each block's branches, added up."""
        return sum(comb(block.num_branches + branch - 1, branch - 1) for block in self.request.model.blocks)

    def _unproven(self, bound: float, note: str) -> None:
        self.unproven.append(bound + self.pricing.step_s)
        self.notes[note] = None

    def _fits(self, entry: _Priced, path: Sequence[int]) -> bool:
        if all(device.memory_bytes is None for device in self.request.cluster.devices):
            return True
        options = Options(self.pricing, entry.options.layout, self.request, "fullest")
        choices = [
            chosen[position].choice for chosen, position in zip(entry.chain.options, path, strict=True)
        ]
        return all(lacking <= 0 for lacking in options.lacking(choices))

    def _plan(self, setting: Setting, chain: Chain, path: Sequence[int]) -> Plan:
        placed: list[BranchPlacement | EdgeSplit] = [
            options[position].choice for options, position in zip(chain.options, path, strict=True)
        ]
        return assembled(self.pricing.names, placed, setting)

    def _too_large(self, priced: Sequence[_Priced]) -> str:
        """Why no plan fits: of the plans that need least on some device, the one that lacks least."""
        closest: tuple[float, str, float] | None = None
        for entry in priced:
            options = Options(self.pricing, entry.options.layout, self.request, "fullest")
            chain = options.chain()
            for path in least_memory(chain):
                choices = [chosen[at].choice for chosen, at in zip(chain.options, path, strict=True)]
                lacking = options.lacking(choices)
                worst = max(range(len(lacking)), key=lambda at: lacking[at])
                limit = options.limits[worst]
                if closest is None or lacking[worst] < closest[0]:
                    closest = (lacking[worst], limit.device, limit.num_bytes)
        if closest is None:
            return "no plan keeps all pins and settled placements: loosen one of them"
        lacks, device, has = closest
        return (
            f"no plan fits the devices' memory: the closest one lacks {lacks:,.0f} bytes on {device}, which "
            f"has {has:,}, and needs {has + lacks:,.0f}: use a smaller batch, more accumulation or more devices"
        )


def assembled(names: Sequence[str], placed: Sequence[BranchPlacement | EdgeSplit], setting: Setting) -> Plan:
    """The plan of a placement for each element."""

    def edge(choice: BranchPlacement | EdgeSplit) -> EdgeSplit:
        split = choice.split if isinstance(choice, BranchPlacement) else choice
        return "sample" if split == "sample" else "replicated"

    def block(choice: BranchPlacement | EdgeSplit) -> BranchPlacement:
        return choice if isinstance(choice, BranchPlacement) else BranchPlacement("sample")

    return Plan(
        len(setting.devices),
        len(setting.devices[0]),
        {name: block(choice) for name, choice in zip(names[1:-1], placed[1:-1], strict=True)},
        edge(placed[0]),
        edge(placed[-1]),
        setting.devices,
        setting.samples,
    )

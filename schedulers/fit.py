"""A way through a chain that keeps its memory limits, where there are too many to look at them all.

A price for each byte of the fullest limit turns the limit into seconds (Lagrange): the cheapest way at any
price bounds all ways that fit from below. Prices between "too large" and "fits" are halved; then the two ways
on either side are joined, one up to some element and the other from there, where that is best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anabranch.schedulers.chain import GROUP, OWN, Chain, Option, Solution, evaluate, solve, to_go

_INFINITE = float("inf")
_PRICES = 12
_WIDTH = 4  # labels of a state, where units tie elements


def fit(chain: Chain, below: float = _INFINITE) -> Solution:
    """The best way found that fits, of less than `below` seconds; `bound` holds for all that fit."""
    nothing = Solution(_INFINITE, (), 0, False, _INFINITE)
    fast = _cheapest(chain)
    limit = _fullest(chain, fast)
    candidates = [way for way in least_memory(chain) if _fits(chain, way)]
    if _least_kept(chain, limit) > _left(chain, limit):
        return nothing  # none fits
    low, high, bound, labels = 0.0, _INFINITE, 0.0, 0
    price = evaluate(chain, fast)[0] / max(chain.limits[limit], 1.0)
    slow: tuple[int, ...] | None = None
    for _ in range(_PRICES):
        priced = _with_price(chain, limit, price)
        way = _cheapest(priced)
        labels += len(way)
        bound = max(bound, min(to_go(priced)[-1]) - price * _left(chain, limit))
        if bound >= below:
            return nothing
        if evaluate(chain, way)[1][limit] <= chain.limits[limit]:
            slow, high = way, price
        else:
            fast, low = way, price
        price = 2 * price if high == _INFINITE else (low + high) / 2
    if slow is None:
        slow = next((way for way in candidates), None)
    if slow is not None:
        candidates += [way for way in (slow, *_joined(chain, limit, fast, slow)) if _fits(chain, way)]
    priced = _with_price(chain, limit, price)
    exact = solve(priced, width=_WIDTH)
    bound = max(bound, exact.bound - price * _left(chain, limit))
    timed = [(evaluate(chain, way)[0], way) for way in candidates]
    seconds, best = min(timed, default=(_INFINITE, ()))
    labels += exact.labels + len(chain.options) * len(timed)
    if seconds >= below:
        return Solution(_INFINITE, (), labels, False, bound)
    return Solution(seconds, best, labels, False, min(bound, seconds))


def least_memory(chain: Chain) -> Iterator[tuple[int, ...]]:
    """For each limit, the way that keeps least under it, backlog and time left out."""
    for limit in range(len(chain.limits)):
        yield _cheapest(_with_price(chain, limit, _INFINITE))


def _with_price(chain: Chain, limit: int, price: float) -> Chain:
    """The chain without limits, kept bytes of one limit added to the seconds; all that counts at infinity."""
    made: dict[int, list[Option]] = {}
    for options in chain.options:
        if id(options) not in made:
            made[id(options)] = [
                option._replace(
                    added_s=option.memory[limit]
                    if price == _INFINITE
                    else option.added_s + price * option.memory[limit],
                    waiting_s=0.0 if price == _INFINITE else option.waiting_s,
                    memory=(),
                    peak=(),
                )
                for option in options
            ]
    change_s = [(0.0, 0.0)] * len(chain.change_s) if price == _INFINITE else chain.change_s
    return Chain([made[id(options)] for options in chain.options], change_s, chain.closes, chain.unit)


def _cheapest(chain: Chain) -> tuple[int, ...]:
    """The way of least added seconds, backlog and limits left out."""
    if any(unit is not None for unit in chain.unit):
        free = [[o._replace(memory=(), peak=(), waiting_s=0.0) for o in found] for found in chain.options]
        return solve(Chain(free, chain.change_s, chain.closes, chain.unit), width=_WIDTH).path
    best: dict[int, list[tuple[float, int]]] = {}
    steps: list[tuple[int, int]] = []  # for rows OWN and GROUP: the rows before
    seconds = [0.0, 0.0]
    for i, options in enumerate(chain.options):
        if id(options) not in best:
            best[id(options)] = [
                min(
                    ((o.added_s, at) for at, o in enumerate(options) if o.rows == rows),
                    default=(_INFINITE, -1),
                )
                for rows in (OWN, GROUP)
            ]
        gather, scatter = chain.change_s[i]
        own, group = best[id(options)]
        from_group, from_own = seconds[GROUP] + scatter, seconds[OWN] + gather
        steps.append(
            (GROUP if from_group < seconds[OWN] else OWN, OWN if from_own < seconds[GROUP] else GROUP)
        )
        seconds = [
            own[0] + min(seconds[OWN], from_group),
            group[0] + min(seconds[GROUP], from_own),
        ]
    rows = OWN if seconds[OWN] <= seconds[GROUP] else GROUP
    way: list[int] = []
    for i in reversed(range(len(chain.options))):
        way.append(best[id(chain.options[i])][rows][1])
        rows = steps[i][rows]
    return tuple(reversed(way))


def _joined(
    chain: Chain, limit: int, fast: tuple[int, ...], slow: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """The slow way up to an element and the fast one from there, and the other way round: the last that fits."""
    for swap in (False, True):
        low, high = 0, len(fast)  # elements of the slow way: too few, enough
        while high - low > 1:
            middle = (low + high) // 2
            way = _join(chain, fast, slow, middle, swap)
            if evaluate(chain, way)[1][limit] <= chain.limits[limit]:
                high = middle
            else:
                low = middle
        yield from (_join(chain, fast, slow, num, swap) for num in range(high, min(high + 3, len(fast))))


def _join(
    chain: Chain, fast: tuple[int, ...], slow: tuple[int, ...], num: int, swap: bool
) -> tuple[int, ...]:
    is_slow = [(i >= len(fast) - num) if swap else (i < num) for i in range(len(fast))]
    tied = {chain.unit[i] for i, slow_here in enumerate(is_slow) if slow_here} - {None}
    return tuple(
        slow[i] if slow_here or chain.unit[i] in tied else fast[i] for i, slow_here in enumerate(is_slow)
    )


def _fits(chain: Chain, way: Sequence[int]) -> bool:
    return all(used <= limit for used, limit in zip(evaluate(chain, way)[1], chain.limits, strict=True))


def _fullest(chain: Chain, way: Sequence[int]) -> int:
    used = evaluate(chain, way)[1]
    return max(range(len(used)), key=lambda limit: used[limit] / max(chain.limits[limit], 1.0))


def _left(chain: Chain, limit: int) -> float:
    """Bytes that may be kept: the limit less a transient that every way has."""
    return chain.limits[limit] - max(min(o.peak[limit] for o in options) for options in chain.options)


def _least_kept(chain: Chain, limit: int) -> float:
    least: dict[int, float] = {}
    for options in chain.options:
        if id(options) not in least:
            least[id(options)] = min(option.memory[limit] for option in options)
    return sum(least[id(options)] for options in chain.options)

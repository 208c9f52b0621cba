"""A way through a chain that keeps its memory limits, where there are too many to look at them all.

A price for each byte held under the fullest limit, at the moment when the fastest way is fullest, turns the limit
into seconds (Lagrange): the cheapest way at any price bounds all ways that fit from below, as these fit at that
moment too. Prices between "too large" and "fits" are halved; then the two ways
on either side are joined, one up to some element and the other from there, where that is best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

from anabranch.schedulers.chain import GROUP, OWN, Chain, Option, Solution, evaluate, solve, to_go
from anabranch.schedulers.memory import Held

_INFINITE = float("inf")
_PRICES = 12
_CLOSE = 1e-4  # of the bound: a way no slower than so much more is not bettered
_WIDTH = 4  # labels of a state, where units tie elements


def fit(chain: Chain, below: float = _INFINITE) -> Solution:
    """The best way found that fits, of less than `below` seconds; `bound` holds for all that fit."""
    nothing = Solution(_INFINITE, (), 0, False, _INFINITE)
    evaluated = cache(partial(evaluate, chain))

    def fits(way: tuple[int, ...]) -> bool:
        return all(used <= most for used, most in zip(evaluated(way)[1], chain.limits, strict=True))

    _, fast = cheapest(chain)
    used = evaluated(fast)[1]
    limit = max(range(len(used)), key=lambda at: used[at] / max(chain.limits[at], 1.0))
    moment = _moment(chain, limit, fast)
    candidates = [way for way in least_memory(chain) if fits(way)]
    if cheapest(_with_price(chain, limit, moment, _INFINITE))[0] > chain.limits[limit]:
        return nothing  # none fits
    low, high, bound, labels = 0.0, _INFINITE, 0.0, 0
    price = evaluated(fast)[0] / max(chain.limits[limit], 1.0)
    slow: tuple[int, ...] | None = None
    for _ in range(_PRICES):
        priced = _with_price(chain, limit, moment, price)
        least, way = cheapest(priced)
        labels += len(way)
        bound = max(bound, least - price * chain.limits[limit])
        if bound >= below:
            return nothing
        if evaluated(way)[1][limit] <= chain.limits[limit]:
            slow, high = way, price
        else:
            fast, low = way, price
        if slow is not None and evaluated(slow)[0] <= bound * (1 + _CLOSE):
            break
        price = 2 * price if high == _INFINITE else (low + high) / 2
    if slow is None:
        slow = next((way for way in candidates), None)
    if slow is not None:
        candidates += [way for way in (slow, *_joined(chain, limit, fast, slow)) if fits(way)]
    priced = _with_price(chain, limit, moment, price)
    exact = solve(priced, width=_WIDTH)
    bound = max(bound, exact.bound - price * chain.limits[limit])
    timed = [(evaluated(way)[0], way) for way in candidates]
    seconds, best = min(timed, default=(_INFINITE, ()))
    labels += exact.labels + len(chain.options) * len(timed)
    if seconds >= below:
        return Solution(_INFINITE, (), labels, False, bound)
    return Solution(seconds, best, labels, False, min(bound, seconds))


def least_memory(chain: Chain) -> Iterator[tuple[int, ...]]:
    """For each limit ways that hold little, time left out: at the backward's start, and when that way is fullest."""
    for limit in range(len(chain.limits)):
        _, way = cheapest(_with_price(chain, limit, len(chain.options) - 1, _INFINITE))
        yield way
        yield cheapest(_with_price(chain, limit, _moment(chain, limit, way), _INFINITE))[1]


def _with_price(chain: Chain, limit: int, moment: int, price: float) -> Chain:
    """The chain without limits, the bytes held under one while element `moment` runs added to the seconds.

    moment: -1 is the optimizer. At infinity these bytes are all that counts.
    """
    made: dict[tuple[int, str], list[Option]] = {}
    found: list[list[Option]] = []
    is_open = True
    for i, options in enumerate(chain.options):
        if i > moment:
            is_open &= not chain.closes[i]
        when = "before" if i < moment else "here" if i == moment else "open" if is_open else "later"
        when = "update" if moment < 0 else when
        key = (id(options), when)
        if key not in made:
            made[key] = [_priced(option, option.memory[limit].at(when), price) for option in options]
        found.append(made[key])
    gathered = [each[limit] * (i <= moment) for i, each in enumerate(chain.gathered)]
    change_s = [
        (num_bytes, 0.0) if price == _INFINITE else (gather + price * num_bytes, scatter)
        for num_bytes, (gather, scatter) in zip(gathered, chain.change_s, strict=True)
    ]
    return Chain(found, change_s, chain.closes, chain.unit)


def _priced(option: Option, num_bytes: float, price: float) -> Option:
    if price == _INFINITE:
        return option._replace(added_s=num_bytes, waiting_s=0.0, memory=())
    return option._replace(added_s=option.added_s + price * num_bytes, memory=())


def _moment(chain: Chain, limit: int, way: Sequence[int]) -> int:
    """The element during whose backward a way is fullest; -1: it is in the optimizer."""
    options = [found[position] for found, position in zip(chain.options, way, strict=True)]
    held, moment = Held(), 0
    for i in reversed(range(len(options))):
        later, held = held, held.add(options[i].memory[limit], chain.closes[i])
        if held.high > later.high + options[i].memory[limit].at("before"):
            moment = i
        if i and options[i].rows == GROUP and options[i - 1].rows == OWN:
            held = held.gathered(chain.gathered[i][limit])
    return -1 if held.update > held.high else moment


def cheapest(chain: Chain) -> tuple[float, tuple[int, ...]]:
    """Least added seconds, backlog and limits left out, and the way that has them.

    Where units tie elements a bound of these seconds, and a way of few more.
    """
    if any(unit is not None for unit in chain.unit):
        free = [[o._replace(memory=(), waiting_s=0.0) for o in found] for found in chain.options]
        tied = Chain(free, chain.change_s, chain.closes, chain.unit)
        return min(to_go(tied)[-1]), solve(tied, width=_WIDTH).path
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
    rows, least = (OWN if seconds[OWN] <= seconds[GROUP] else GROUP), min(seconds)
    way: list[int] = []
    for i in reversed(range(len(chain.options))):
        way.append(best[id(chain.options[i])][rows][1])
        rows = steps[i][rows]
    return least, tuple(reversed(way))


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

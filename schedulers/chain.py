"""The best way through a chain of elements under `predict`'s recurrence: exact dynamic programming.

Elements are visited in backward order (head first). A label is a partial plan: seconds spent t, backlog q,
waiting gradients w, and memory per limit. A label's future costs never fall when q or w grow, and grow at
most as much as they do. So, in the same state, label a makes label b useless when

    t_a + max(q_a - q_b, 0) + max(w_a - w_b, 0) ≤ t_b    and a needs no more memory, however it goes on

The state is the rows (own or group) of the element reached and the choices of units that are not finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from anabranch.schedulers.memory import Bytes, Held

OWN, GROUP = 0, 1
_INFINITE = float("inf")
_State = tuple[int, tuple[tuple[int, int], ...]]  # rows, and (unit, position) of open units


class Option(NamedTuple):
    """One way to run an element.

    rows: OWN or GROUP. added_s: all its seconds but those of the backlog. drain_s: of backward compute, which
    hides a backlog. waiting_s: of gradients that may be hidden. memory: by limit.
    choice: what it stands for; of a unit's elements, equal positions are one choice.
    """

    rows: int
    added_s: float
    drain_s: float
    waiting_s: float
    memory: tuple[Bytes, ...]
    choice: Any


@dataclass(frozen=True)
class Chain:
    """options: by element. change_s: before each element, (own → group, group → own). closes: a bucket ends.

    unit: by element, a number shared by elements that take options of equal position, or None. limits: bytes.
    gathered: by element and limit, bytes of its input where it is gathered (own → group).
    """

    options: Sequence[Sequence[Option]]
    change_s: Sequence[tuple[float, float]]
    closes: Sequence[bool]
    unit: Sequence[int | None]
    limits: tuple[float, ...] = ()
    gathered: Sequence[tuple[float, ...]] = ()


class Label(NamedTuple):
    """A partial plan: the elements from the head to some element."""

    t: float
    q: float
    w: float
    memory: tuple[Held, ...]
    option: int
    before: Label | None


class Solution(NamedTuple):
    """seconds: of the best way found (infinite: none). path: its option positions by element.

    labels: looked at. is_exact: no way is better (nor below what was asked for). bound: none is below this.
    """

    seconds: float
    path: tuple[int, ...]
    labels: int
    is_exact: bool
    bound: float


def to_go(chain: Chain) -> list[list[float]]:
    """[element][rows]: least seconds of the elements up to it, backlog, units and memory left out."""
    found: list[list[float]] = []
    seen: dict[int, tuple[float, float]] = {}
    before = [0.0, 0.0]
    for i, options in enumerate(chain.options):
        if id(options) not in seen:
            rows = [[o.added_s for o in options if o.rows == which] for which in (OWN, GROUP)]
            seen[id(options)] = (min(rows[OWN], default=_INFINITE), min(rows[GROUP], default=_INFINITE))
        own, group = seen[id(options)]
        before = [
            own + _least_before(before, chain.change_s[i], OWN),
            group + _least_before(before, chain.change_s[i], GROUP),
        ]
        found.append(before)
    return found


def solve(chain: Chain, below: float = _INFINITE, *, budget: float = _INFINITE, width: int = 400) -> Solution:
    """The best way of less than `below` seconds.

    Gives up after `budget` labels and pairs of labels. Of a state's labels the `width` best are kept; what is
    dropped bounds.
    """
    bound, num_elements = to_go(chain), len(chain.options)
    first, last = _unit_ends(chain.unit)
    room = _room(chain)
    drains = [0.0]
    for options in chain.options:
        drains.append(drains[-1] + max(option.drain_s for option in options))
    with_memory, labels, compared, lost = bool(chain.limits), 0, 0, _INFINITE
    nothing = tuple(Held() for _ in chain.limits)
    states: dict[_State, list[Label]] = {(-1, ()): [Label(0.0, 0.0, 0.0, nothing, -1, None)]}
    for i in reversed(range(num_elements)):
        reached: dict[_State, list[Label]] = {}
        unit, closes, drain_left = chain.unit[i], chain.closes[i], drains[i]
        rest = bound[i - 1] if i else [0.0, 0.0]
        change = chain.change_s[i + 1] if i + 1 < num_elements else (0.0, 0.0)
        for (rows, chosen), found in states.items():
            picked = next((position for number, position in chosen if number == unit), None)
            for position, option in enumerate(chain.options[i]):
                after = chosen
                if unit is not None:
                    if picked is not None and picked != position:
                        continue
                    if i == last[unit] and i != first[unit]:
                        after = tuple(sorted((*chosen, (unit, position))))
                    elif i == first[unit]:
                        after = tuple(pair for pair in chosen if pair[0] != unit)
                new_rows, added, drain, waiting = option[:4]
                gathers = with_memory and (new_rows, rows) == (OWN, GROUP)
                if rows not in (-1, new_rows):
                    added += change[new_rows]  # own → group gathers, group → own scatters
                least = _least_before(rest, chain.change_s[i], new_rows) if i else 0.0
                into = reached.setdefault((new_rows, after), [])
                for label in found:
                    labels += 1
                    t, q, w = label.t + added, label.q - drain, label.w + waiting
                    if q < 0.0:
                        q = 0.0
                    if closes:
                        q, w = q + w, 0.0
                    if t + least + max(q + w - drain_left, 0.0) >= below:
                        continue
                    memory = label.memory
                    if with_memory:
                        if gathers:
                            memory = tuple(map(Held.gathered, memory, chain.gathered[i + 1]))
                        memory = tuple(
                            held.add(more, closes) for held, more in zip(memory, option.memory, strict=True)
                        )
                        if not _has_room(memory, room[i], chain.limits):
                            continue
                    into.append(Label(t, q, w, memory, position, label))
            if labels + compared > budget:
                return Solution(_INFINITE, (), labels, False, 0.0)
        states = {}
        for key, found in reached.items():
            if found:
                states[key], more = _efficient(found, with_memory, budget - compared)
                compared += more
        for (new_rows, _), found in states.items():
            if len(found) > width:
                found.sort(key=lambda label: label.t + label.q + label.w)
                least = _least_before(rest, chain.change_s[i], new_rows) if i else 0.0
                for label in found[width:]:
                    lost = min(lost, label.t + least + max(label.q + label.w - drain_left, 0.0))
                del found[width:]
    ends = [label for found in states.values() for label in found]
    if not ends:
        return Solution(_INFINITE, (), labels, lost == _INFINITE, lost)
    best = min(ends, key=lambda label: label.t + label.q)
    path, at = [], best
    while at.before is not None:
        path.append(at.option)
        at = at.before
    seconds = best.t + best.q
    return Solution(seconds, tuple(path), labels, lost >= seconds, min(lost, seconds))


def evaluate(chain: Chain, path: Sequence[int]) -> tuple[float, tuple[float, ...]]:
    """Seconds and memory (by limit) of one way; options by position."""
    t = q = w = 0.0
    rows = -1
    options = [found[position] for found, position in zip(chain.options, path, strict=True)]
    for i, option in reversed(list(enumerate(options))):
        if rows not in (-1, option.rows):
            t += chain.change_s[i + 1][option.rows]
        rows = option.rows
        t, q, w = t + option.added_s, max(q - option.drain_s, 0.0), w + option.waiting_s
        if chain.closes[i]:
            q, w = q + w, 0.0
    return t + q, highest(options, chain.closes, chain.gathered)


def highest(
    options: Sequence[Option], closes: Sequence[bool], gathered: Sequence[tuple[float, ...]]
) -> tuple[float, ...]:
    """The peak of a step by limit, of one option for each element."""
    found = []
    for limit in range(len(options[0].memory)):
        held = Held()
        for i in reversed(range(len(options))):
            held = held.add(options[i].memory[limit], closes[i])
            if i and options[i].rows == GROUP and options[i - 1].rows == OWN:
                held = held.gathered(gathered[i][limit])
        found.append(held.peak)
    return tuple(found)


def _least_before(rest: Sequence[float], change_s: tuple[float, float], rows: int) -> float:
    """Least seconds of the elements before one with these rows."""
    gather, scatter = change_s
    return min(rest[OWN], rest[GROUP] + scatter) if rows == OWN else min(rest[GROUP], rest[OWN] + gather)


def _unit_ends(units: Sequence[int | None]) -> tuple[dict[int, int], dict[int, int]]:
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, unit in enumerate(units):
        if unit is not None:
            first.setdefault(unit, i)
            last[unit] = i
    return first, last


def _room(chain: Chain) -> list[list[tuple[float, float]]]:
    """[element][limit]: the least that the elements before it keep, and that they have in the optimizer."""
    room: list[list[tuple[float, float]]] = []
    least = [(0.0, 0.0)] * len(chain.limits)
    alike: dict[int, list[tuple[float, float]]] = {}
    for options in chain.options:
        room.append(least)
        if id(options) not in alike:
            alike[id(options)] = [
                (
                    min(option.memory[limit].at("before") for option in options),
                    min(option.memory[limit].at("update") for option in options),
                )
                for limit in range(len(chain.limits))
            ]
        least = [(a + c, b + d) for (a, b), (c, d) in zip(least, alike[id(options)], strict=True)]
    return room


def _has_room(memory: Sequence[Held], room: Sequence[tuple[float, float]], limits: Sequence[float]) -> bool:
    return all(
        held.high + kept <= limit and held.update + update <= limit
        for held, (kept, update), limit in zip(memory, room, limits, strict=True)
    )


def _efficient(labels: list[Label], with_memory: bool, budget: float) -> tuple[list[Label], int]:
    """Those that no other makes useless, and how many pairs were looked at; beyond the budget all are kept."""
    labels.sort(key=lambda label: (label.t, label.q + label.w))
    kept: list[Label] = []
    compared = 0
    if not with_memory and all(label.w == 0.0 for label in labels):  # then the condition is on t + q alone
        least = _INFINITE
        for label in labels:
            if label.t + label.q < least:
                least = label.t + label.q
                kept.append(label)
        return kept, len(labels)
    for label in labels:
        compared += len(kept)
        if compared > budget:
            return labels, compared
        t, q, w = label.t, label.q, label.w
        for better in kept:
            if better.t + max(better.q - q, 0.0) + max(better.w - w, 0.0) <= t and (
                not with_memory or all(map(Held.no_larger, better.memory, label.memory))
            ):
                break
        else:
            kept.append(label)
    return kept, compared

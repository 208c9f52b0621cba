"""The bytes that a rank holds along a step: the same sums for `predict`, the search's labels, and its bounds.

    forward     element 0   1   2 …          what each keeps for its backward piles up
    backward    … 2   1   0                  and goes again; gradients come, and leave with their bucket

While element i runs backward – or forward, with less – a rank holds

    always of all elements + Σ_{j<i} saved_j + high_i + gradients of later elements that have not left

and in the optimizer always + gradients that stay + what updating takes. The step's peak is the largest of these.
Elements are added from the last to the first.
"""

from __future__ import annotations

from typing import NamedTuple


class Bytes(NamedTuple):
    """One element on one rank.

    always: parameters, optimizer's state, places in buckets. saved: from its forward to its backward. high: the most
    while it runs, over what elements before it keep. waits: gradients that leave with a bucket, and are there
    until then. stays: gradients that nobody else has a part of, there to the step's end. updating: transient bytes
    of the optimizer, which updates all parameters at once.
    """

    always: float
    saved: float
    high: float
    waits: float
    stays: float
    updating: float

    def at(self, moment: str) -> float:
        """What it adds to all that is held while another element runs backward, or itself, or in the optimizer.

        moment: "before" (this element comes before that one), "here" (it is that one), "open" (it comes later and its
        bucket has not left), "later"; "update".
        """
        own = {
            "before": self.saved,
            "here": self.high,
            "open": self.waits + self.stays,
            "later": self.stays,
            "update": self.stays + self.updating,
        }
        return self.always + own[moment]


class Held(NamedTuple):
    """The elements from some one to the last, on one rank. kept: always, and gradients that stay. waits: that leave.

    high: the most so far, over what the elements before them keep. update: what the optimizer has of them.
    """

    kept: float = 0.0
    waits: float = 0.0
    high: float = 0.0
    update: float = 0.0

    @property
    def peak(self) -> float:
        """Of a whole step, once all elements are added."""
        return max(self.high, self.update)

    def add(self, element: Bytes, closes: bool) -> Held:
        """With the element before. closes: after its backward the bucket leaves."""
        always, saved, high, waits, stays, updating = element
        own = self.high + always + saved
        most = self.kept + self.waits + always + high
        if own > most:
            most = own
        kept = self.kept + always + stays
        waits = 0.0 if closes else self.waits + waits
        return Held(kept, waits, most, self.update + always + stays + updating)

    def gathered(self, num_bytes: float) -> Held:
        """The first of the elements gathers its input, and keeps it."""
        return self._replace(high=self.high + num_bytes)

    def no_larger(self, other: Held) -> bool:
        """Whether it never needs more, whatever elements are added to both."""
        return (
            self.high <= other.high
            and self.update <= other.update
            and self.kept <= other.kept
            and self.kept + self.waits <= other.kept + other.waits
        )


def element_bytes(
    saved: float, peak: float, parameters: float, in_buckets: float, copies: tuple[float, float], times: int
) -> Bytes:
    """Of an element that keeps `saved` and has at most `peak` (`Work`), and of its parameters.

    parameters: bytes the rank holds; in_buckets: of these, whose gradients others have too. copies: bytes that live
    for one of parameters, and more in the optimizer. times: micro-batches; from the second on there are gradients
    all the time.
    """
    always, updating = copies[0] * parameters + in_buckets, copies[1] * parameters
    if times > 1:
        return Bytes(always + parameters, saved, max(peak, saved), 0.0, 0.0, updating)
    high = max(peak, saved, parameters)  # in the end at least its gradients
    return Bytes(always, saved, high, in_buckets, parameters - in_buckets, updating)


def largest(found: list[Bytes]) -> Bytes:
    """At least each of them, whatever is added."""
    return Bytes(*map(max, zip(*found, strict=True)))

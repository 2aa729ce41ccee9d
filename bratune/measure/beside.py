"""Beside: how much a cell changed between two runs, given a reference that took turns with it in both.

On a shared machine a pass finds the processor fast or slow, and everything that runs in it with it. The
reference, whose code is the same in both runs, says which: what it took in a pass is taken out of what the
cell took, as far as the passes of both runs show that the two move together. That is the analysis of
covariance: a line of one slope through the passes of either run; the change is the distance of the lines.

A cell that does what the reference does moves with it, slope 1; one that computes while the reference waits
for memory moves less. The slope is not known better than "between 0 and 1" beforehand, which is what few
passes, or a steady machine, leave of it. What is not known of it widens what is said of the cell by as much
as the reference differs between the runs.

Source: R. A. Fisher, Statistical Methods for Research Workers, 4th edition (1932), section 49.1.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Lines"]

# Mean and variance of a slope that may be anything between 0 and 1.
_SLOPE, _SLOPE_VARIANCE = 0.5, 1 / 12
# Passes that lie on the lines by chance have no variance of 0.
_LEAST = 1e-12


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The passes of two runs, as far as the two lines through them need it; all of logarithms.

    Attributes:
        counts: Passes of A and of B, two or more each.
        own: Mean of the cell in B minus that in A.
        other: The same of the reference.
        own_own: Sum of squares of the cell's distances from the mean of its run.
        own_other: Sum of products with those of the reference.
        other_other: Sum of squares of the reference's.
    """

    counts: tuple[int, int]
    own: float
    other: float
    own_own: float
    own_other: float
    other_other: float

    @classmethod
    def of(
        cls, a: Sequence[float], b: Sequence[float], beside_a: Sequence[float], beside_b: Sequence[float]
    ) -> Lines:
        """From logarithms of the cell's passes in both runs, and of the reference's in the same passes."""
        own = [_centred(a), _centred(b)]
        other = [_centred(beside_a), _centred(beside_b)]
        ys, xs = own[0] + own[1], other[0] + other[1]
        return cls(
            counts=(len(a), len(b)),
            own=statistics.fmean(b) - statistics.fmean(a),
            other=statistics.fmean(beside_b) - statistics.fmean(beside_a),
            own_own=_products(ys, ys),
            own_other=_products(ys, xs),
            other_other=_products(xs, xs),
        )

    @property
    def degrees(self) -> int:
        """Of freedom that are left when two means and a slope are known."""
        return sum(self.counts) - 3

    @property
    def variance(self) -> float:
        """Of passes around the lines."""
        slope = min(1.0, max(0.0, self.own_other / self.other_other)) if self.other_other else 0.0
        rest = self.own_own - 2 * slope * self.own_other + slope**2 * self.other_other
        return max(0.0, rest) / self.degrees

    def change(self, variance: float) -> tuple[float, float]:
        """By how much the cell changed, and the variance of that.

        Args:
            variance: Of passes around the lines.
        """
        seen = self.other_other / max(variance, _LEAST)
        known = 1 / _SLOPE_VARIANCE + seen
        slope = _SLOPE / _SLOPE_VARIANCE + self.own_other / max(variance, _LEAST)
        slope = min(1.0, max(0.0, slope / known))
        error = variance * sum(1 / count for count in self.counts) + self.other**2 / known
        return self.own - slope * self.other, error


def _centred(values: Sequence[float]) -> list[float]:
    middle = statistics.fmean(values)
    return [value - middle for value in values]


def _products(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))

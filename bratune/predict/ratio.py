"""Ratio: how much faster one predicted model is than another on the same board, and how well that is known.

What a board or a kind of operation is off by, it is off by in both models: only where their times differ in
composition is the ratio uncertain. So it is better known than the times of two settings of one model, and on
a board that nobody measured, where the whole board may be off, also of two different models.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from bratune.predict.coefficients import HOSTS, UNCALIBRATED_SPREAD, Coefficients
from bratune.predict.estimate import Estimate

__all__ = ["Ratio", "ratio_of"]

Z95 = 1.96
# What the numbers of launches of two models on one host say about their times, in log at 95 %.
LAUNCH_REACH = math.log(1.05)


class Ratio(NamedTuple):
    """A ratio of two times with its 95 % interval."""

    value: float
    lo: float
    hi: float

    @property
    def open(self) -> bool:
        """Whether it may be 1 as well: the two cannot be told apart."""
        return self.lo <= 1 <= self.hi


def ratio_of(a: Estimate, b: Estimate, c: Coefficients, *, related: bool = True) -> Ratio:
    """Time of `a` over time of `b`.

    Args:
        a: An estimate.
        b: Another one, of the same board and regime.
        c: The coefficients of both; where the host is unknown, the ratio is taken on every kind of it.
        related: They are settings of one model. Of two models, the ratio is as uncertain as the ratios of
            models of different families were.
    """
    reach = _reach(a, b, related=related)
    hosts = [c.host_us] if c.host_fitted else [c.host_us, *HOSTS.values()]
    lows, highs = [], []
    for us in hosts:
        (at, limited_a), (bt, limited_b) = (_time(e, us / c.host_us) for e in (a, b))
        own = LAUNCH_REACH if limited_a and limited_b else reach
        lows.append(at / bt * math.exp(-own))
        highs.append(at / bt * math.exp(own))
    return Ratio(a.ms / b.ms, min(lows), max(highs))


def _time(e: Estimate, factor: float) -> tuple[float, bool]:
    """Milliseconds on a host that takes so many times as long per launch, and whether that host limits."""
    host = e.host_ms * factor
    return max(e.device_ms, host), host > e.device_ms


def _reach(a: Estimate, b: Estimate, *, related: bool) -> float:
    """Logarithm of the factor within which the ratio of the devices' times lies."""
    longest = max(sum(a.by_kind.values()), sum(b.by_kind.values())) or 1.0
    uncalibrated = math.expm1(Z95 * UNCALIBRATED_SPREAD)
    if a.public is None:
        return math.log1p(uncalibrated * _differing(a, b, {*a.by_kind, *b.by_kind}) / longest)
    public = {*a.public.moved, "attention"}
    own = {k for k in (*a.by_kind, *b.by_kind) if k not in public}
    shared = a.public.other_ratio
    if related:
        known = _differing(a, b, {*a.by_kind, *b.by_kind} - own) / longest
        shared = min(a.public.family_ratio, math.log1p(math.expm1(a.public.hi) * known))
    return math.hypot(shared, math.log1p(uncalibrated * _differing(a, b, own) / longest))


def _differing(a: Estimate, b: Estimate, kinds: set[str]) -> float:
    """Microseconds that are in one of the two only, by kind."""
    return sum(abs(a.by_kind.get(k, 0.0) - b.by_kind.get(k, 0.0)) for k in kinds)

"""Verdict: FASTER, SLOWER, SAME or UNDECIDED, the one answer to "is it faster?" of every command.

What is judged are *passes*: medians of fresh worker processes. A process has an effect of its own (memory
layout, clocks, algorithm choice) that more samples in it never show, so the interval comes from the scatter
between passes. Two or three passes say little about their own scatter; each variance is therefore moderated
towards that of all cells of its kind in the run, with the weight that the cells themselves suggest. A
variance is never taken to be smaller than the noise within passes says.

A ratio that was measured in turn is judged by its passes (`judge_ratios`); two runs are judged against each
other (`judge_runs`), where what all cells have in common is named and divided out, and what the machine did
in a pass to a reference beside the cell is taken out of the cell (`bratune.measure.beside`). Where many are
judged at once, FASTER and SLOWER are claimed with Holm's correction, so that the chance of any false one is
that of a single comparison. A side of one process is never FASTER or SLOWER.

Source: moderated t, G. K. Smyth, Statistical Applications in Genetics and Molecular Biology 3 (2004) 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bratune.errors import UsageError
from bratune.measure.beside import Lines

__all__ = [
    "BUSY_PCT",
    "CONFIDENCE",
    "MARGIN",
    "VERDICTS",
    "WORDS",
    "Judgement",
    "MedianOfPasses",
    "Passes",
    "Prior",
    "Verdict",
    "estimate",
    "judge_ratios",
    "judge_runs",
    "priors",
    "student_t",
]

VERDICTS = ("FASTER", "SLOWER", "SAME", "UNDECIDED")
# What each means in a sentence: the same in every table, plan and message.
WORDS = {
    "FASTER": "faster, beyond noise and threshold",
    "SLOWER": "slower, beyond noise and threshold",
    "SAME": "the same within the threshold",
    "UNDECIDED": "not shown",
}
# A difference that is smaller does not matter.
MARGIN = 0.02
CONFIDENCE = 0.95
# Share of the time waiting for a processor above which nothing is claimed.
BUSY_PCT = 10.0
# Fewest cells that can be said to move together, and the share of them that must.
_TOGETHER, _TOGETHER_SHARE = 5, 0.75
# Fewest cells whose variances say something about that of another one.
_PRIOR_CELLS = 3
# Beyond this many passes, "run more" is no advice.
_PATIENCE = 100
# A variance of zero is an accident of few passes; its logarithm would outweigh all others.
_LEAST_SHARE = 1e-3
_LARGE_DEGREES = 1e4
_LARGEST_T = 1e9
# Beyond a factor of a thousand an interval says no more than that nothing is known.
_WIDEST = math.log(1000)
# Variance of the median of n normal values, in units of theirs; beyond the table, pi / 2n.
_MEDIAN_VARIANCE = (1.0, 1.0, 0.5, 0.4487, 0.2982, 0.2868, 0.2147, 0.2104, 0.1682)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A time, or a ratio, as several fresh processes measured it.

    Attributes:
        values: One per pass, above 0: the median of its samples, or of its ratios within rounds.
        noise: Standard error within each pass, of the logarithm.
        kind: Cells of one kind scatter alike; see `priors`.
        wait_pct: Largest share of time that a pass waited for a processor, in percent.
        beside: What a reference took in the rounds of each pass; empty without one.
        beside_noise: Standard error within each pass of the ratio to it, of the logarithm.
    """

    values: tuple[float, ...]
    noise: tuple[float, ...]
    kind: str = ""
    wait_pct: float = 0.0
    beside: tuple[float, ...] = ()
    beside_noise: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[float, float | None, float | None]],
        *,
        kind: str = "",
        wait_pct: float = 0.0,
    ) -> Passes:
        """From the value and the 95 % interval of each pass.

        Raises:
            UsageError: there is none, or a value is not above 0.
        """
        found = list(rows)
        if not found or not all(value > 0 for value, _, _ in found):
            raise UsageError("a comparison needs at least one measurement on each side, each above 0")
        return cls(
            values=tuple(value for value, _, _ in found),
            noise=tuple(_standard_error(value, lo, hi) for value, lo, hi in found),
            kind=kind,
            wait_pct=wait_pct,
        )

    @property
    def logs(self) -> list[float]:
        """Logarithms of the values."""
        return [math.log(value) for value in self.values]

    @property
    def variance(self) -> float:
        """Between passes, of the logarithms; 0 where there is one pass only."""
        return statistics.variance(self.logs) if len(self.values) > 1 else 0.0

    @property
    def alone(self) -> Passes:
        """The same without a reference."""
        return dataclasses.replace(self, beside=(), beside_noise=())

    @property
    def within(self) -> float:
        """Mean variance within a pass: what passes scatter by where nothing else moves them."""
        return statistics.fmean(se**2 for se in self.noise)


def _standard_error(value: float, lo: float | None, hi: float | None) -> float:
    low, high = lo or value, hi or value
    return max(0.0, math.log(high / low)) / (2 * 1.959964)


@dataclass(frozen=True)
class Prior:
    """What the cells of a kind say about the variance of one of them.

    Attributes:
        degrees: How many degrees of freedom that is worth; 0: nothing, infinite: all cells scatter alike.
        variance: Between passes, of the logarithm.
    """

    degrees: float = 0.0
    variance: float = 0.0

    def moderated(self, variance: float, degrees: float) -> tuple[float, float]:
        """A variance with its degrees of freedom, drawn towards this one."""
        if math.isinf(self.degrees):
            return self.variance, math.inf
        total = self.degrees + degrees
        if total <= 0:
            return variance, 0.0
        return (self.degrees * self.variance + degrees * variance) / total, total


def priors(cells: Iterable[Passes]) -> dict[str, Prior]:
    """The prior of every kind; a kind of few cells shares that of all.

    Args:
        cells: Everything that was measured in one run.
    """
    return _priors((one.kind, one.variance, len(one.values) - 1) for one in cells)


def _priors(cells: Iterable[tuple[str, float, int]]) -> dict[str, Prior]:
    """Priors from kind, variance and degrees of freedom of every cell."""
    found = list(cells)
    known = [cell for cell in found if cell[2] > 0]
    everything = _fit([cell[1:] for cell in known])
    kinds: dict[str, Prior] = {}
    for kind in {cell[0] for cell in found}:
        own = [cell[1:] for cell in known if cell[0] == kind]
        kinds[kind] = _fit(own) if len(own) >= _PRIOR_CELLS else everything
    return kinds


def _fit(cells: Sequence[tuple[float, int]]) -> Prior:
    """Degrees of freedom and variance from the moments of the logarithms of sample variances."""
    if len(cells) < _PRIOR_CELLS:
        return Prior()
    typical = statistics.median(variance for variance, _ in cells)
    if typical <= 0:
        return Prior()
    logs, spread = [], []
    for variance, degrees in cells:
        half = degrees / 2
        value = max(variance, _LEAST_SHARE * typical)
        logs.append(math.log(value) - _digamma(half) + math.log(half))
        spread.append(_trigamma(half))
    centre = statistics.fmean(logs)
    seen = statistics.variance(logs)
    # How much cells differ is itself known badly from few: one standard error more is assumed. Without it two
    # passes of twenty cells claim falsely in 10 to 16 % of comparisons, with it in less than 5 %.
    excess = seen - statistics.fmean(spread) + seen * math.sqrt(2 / (len(cells) - 1))
    if excess <= 0:
        return Prior(math.inf, math.exp(centre))
    half = _inverse_trigamma(excess)
    return Prior(2 * half, math.exp(centre + _digamma(half) - math.log(half)))


@dataclass(frozen=True)
class MedianOfPasses:
    """The median of passes and its interval.

    Attributes:
        value: Median of the values of the passes.
        lo: Lower end of the interval; None where one pass is all there is.
        hi: Upper end.
        passes: How many.
    """

    value: float
    lo: float | None
    hi: float | None
    passes: int

    @property
    def half_width_pct(self) -> float | None:
        """Half the interval in percent of the value."""
        return None if self.lo is None or self.hi is None else 50 * (self.hi - self.lo) / self.value


def estimate(one: Passes, prior: Prior | None = None, *, confidence: float = CONFIDENCE) -> MedianOfPasses:
    """The median of passes with the interval that their moderated scatter gives.

    Args:
        one: The passes of a cell.
        prior: What its kind scatters by (see `priors`); None takes its own scatter alone.
        confidence: Of the interval.
    """
    middle = statistics.median(one.logs)
    count = len(one.values)
    if count < 2:
        return MedianOfPasses(math.exp(middle), None, None, count)
    variance, degrees = (prior or Prior()).moderated(one.variance, count - 1)
    error = math.sqrt(max(variance, one.within) * _median_variance(count))
    reach = min(_WIDEST, student_t(0.5 + confidence / 2, degrees) * error)
    return MedianOfPasses(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), count)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known of B against A.

    Attributes:
        verdict: One of `VERDICTS`; ``FASTER`` means that B takes less time than A.
        ratio: Time of B over time of A, what all cells have in common divided out.
        lo: Lower limit of the ratio; 0 where one process on a side leaves it open.
        hi: Upper limit of the ratio; infinite where it is open.
        passes: Of A and of B.
        settles: What would settle an ``UNDECIDED``; empty otherwise.
    """

    verdict: str
    ratio: float
    lo: float
    hi: float
    passes: tuple[int, int]
    settles: str = ""

    @property
    def speedup(self) -> float:
        """How many times faster B is than A."""
        return 1 / self.ratio

    @property
    def speedup_interval(self) -> tuple[float, float]:
        """The interval of the speed-up."""
        return 1 / self.hi, 1 / self.lo if self.lo else math.inf

    @property
    def speedup_text(self) -> str:
        """The speed-up with its interval, ``2.10x (1.82 to 2.42)``."""
        lo, hi = self.speedup_interval
        known = f"({lo:.2f} to {hi:.2f})" if self.lo else "(one process shows no interval)"
        return f"{self.speedup:.2f}x {known}"

    def __str__(self) -> str:
        text = f"{self.verdict} {self.ratio:.3f}x"
        text += f" ({self.lo:.3f} to {self.hi:.3f})" if self.lo else ""
        return f"{text}; {self.settles}" if self.settles else text


@dataclass(frozen=True)
class Judgement:
    """The verdicts of cells that were judged together.

    Attributes:
        verdicts: One per pair, in order.
        drift: By what factor everything moved; 1 where cells do not move together. It is divided out of the
            ratios.
    """

    verdicts: tuple[Verdict, ...]
    drift: float = 1.0

    @property
    def sentence(self) -> str:
        """What cells have in common, in words; empty where that is nothing."""
        if self.drift == 1.0:
            return ""
        return (
            f"everything moved by {self.drift:.2f}x: the machine? ratios and verdicts are relative to that; "
            "a change of all cells alike cannot be told from it"
        )


@dataclass(frozen=True)
class _Difference:
    """A log ratio before it is judged."""

    centre: float
    error: float
    degrees: float
    passes: tuple[int, int]
    wait_pct: float

    @property
    def decidable(self) -> bool:
        return min(self.passes) > 1 and self.wait_pct <= BUSY_PCT


def judge_ratios(
    speedups: Sequence[Passes], *, margin: float = MARGIN, confidence: float = CONFIDENCE
) -> Judgement:
    """Verdicts on speed-ups that were measured in turn.

    Args:
        speedups: Per cell and pass, how many times faster it is than what it is compared with: the median of
            the ratios within rounds.
        margin: Differences within this fraction do not matter.
        confidence: That not one of all claims is false.
    """
    known = priors(speedups)
    found = []
    for one in speedups:
        count = len(one.values)
        variance, degrees = known[one.kind].moderated(one.variance, count - 1)
        error = math.sqrt(max(variance, one.within) * _median_variance(count))
        found.append(_Difference(-statistics.median(one.logs), error, degrees, (count, count), one.wait_pct))
    return Judgement(_judged(found, margin, confidence))


def judge_runs(
    pairs: Sequence[tuple[Passes, Passes]], *, margin: float = MARGIN, confidence: float = CONFIDENCE
) -> Judgement:
    """Verdicts on the cells of one run against those of another.

    Args:
        pairs: Per cell, the times of A and of B; with a reference on both sides that is the same code, what
            the machine did to it in each pass is taken out of the cell's time.
        margin: Differences within this fraction do not matter.
        confidence: That not one of all claims is false.
    """
    centres = [statistics.median(b.logs) - statistics.median(a.logs) for a, b in pairs]
    shift, shared = _common(centres, margin)
    apart = {n: pair for n, pair in enumerate(pairs) if not all(map(_has_reference, pair))}
    beside = {n: pair for n, pair in enumerate(pairs) if n not in apart}
    found = _apart(apart, shift, shared) | _beside(beside)
    verdicts = _judged([found[n] for n in range(len(pairs))], margin, confidence)
    return Judgement(verdicts, math.exp(shift) if shared else 1.0)


def _has_reference(one: Passes) -> bool:
    return len(one.beside) == len(one.values) > 1


def _apart(pairs: Mapping[int, tuple[Passes, Passes]], shift: float, shared: bool) -> dict[int, _Difference]:
    """Differences of the times of two runs, whatever the machine did meanwhile."""
    degrees = {n: len(a.values) + len(b.values) - 2 for n, (a, b) in pairs.items()}
    pooled = {
        n: ((len(a.values) - 1) * a.variance + (len(b.values) - 1) * b.variance) / max(1, degrees[n])
        for n, (a, b) in pairs.items()
    }
    known = _priors((a.kind, pooled[n], degrees[n]) for n, (a, _) in pairs.items())
    found = {}
    for n, (a, b) in pairs.items():
        counts = len(a.values), len(b.values)
        moderated, total = known[a.kind].moderated(pooled[n], degrees[n])
        error = sum(
            max(moderated, one.within) * _median_variance(count)
            for one, count in zip((a, b), counts, strict=True)
        )
        # What moved all cells a little is no property of any of them: it widens what is known of each.
        error = math.sqrt(error + (0.0 if shared else shift**2))
        centre = statistics.median(b.logs) - statistics.median(a.logs) - (shift if shared else 0.0)
        found[n] = _Difference(centre, error, total, counts, max(a.wait_pct, b.wait_pct))
    return found


def _beside(pairs: Mapping[int, tuple[Passes, Passes]]) -> dict[int, _Difference]:
    """Differences beside a reference, which moved with everything; see `bratune.measure.beside`."""
    lines = {
        n: Lines.of(a.logs, b.logs, [*map(math.log, a.beside)], [*map(math.log, b.beside)])
        for n, (a, b) in pairs.items()
    }
    known = _priors((pairs[n][0].kind, line.variance, line.degrees) for n, line in lines.items())
    found = {}
    for n, line in lines.items():
        a, b = pairs[n]
        variance, degrees = known[a.kind].moderated(line.variance, line.degrees)
        within = statistics.fmean(error**2 for error in (*a.beside_noise, *b.beside_noise))
        centre, error = line.change(max(variance, within))
        wait = max(a.wait_pct, b.wait_pct)
        found[n] = _Difference(centre, math.sqrt(error), degrees, line.counts, wait)
    return found


def _common(centres: Sequence[float], margin: float) -> tuple[float, bool]:
    """The log factor by which cells moved together; and whether nearly all did, beyond the margin."""
    if len(centres) < _TOGETHER:
        return 0.0, False
    shift = statistics.median(centres)
    along = sum(0.5 < centre / shift < 2 for centre in centres) if shift else 0
    return shift, abs(shift) > math.log1p(margin) and along >= _TOGETHER_SHARE * len(centres)


def _judged(found: Sequence[_Difference], margin: float, confidence: float) -> tuple[Verdict, ...]:
    limit = math.log1p(margin)
    claimed = _holm(found, 1 - confidence)
    verdicts = []
    for number, one in enumerate(found):
        reach = student_t(0.5 + confidence / 2, one.degrees) * one.error if min(one.passes) > 1 else math.inf
        lo, hi = one.centre - reach, one.centre + reach
        if not one.decidable:
            verdict = "UNDECIDED"
        elif -limit <= lo and hi <= limit:
            verdict = "SAME"
        elif number in claimed and abs(one.centre) > limit:
            verdict = "FASTER" if one.centre < 0 else "SLOWER"
        else:
            verdict = "UNDECIDED"
        verdicts.append(
            Verdict(
                verdict=verdict,
                ratio=math.exp(one.centre),
                lo=math.exp(lo),
                hi=math.exp(hi),
                passes=one.passes,
                settles=_advice(one, reach, limit) if verdict == "UNDECIDED" else "",
            )
        )
    return tuple(verdicts)


def _holm(found: Sequence[_Difference], alpha: float) -> set[int]:
    """Numbers of the differences that are claimed, the chance of any false claim being ``alpha``.

    Cells have degrees of freedom of their own, so the order is that of the levels at which each would just be
    claimed; these are compared through quantiles of each level.
    """
    tested = [n for n, one in enumerate(found) if one.decidable]
    claimed: set[int] = set()
    while len(claimed) < len(tested):
        level = 1 - alpha / 2 / (len(tested) - len(claimed))
        new = {
            n
            for n in tested
            if n not in claimed and abs(found[n].centre) > student_t(level, found[n].degrees) * found[n].error
        }
        if not new:
            break
        claimed |= new
    return claimed


def _advice(one: _Difference, reach: float, limit: float) -> str:
    """What would settle it, if the ratio stays where it is."""
    if one.wait_pct > BUSY_PCT:
        return (
            f"the processes waited for a processor {one.wait_pct:.0f} % of the time; "
            "a machine with nothing else running would settle it"
        )
    a, b = one.passes
    if min(a, b) < 2:
        return f"one process on a side shows no scatter ({a} and {b} passes); --passes 3 would show it"
    target = abs(one.centre) if abs(one.centre) > limit / 2 else limit - abs(one.centre)
    needed = max(3, max(a, b) + 1, math.ceil(max(a, b) * (reach / max(target, 1e-9)) ** 2))
    if needed > _PATIENCE:
        return "the noise is too large for a difference this small; a quieter machine or a wider threshold"
    return f"about {needed} passes per side would settle it ({a} and {b} now)"


def _median_variance(count: int) -> float:
    return _MEDIAN_VARIANCE[count] if count < len(_MEDIAN_VARIANCE) else math.pi / 2 / count


@functools.lru_cache(maxsize=4096)
def student_t(probability: float, degrees: float) -> float:
    """The quantile of Student's t; of the normal distribution for infinite degrees of freedom."""
    if degrees > _LARGE_DEGREES:
        return statistics.NormalDist().inv_cdf(probability)
    if degrees <= 0:
        return math.inf
    # Newton from the normal quantile, which is below: above 0 the distribution is concave, so that no step
    # goes too far.
    t = max(0.0, statistics.NormalDist().inv_cdf(probability))
    log_peak = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    for _ in range(200):
        density = math.exp(log_peak - (degrees + 1) / 2 * math.log1p(t * t / degrees))
        step = (probability - _t_cdf(t, degrees)) / density
        t = min(t + step, _LARGEST_T)
        if step <= 1e-10 * t or t == _LARGEST_T:
            break
    return t


def _t_cdf(t: float, degrees: float) -> float:
    """Chance that Student's t is below a value of at least 0."""
    return 1 - 0.5 * _beta_share(degrees / (degrees + t * t), degrees / 2, 0.5)


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_share(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    total = d
    for m in range(1, 500):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            total *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * total / a


def _digamma(x: float) -> float:
    """Derivative of the logarithm of the gamma function: recurrence, then the asymptotic series."""
    found = 0.0
    while x < 8:
        found -= 1 / x
        x += 1
    inverse = 1 / (x * x)
    series = inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse / 240)))
    return found + math.log(x) - 0.5 / x - series


def _trigamma(x: float) -> float:
    """Derivative of `_digamma`."""
    found = 0.0
    while x < 8:
        found += 1 / (x * x)
        x += 1
    inverse = 1 / (x * x)
    series = inverse * (1 / 6 - inverse * (1 / 30 - inverse * (1 / 42 - inverse / 30)))
    return found + (1 + series) / x + inverse / 2


def _inverse_trigamma(value: float) -> float:
    """Where `_trigamma`, which falls from infinity to 0, takes a value; found by bisection."""
    low, high = 1e-8, 1e8
    for _ in range(200):
        middle = math.sqrt(low * high)
        if _trigamma(middle) > value:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)

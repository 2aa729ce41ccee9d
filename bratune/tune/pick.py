"""Pick: which of the verified settings becomes the plan, and why.

Every rule first drops what breaks a constraint. A rule never looks at anything that was not measured end to
end.

A constraint is what a user writes: ``peak_alloc_mb<=20000``, ``median_ms < 12.5``, ``images_per_s >= 400``.
It is read, never evaluated as code: a field of a record, a comparison, a number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bratune.errors import UnknownNameError, UsageError
from bratune.record import Record
from bratune.tune.lost_accuracy import CONFIDENCE, Counts, need_in_words
from bratune.tune.setting import Setting
from bratune.tune.table import Point, pareto

__all__ = [
    "PICKS",
    "Constraint",
    "Pick",
    "Verified",
    "acceptable",
    "check_rule",
    "parse_constraint",
    "pick",
    "violations",
]

_PATTERN = re.compile(r"\s*([A-Za-z_][A-Za-z_0-9]*)\s*(<=|>=|<|>)\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*")


def _numeric_fields() -> tuple[str, ...]:
    return tuple(
        f.name
        for f in dataclasses.fields(Record)
        if "float" in str(f.type) or f.name in ("n_samples", "stage")
    )


@dataclass(frozen=True)
class Constraint:
    """A limit on one number of a record."""

    field: str
    comparison: str
    limit: float

    def violation(self, record: Record) -> float | None:
        """How far the record is beyond the limit; at most 0 where it holds, None where it has no number."""
        value = getattr(record, self.field)
        if value is None:
            return None
        over = float(value) - self.limit
        over = over if self.comparison.startswith("<") else -over
        return 1e-9 if over == 0 and len(self.comparison) == 1 else over

    def __str__(self) -> str:
        return f"{self.field}{self.comparison}{self.limit:g}"


def parse_constraint(text: str) -> Constraint:
    """The constraint that a text spells.

    Raises:
        UsageError: it is not a field, a comparison and a number.
        UnknownNameError: no record has such a number.
    """
    match = _PATTERN.fullmatch(text)
    if not match:
        raise UsageError(
            f"constraint {text!r} cannot be read; a field, one of <= < >= >, and a number would work: "
            "'peak_alloc_mb<=20000'"
        )
    if match[1] not in _numeric_fields():
        raise UnknownNameError("number of a record", match[1], _numeric_fields())
    return Constraint(match[1], match[2], float(match[3]))


def violations(constraints: Iterable[Constraint], record: Record) -> dict[str, float]:
    """How far a record is beyond each constraint, by its text; what is unknown counts as kept."""
    return {str(c): over for c in constraints if (over := c.violation(record)) is not None}


PICKS = ("balanced", "safe", "fast", "knee", "fastest", "lightest", "trial:N")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A setting that was measured end to end.

    Attributes:
        trial: Its number in the study.
        ms: Median latency of the model.
        ci: 95 % interval of the median, in milliseconds; None where too little was measured.
        memory_mb: Peak allocated memory; None when unknown.
        loss: Divergence from the reference; None when fidelity was not measured. It orders settings and
            decides nothing where ``counts`` are known.
        counts: What was counted of its answers; None where nothing was, or it is the reference.
        feasible: It keeps every constraint.
        predicted_ms: What the table said; None without a table.
    """

    trial: int
    setting: Setting
    ms: float
    ci: tuple[float, float] | None = None
    memory_mb: float | None = None
    loss: float | None = None
    counts: Counts | None = None
    feasible: bool = True
    predicted_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The chosen setting and the reason in one sentence."""

    chosen: Verified
    reason: str


def check_rule(rule: str) -> None:
    """Raise `UnknownNameError` where a text is no rule."""
    number = rule.removeprefix("trial:")
    if rule not in PICKS[:-1] and not (number != rule and number.isdigit()):
        raise UnknownNameError("pick rule", rule, PICKS)


def pick(
    rule: str,
    verified: Sequence[Verified],
    *,
    limits: Mapping[str, float] | None = None,
    confidence: float = CONFIDENCE,
) -> Pick:
    """The setting that a rule chooses.

    Args:
        rule: One of `PICKS`.
        verified: What was measured; at least one must be feasible.
        limits: What ``safe``, ``balanced`` and ``fast`` accept at most, needed where fidelity was measured:
            lost top-1, as a fraction, of settings whose answers were counted, else of their ``loss``.
        confidence: That no limit of lost top-1 is broken, one-sided.

    Raises:
        UnknownNameError: the rule is not known.
        UsageError: nothing is feasible, or the trial that was asked for is not there.
    """
    check_rule(rule)
    feasible = [v for v in verified if v.feasible]
    if rule.startswith("trial:"):
        return _by_number(rule, verified)
    if not feasible:
        raise UsageError(
            f"none of {len(verified)} measured settings keeps every constraint; "
            "a looser constraint would help"
        )
    if rule == "fastest":
        return Pick(chosen=_fastest(feasible), reason=f"lowest latency of {len(feasible)} feasible settings")
    if rule == "lightest":
        return _lightest(feasible)
    if rule == "knee":
        return _knee(feasible)
    if all(v.loss is None for v in feasible):
        reason = (
            f"lowest latency of {len(feasible)} feasible settings; fidelity was not measured, so "
            f"{rule!r} has no divergence to limit"
        )
        return Pick(chosen=_fastest(feasible), reason=reason)
    if limits is None:
        raise UsageError(
            f"{rule!r} needs to know what it may accept, and fidelity was measured without limits"
        )
    limit = limits[rule]
    within = acceptable(feasible, limit, confidence)
    judged = [v for v in feasible if v.counts is not None]
    what = f"a loss of at most {limit:g}"
    if judged:
        what = f"at most {100 * limit:.1f} points of top-1 lost on other pictures, at {confidence:.0%}"
    if not within:
        closest = min(feasible, key=lambda v: (math.inf if v.loss is None else v.loss, v.ms))
        return Pick(chosen=closest, reason=f"no setting is shown to keep {what}: the closest one")
    chosen = _fastest(within)
    reason = f"lowest latency of {len(within)} settings shown to keep {what} ({rule})"
    quicker = [v for v in judged if v not in within and v.ms < chosen.ms]
    if quicker:
        near = min(quicker, key=lambda v: (math.inf if v.loss is None else v.loss, v.ms))
        assert near.counts is not None
        need = need_in_words(limit, near.counts, confidence=confidence, among=len(judged))
        reason += f"; the nearest of {len(quicker)} faster ones would need more to be shown: {need}"
    return Pick(chosen=chosen, reason=reason)


def acceptable(verified: Sequence[Verified], limit: float, confidence: float = CONFIDENCE) -> list[Verified]:
    """The settings that are shown to keep a limit, all of them together with the confidence.

    Where answers were counted, the upper limit of lost top-1 decides; else the loss itself.
    """
    among = sum(v.counts is not None for v in verified)

    def kept(v: Verified) -> bool:
        if v.counts is not None:
            return v.counts.most_lost(confidence, among=among) <= limit
        return v.loss is not None and v.loss <= limit

    return [v for v in verified if kept(v)]


def _by_number(rule: str, verified: Sequence[Verified]) -> Pick:
    text = rule.removeprefix("trial:")
    for v in verified:
        if str(v.trial) == text:
            return Pick(chosen=v, reason=f"trial {v.trial} was asked for")
    numbers = ", ".join(str(v.trial) for v in verified)
    raise UsageError(f"there is no finished trial {text!r} to pick; these are: {numbers}")


def _fastest(verified: Sequence[Verified]) -> Verified:
    return min(verified, key=lambda v: (v.ms, v.trial))


def _lightest(verified: Sequence[Verified]) -> Pick:
    known = [v for v in verified if v.memory_mb is not None]
    if not known:
        raise UsageError("no measured setting has a known peak memory; 'fastest' would work")
    chosen = min(known, key=lambda v: (v.memory_mb, v.ms, v.trial))
    return Pick(chosen=chosen, reason=f"lowest peak memory of {len(known)} feasible settings")


def _knee(verified: Sequence[Verified]) -> Pick:
    """The point of the front farthest from the line between its ends, both axes scaled to [0, 1]."""
    by_loss = any(v.loss is not None for v in verified)
    what = "fidelity" if by_loss else "memory"

    def second(v: Verified) -> float:
        if by_loss:
            return math.inf if v.loss is None else 1.0 - math.exp(-v.loss)
        return math.inf if v.memory_mb is None else v.memory_mb

    points = [Point((math.log(v.ms), second(v)), v) for v in verified if math.isfinite(second(v))]
    front = pareto(points)
    if len(front) < 3:
        chosen = _fastest([p.item for p in front] or list(verified))
        reason = f"the front of latency and {what} has {len(front)} settings and no knee: the fastest"
        return Pick(chosen=chosen, reason=reason)
    (x0, y0), (x1, y1) = front[0].costs, front[-1].costs

    def distance(p: Point[Verified]) -> float:
        x, y = (p.costs[0] - x0) / (x1 - x0), (p.costs[1] - y1) / (y0 - y1)
        return 1.0 - x - y

    chosen = max(front, key=distance).item
    return Pick(chosen=chosen, reason=f"knee of the front of latency and {what} ({len(front)} settings)")

"""Constraints that a user writes: ``peak_alloc_mb<=20000``, ``median_ms < 12.5``, ``images_per_s >= 400``.

An expression is read, never evaluated as code: a field of a record, a comparison, a number.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass

from bratune.errors import UnknownNameError, UsageError
from bratune.record import Record

__all__ = ["Constraint", "parse_constraint", "violations"]

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

"""Fronts: what nothing else beats in every cost at once, found exactly over an additive table.

Costs are tuples where smaller is better. The cost of a whole setting comes from those of its stages axis
by axis: latency and divergence add up, the peak memory of inference is the largest of the stages. Both
rules are monotone, so a stage option that another one beats can never be part of a better whole, and
pruning stage by stage is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Point", "combine", "dominates", "hypervolume", "layers", "pareto"]

T = TypeVar("T")


@dataclass(frozen=True)
class Point(Generic[T]):
    """Something with costs."""

    costs: tuple[float, ...]
    item: T


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether a is at least as good as b everywhere and better somewhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def pareto(points: Iterable[Point[T]]) -> list[Point[T]]:
    """The points that no other dominates, by rising first cost; of equal costs the first one stays."""
    return layers(points, depth=1)


def layers(points: Iterable[Point[T]], depth: int) -> list[Point[T]]:
    """The points below fewer than ``depth`` levels of others, by rising costs.

    Level 0 is the front, level 1 the front of what is left without it, and so on. A point's level is the
    length of the longest chain of points that dominate one another down to it; that is why stages may be
    pruned to ``depth`` levels before they are combined without losing a level of the whole.
    """
    unique: dict[tuple[float, ...], Point[T]] = {}
    for point in points:
        unique.setdefault(point.costs, point)
    ordered = [unique[costs] for costs in sorted(unique)]
    kept: list[list[tuple[float, ...]]] = [[] for _ in range(depth)]
    found = []
    for point in ordered:  # whoever dominates a point comes before it
        level = 0
        for fronts in kept:
            if not any(dominates(costs, point.costs) for costs in fronts):
                break
            level += 1
        if level < depth:
            kept[level].append(point.costs)
            found.append(point)
    return found


def _add(a: float, b: float) -> float:
    return a + b


RULES: dict[str, Callable[[float, float], float]] = {"sum": _add, "max": max}


def combine(
    stages: Sequence[Sequence[Point[T]]], rules: Sequence[str], *, depth: int = 1
) -> list[Point[tuple[T, ...]]]:
    """The best whole settings: one item per stage, exactly the levels that `layers` would keep.

    Args:
        stages: The options of each stage.
        rules: For each cost, ``sum`` or ``max``.
        depth: Levels to keep; 1 is the front itself.

    Returns:
        Points whose item is the tuple of the stages' items; empty when a stage has no option.
    """
    merge = [RULES[rule] for rule in rules]
    whole: list[Point[tuple[T, ...]]] = []
    for index, options in enumerate(stages):
        pruned = layers(options, depth)
        if index == 0:
            whole = [Point(p.costs, (p.item,)) for p in pruned]
            continue
        joined = (
            Point(tuple(f(x, y) for f, x, y in zip(merge, a.costs, b.costs, strict=True)), (*a.item, b.item))
            for a in whole
            for b in pruned
        )
        whole = layers(joined, depth)
    return whole


def hypervolume(costs: Iterable[Sequence[float]], reference: Sequence[float]) -> float:
    """The area between a set of two-cost points and a reference that is worse than all that counts.

    Points that are not below the reference in both costs add nothing.
    """
    inside = sorted((c[0], c[1]) for c in costs if c[0] < reference[0] and c[1] < reference[1])
    area, ceiling = 0.0, float(reference[1])
    for x, y in inside:
        if y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return area

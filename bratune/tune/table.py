"""The additive table: what each stage costs with each option, and what that predicts for a whole model.

Latency of a model is close to the sum of its stages: 3.3 % mean error was seen on a CPU. How close it is here
is measured in every run by the candidates that are verified end to end (`TableError`).

Of its options a front is what nothing else beats in every cost at once. Costs are tuples where smaller is
better. The cost of a whole setting comes from those of its stages axis by axis: latency and divergence add
up, the peak memory of inference is the largest of the stages. Both rules are monotone, so a stage option that
another one beats can never be part of a better whole, and pruning stage by stage is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bratune.measure import ranks as stats
from bratune.measure.statistics import quantile
from bratune.tune.setting import Setting
from bratune.tune.space import Space

__all__ = [
    "Candidate",
    "Entry",
    "OptionTable",
    "Point",
    "TableError",
    "combine",
    "dominates",
    "hypervolume",
    "layers",
    "pareto",
]

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


# Latency predicted worse than this is no base for choosing what to verify next. Ranks say something only
# where settings differ by more than noise: the slow ones must take a quarter longer than the fast ones.
MAX_MAPE = 0.15
MIN_KENDALL = 0.8
MIN_SPREAD = 1.25


@dataclass(frozen=True, order=True, kw_only=True)
class Entry:
    """One option of one stage, measured.

    Attributes:
        stage: From 0.
        ms: Time of all the stage's blocks, in milliseconds.
        memory_mb: Peak allocated memory of one block; None when unknown.
        loss: What the option adds to the divergence from the reference; 0 without a fidelity measurement.
    """

    stage: int
    n_win: int
    topk: int
    backend: str
    config: str = "{}"
    ms: float = 0.0
    memory_mb: float | None = None
    loss: float = 0.0

    @property
    def option(self) -> tuple[int, int, int, str, str]:
        """What it is, without what it costs."""
        return self.stage, self.n_win, self.topk, self.backend, self.config


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A setting with its predicted costs.

    Attributes:
        ms: Predicted latency of the model.
        loss: Predicted divergence.
        memory_mb: Largest peak of the stages; 0 when unknown.
    """

    setting: Setting
    ms: float
    loss: float
    memory_mb: float


@dataclass(frozen=True, kw_only=True)
class TableError:
    """How well the table predicted what was then measured end to end.

    Attributes:
        n: Settings measured both ways.
        mape: Mean absolute error as a fraction; NaN for n = 0.
        kendall: Rank correlation tau-b; NaN below two settings.
        spearman: Rank correlation rho.
        spread: 90th over 10th percentile of the measured times.
    """

    n: int
    mape: float
    kendall: float
    spearman: float
    spread: float = 1.0

    @property
    def trustworthy(self) -> bool:
        """Whether the table may go on choosing what is verified next."""
        shuffled = self.n >= 5 and self.spread >= MIN_SPREAD and self.kendall < MIN_KENDALL
        return not (self.mape > MAX_MAPE or shuffled)

    def __str__(self) -> str:
        if not self.n:
            return "table error: no setting has been measured end to end yet"
        text = f"table error over {self.n} measured settings: MAPE {self.mape:.1%}"
        if self.n > 1:
            text += f", Kendall {self.kendall:.2f}, Spearman {self.spearman:.2f}"
        return text


class OptionTable:
    """Measured options of every routed stage of a space.

    Args:
        space: Model and resolution.
        entries: Options that could be measured; others are absent.
        rest_ms: Time of everything outside the routed stages.
        objective: Second cost of the front beside latency: ``loss`` or ``memory``.
    """

    def __init__(
        self, space: Space, entries: Iterable[Entry], *, rest_ms: float = 0.0, objective: str = "loss"
    ) -> None:
        self.space, self.rest_ms, self.objective = space, rest_ms, objective
        self.entries: dict[tuple[int, int, int, str, str], Entry] = {e.option: e for e in entries}

    def find(self, setting: Setting) -> tuple[Entry, ...] | None:
        """The entries of a setting, in stage order; None when one was not measured."""
        found = []
        for i in self.space.routed:
            key = (i, setting.n_win[i], setting.topks[i], setting.backends[i], setting.configs[i])
            entry = self.entries.get(key)
            if entry is None:
                return None
            found.append(entry)
        return tuple(found)

    def predict_ms(self, setting: Setting) -> float | None:
        """Predicted latency of the model; None when an entry is missing."""
        entries = self.find(setting)
        return None if entries is None else self.rest_ms + sum(e.ms for e in entries)

    def calibrated(self, setting: Setting, measured_ms: float) -> OptionTable:
        """This table with the rest of the model set so that one measured setting is met exactly."""
        entries = self.find(setting)
        rest = 0.0 if entries is None else measured_ms - sum(e.ms for e in entries)
        return OptionTable(
            self.space, self.entries.values(), rest_ms=max(rest, 0.0), objective=self.objective
        )

    def with_losses(self, losses: Mapping[tuple[int, int, int], float]) -> OptionTable:
        """This table with divergences of ``(stage, S, top-k)``; options without one are dropped."""
        entries = [
            Entry(
                stage=e.stage,
                n_win=e.n_win,
                topk=e.topk,
                backend=e.backend,
                config=e.config,
                ms=e.ms,
                memory_mb=e.memory_mb,
                loss=losses[e.stage, e.n_win, e.topk],
            )
            for e in self.entries.values()
            if (e.stage, e.n_win, e.topk) in losses
        ]
        return OptionTable(self.space, entries, rest_ms=self.rest_ms, objective=self.objective)

    def candidates(self, *, depth: int = 1, max_memory_mb: float | None = None) -> list[Candidate]:
        """Settings on the predicted front, and on ``depth - 1`` levels below it, by rising latency.

        Args:
            depth: Levels, the front included.
            max_memory_mb: Options that need more in one block are left out first; as the peak of
                inference is the largest of the stages, the result stays exact.
        """
        pool = [
            e
            for e in self.entries.values()
            if max_memory_mb is None or e.memory_mb is None or e.memory_mb <= max_memory_mb
        ]
        groups: list[list[list[Entry]]] = []
        if self.space.per_stage:
            groups.append([[e for e in pool if e.stage == i] for i in self.space.routed])
        else:
            for s in sorted({e.n_win for e in pool}):
                groups.append([[e for e in pool if e.stage == i and e.n_win == s] for i in self.space.routed])
        second = "max" if self.objective == "memory" else "sum"
        points: list[Point[tuple[Entry, ...]]] = []
        for group in groups:
            points += combine(
                [[self._point(e) for e in stage] for stage in group], ("sum", second), depth=depth
            )
        return [self._candidate(point.item) for point in layers(points, depth)]

    def fastest(self, n_win: Sequence[int], topks: Sequence[int]) -> Candidate | None:
        """The fastest backends for an S and top-k per stage; None when a stage of them was not measured."""
        chosen = []
        for i in self.space.routed:
            options = [
                e for e in self.entries.values() if (e.stage, e.n_win, e.topk) == (i, n_win[i], topks[i])
            ]
            if not options:
                return None
            chosen.append(min(options, key=lambda e: (e.ms, e)))
        return self._candidate(chosen)

    def swaps(self, setting: Setting) -> list[Setting]:
        """The setting with another backend in one stage, the fastest one there; the most promising first."""
        own, found = {entry.stage: entry for entry in self.find(setting) or ()}, []
        for i, entry in own.items():
            same = [
                e for e in self.entries.values() if (e.stage, e.n_win, e.topk) == (i, entry.n_win, entry.topk)
            ]
            others = [e for e in same if e.backend != entry.backend]
            if others:
                best = min(others, key=lambda e: (e.ms, e))
                found.append((best.ms - entry.ms, self._candidate([*(own | {i: best}).values()]).setting))
        return [swap for _, swap in sorted(found, key=lambda pair: pair[0])]

    def _point(self, entry: Entry) -> Point[Entry]:
        second = (entry.memory_mb or 0.0) if self.objective == "memory" else entry.loss
        return Point((entry.ms, second), entry)

    def _candidate(self, entries: Sequence[Entry]) -> Candidate:
        count = len(self.space.variant.dims)
        sides = [entries[0].n_win] * count
        topks = list(self.space.variant.topks)
        backends, configs = [""] * count, ["{}"] * count
        for e in entries:
            sides[e.stage], topks[e.stage] = e.n_win, e.topk
            backends[e.stage], configs[e.stage] = e.backend, e.config
        return Candidate(
            setting=self.space.setting(sides, topks, backends, configs),
            ms=self.rest_ms + sum(e.ms for e in entries),
            loss=sum(e.loss for e in entries),
            memory_mb=max((e.memory_mb or 0.0) for e in entries),
        )

    def error(self, measured: Iterable[tuple[Setting, float]]) -> TableError:
        """How well latencies of whole models, in milliseconds, were predicted."""
        pairs = [(p, ms) for setting, ms in measured if (p := self.predict_ms(setting)) is not None]
        predicted, seen = [p for p, _ in pairs], [ms for _, ms in pairs]
        return TableError(
            n=len(pairs),
            mape=stats.mape(predicted, seen),
            kendall=stats.kendall(predicted, seen) if pairs else float("nan"),
            spearman=stats.spearman(predicted, seen),
            spread=quantile(sorted(seen), 0.9) / quantile(sorted(seen), 0.1) if seen else 1.0,
        )

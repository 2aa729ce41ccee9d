"""The search space: which S, top-k and backend a model may run at a resolution.

What changes the *model* is S and top-k per stage; backend, its settings, regime and layout only change
the *cost*. `Space` knows which values are legal for every stage's map and how much padding they cost;
equal settings have equal keys, so that nothing is measured twice.

Rankings of settings by trained accuracy differ so much between tasks that no score that never sees the
task can serve two of them. Without data a setting is therefore only required not to see less than the
authors' own: at least as many keys per query in every stage, and regions that are not larger.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bratune.errors import ProblemError
from bratune.tune.setting import FREE, Bounds, Setting
from bratune.variant import Stage, Variant, get_variant, stages

__all__ = ["TOPK_LEVELS", "Bounds", "Setting", "Space", "Window", "checkpoint_bounds", "prior_bounds"]

# The usual steps; the number of regions (full attention) is added to them.
TOPK_LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
MAX_WASTE = 0.25


@dataclass(frozen=True, kw_only=True)
class Window:
    """A legal S with the padding that it costs: padded tokens over tokens, minus 1, per routed stage."""

    n_win: int
    waste: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Space:
    """All settings of a model at a resolution.

    Args:
        model: Variant name.
        height: Image height in pixels.
        width: Image width in pixels.
        batch: Images.
        dtype: See `bratune.problem.Problem`.
        direction: See `bratune.problem.Problem`.
        default_n_win: The S that the authors use for the task.
        per_stage: S may differ between stages; by default for the STL models, whose constructors take
            one S per stage. The official BiFormer takes one for all.
        max_waste: Largest share of padded tokens over tokens that a stage may add.
        bounds: Limits on what changes the model.

    Raises:
        ProblemError: not even the default S can run at this resolution.
    """

    model: str
    height: int
    width: int
    batch: int = 1
    dtype: str = "float32"
    direction: str = "fwd"
    default_n_win: int = 7
    per_stage: bool | None = None
    max_waste: float = MAX_WASTE
    bounds: Bounds = FREE

    def __post_init__(self) -> None:
        if self.per_stage is None:
            object.__setattr__(self, "per_stage", self.variant.layout != "biformer")

    @property
    def variant(self) -> Variant:
        """The model in numbers."""
        return get_variant(self.model)

    @property
    def routed(self) -> tuple[int, ...]:
        """Indices, from 0, of the stages with routed attention."""
        return tuple(i for i, k in enumerate(self.variant.topks) if k > 0)

    @functools.cached_property
    def _stages(self) -> dict[tuple[int, int, int], Stage | None]:
        return {}

    def find_stage(self, index: int, n_win: int, topk: int) -> Stage | None:
        """Stage ``index`` (from 0) with that S and top-k; None where they do not fit its map."""
        key = (index, n_win, topk)
        if key not in self._stages:
            topks = [0] * len(self.variant.dims)  # the other stages shall not object
            topks[index] = topk
            try:
                found: Stage | None = self._made(n_win, topks)[index]
            except ProblemError:
                found = None
            self._stages[key] = found
        return self._stages[key]

    def stages_of(self, setting: Setting) -> tuple[Stage, ...]:
        """The stages of the model with a setting."""
        return self._made(setting.n_win, setting.topks)

    def _made(self, n_win: int | Sequence[int], topks: Sequence[int]) -> tuple[Stage, ...]:
        return stages(
            self.variant,
            self.height,
            self.width,
            batch=self.batch,
            n_win=n_win,
            topks=topks,
            dtype=self.dtype,
            direction=self.direction,
        )

    def stage(self, index: int, n_win: int, topk: int) -> Stage:
        """As `find_stage`.

        Raises:
            ProblemError: they do not fit.
        """
        found = self.find_stage(index, n_win, topk)
        if found is None:
            height, width = self.variant.maps(self.height, self.width)[index]
            raise ProblemError(
                f"S {n_win} with top-k {topk} does not fit stage {index + 1} "
                f"({height}x{width} tokens) of {self.model}"
            )
        return found

    # --- legal values -----------------------------------------------------------------------

    def _fits(self, index: int, n_win: int) -> bool:
        stage = self.find_stage(index, n_win, 1)
        if stage is None or n_win > min(stage.height, stage.width):
            return False
        return stage.padding_waste <= self.max_waste + 1e-9

    @functools.cached_property
    def base_n_win(self) -> int:
        """The authors' S for the task, or the nearest one that this model can run at this resolution."""
        if all(self.find_stage(i, self.default_n_win, 1) for i in self.routed):
            return self.default_n_win
        return self.nearest_window(self.default_n_win)

    @functools.cached_property
    def _common(self) -> tuple[int, ...]:
        sides = [min(self.variant.maps(self.height, self.width)[i]) for i in self.routed]
        return tuple(s for s in range(2, min(sides) + 1) if all(self._fits(i, s) for i in self.routed))

    def nearest_window(self, n_win: float) -> int:
        """The S closest to a wished one, on a logarithmic scale, that fits every stage.

        Raises:
            ProblemError: no S of at least 2 fits.
        """
        if not self._common:
            raise ProblemError(
                f"no number of regions per side of at least 2 fits every routed stage of {self.model} at "
                f"{self.height}x{self.width} with at most {self.max_waste:.0%} padding"
            )
        return min(self._common, key=lambda s: (abs(math.log(s / n_win)), s))

    def windows(self, index: int) -> tuple[int, ...]:
        """Legal S of stage ``index``, from coarse to fine, the authors' own included whatever it pads."""
        if self.bounds.n_win is not None:
            return (self.bounds.n_win[index],)
        if self.per_stage:
            side = min(self.variant.maps(self.height, self.width)[index])
            legal = {s for s in range(2, side + 1) if self._fits(index, s)}
        else:
            legal = set(self._common)
        legal.add(self.base_n_win)
        return self._distinct(index, sorted(s for s in legal if self.topks(index, s)))

    def _distinct(self, index: int, sides: Sequence[int]) -> tuple[int, ...]:
        """One S per way to cut the map: where regions round down, several S give the same regions."""
        kept: dict[tuple[tuple[int, int], tuple[int, int]], int] = {}
        for s in sides:
            problem = self.stage(index, s, 1).problem
            assert problem is not None
            cut = (problem.region, problem.grid)
            if cut not in kept or s == self.base_n_win:
                kept[cut] = s
        return tuple(sorted(kept.values()))

    def shared_windows(self) -> tuple[Window, ...]:
        """Legal S when one serves all stages, each with its padding."""
        common = set.intersection(*(set(self.windows(i)) for i in self.routed))
        return tuple(
            Window(n_win=s, waste=tuple(self.stage(i, s, 1).padding_waste for i in self.routed))
            for s in sorted(common)
        )

    def topks(self, index: int, n_win: int) -> tuple[int, ...]:
        """Legal top-k of stage ``index`` at that S, rising; the last one may be all regions."""
        first = self.find_stage(index, n_win, 1)
        if first is None or first.problem is None:
            return ()
        problem, bounds = first.problem, self.bounds
        regions = problem.kv_regions
        if bounds.topks is not None:
            return (min(bounds.topks[index], regions),)
        if bounds.max_region_px is not None:
            stride = max(self.height / first.height, self.width / first.width)
            if max(problem.kv_region) * stride > bounds.max_region_px[index] * 1.001:
                return ()
        legal = {k for k in TOPK_LEVELS if k <= regions} | {regions}
        if n_win == self.base_n_win:
            legal.add(min(self.variant.topks[index], regions))
        if bounds.max_keys is not None:
            ceiling = min(max(bounds.max_keys[index] // problem.kv_region_tokens, 1), regions)
            legal = {k for k in legal if k <= ceiling} | {ceiling}
        if bounds.min_keys is not None:
            floor = math.ceil(bounds.min_keys[index] / problem.kv_region_tokens)
            if floor > regions:  # even full attention is below it: full attention is all there is
                floor = regions
            legal = {k for k in legal if k >= floor} | {max(floor, 1)}
            if bounds.floor_only:
                legal = {min(legal)}
        return tuple(sorted(legal))

    # --- settings ---------------------------------------------------------------------------

    def setting(
        self,
        n_win: int | Sequence[int],
        topks: Sequence[int],
        backends: str | Sequence[str] = "",
        configs: Sequence[str] = (),
        **knobs: str,
    ) -> Setting:
        """A setting in canonical form: top-k clipped to the regions, no backend where none is needed.

        Args:
            n_win: One S for all stages or one per stage.
            topks: One per stage.
            backends: One for all stages or one per stage.
            configs: One per stage, JSON.
            **knobs: ``regime`` and ``layout``.

        Raises:
            ProblemError: an S does not fit a stage.
        """
        count = len(self.variant.dims)
        sides = [n_win] * count if isinstance(n_win, int) else list(n_win)
        names = [backends] * count if isinstance(backends, str) else list(backends)
        extra = list(configs) or ["{}"] * count
        ks = list(topks)
        for i in range(count):
            if ks[i] > 0:
                problem = self.stage(i, sides[i], 1).problem
                assert problem is not None
                ks[i] = min(ks[i], problem.kv_regions)
                extra[i] = json.dumps(json.loads(extra[i]), sort_keys=True, separators=(",", ":"))
            else:
                names[i], extra[i] = "", "{}"
                sides[i] = sides[i - 1] if i else sides[i]
        return Setting(
            n_win=tuple(sides), topks=tuple(ks), backends=tuple(names), configs=tuple(extra), **knobs
        )

    def model_key(self, setting: Setting) -> str:
        """Text that is equal for settings that compute the same function.

        A stage that attends to all regions is full attention whatever its S, unless S pads the map: then
        the padded tokens differ.
        """
        parts = []
        for i, (s, k) in enumerate(zip(setting.n_win, setting.topks, strict=True)):
            stage = self.stage(i, s, k)
            full = k > 0 and stage.problem is not None and k == stage.problem.kv_regions
            parts.append("all" if full and not stage.padding_waste else f"{s}:{k}" if k > 0 else str(k))
        return "|".join(parts)

    def first_settings(self) -> dict[str, Setting]:
        """The settings that are tried before any other, by name, without backends.

        ``paper`` is the authors' for the task, ``constant-region`` has regions of as many pixels as theirs at
        224; it is left out where it is the same.
        """
        found = {"paper": self.setting(self.base_n_win, self.variant.topks)}
        scale = math.sqrt(self.height * self.width) / 224
        if self.bounds.n_win is None:
            side = self.nearest_window(7 * scale) if self._common else self.base_n_win
            found["constant-region"] = self.setting(side, self.variant.topks)
        kept: dict[str, Setting] = {}
        for name, setting in found.items():
            if setting.key not in {s.key for s in kept.values()}:
                kept[name] = setting
        return kept

    def model_choices(self, index: int) -> Iterator[tuple[int, int]]:
        """Every legal (S, top-k) of stage ``index``, coarse S first, small top-k first."""
        for s in self.windows(index):
            for k in self.topks(index, s):
                yield s, k


def prior_bounds(space: Space, reference: Setting, *, omega: float = 1.0) -> Bounds:
    """Floors that keep a setting from seeing less than a reference does, at the smallest top-k each.

    Args:
        space: Model and resolution.
        reference: Usually the authors' setting at this resolution.
        omega: Share of the reference's keys per query that is enough.
    """
    keys, sides = [], []
    for i, (s, k) in enumerate(zip(reference.n_win, reference.topks, strict=True)):
        problem = space.stage(i, s, k).problem if i in space.routed else None
        if problem is None:
            keys.append(0)
            sides.append(float(max(space.height, space.width)))
            continue
        height, width = space.variant.maps(space.height, space.width)[i]
        stride = max(space.height / height, space.width / width)
        # Padding can make a region's keys outnumber the map's real tokens; more than all is not a floor.
        keys.append(math.ceil(omega * min(problem.keys_per_query, height * width)))
        sides.append(max(problem.kv_region) * stride)
    return Bounds(min_keys=tuple(keys), max_region_px=tuple(sides), floor_only=True)


def checkpoint_bounds(
    space: Space, reference: Setting, *, allow_model_changes: bool = False, allow_more_k: bool = False
) -> Bounds:
    """Limits for weights that were trained with a setting.

    By default nothing that changes the model may change. More keys than in training are not offered
    either unless asked for: they can cost a network that was trained sparse many points of accuracy, and can
    gain it some (docs/tune.md).
    """
    if not allow_model_changes:
        return Bounds(n_win=reference.n_win, topks=reference.topks)
    if allow_more_k:
        return Bounds()
    keys = []
    for i, (s, k) in enumerate(zip(reference.n_win, reference.topks, strict=True)):
        problem = space.stage(i, s, k).problem if i in space.routed else None
        keys.append(0 if problem is None else problem.keys_per_query)
    return Bounds(max_keys=tuple(keys))

"""Setting: a complete answer of the search; Bounds: limits on the part of it that changes the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bratune.errors import UsageError

__all__ = ["FREE", "Bounds", "Setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A complete answer: what each stage runs.

    Attributes:
        n_win: Regions per side, one per stage (of no meaning in a stage that is not routed).
        topks: Top-k per stage, in official spelling (``-2``, ``-1``, ``0`` are kept).
        backends: Backend per stage; empty where the stage is not routed.
        configs: Settings of the backend per stage, as canonical JSON.
        regime: ``eager``, ``graph`` or ``compile``.
        layout: ``nhwc`` or ``nchw``.
    """

    n_win: tuple[int, ...]
    topks: tuple[int, ...]
    backends: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    regime: str = "eager"
    layout: str = "nchw"

    def __post_init__(self) -> None:
        count = len(self.n_win)
        put = object.__setattr__
        put(self, "backends", self.backends or ("",) * count)
        put(self, "configs", self.configs or ("{}",) * count)
        if not len(self.topks) == len(self.backends) == len(self.configs) == count:
            raise UsageError(f"a setting needs one value per stage ({count}) for each of its parts")

    @property
    def key(self) -> str:
        """Text that is equal for equal settings."""
        parts = [
            f"{s}:{k}:{b}:{c}" if k > 0 else str(k)
            for s, k, b, c in zip(self.n_win, self.topks, self.backends, self.configs, strict=True)
        ]
        return "|".join([*parts, self.regime, self.layout])

    def replace(self, **changes: Any) -> Setting:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Setting:
        """The inverse of `to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def __str__(self) -> str:
        routed = [i for i, k in enumerate(self.topks) if k > 0]
        sides = {self.n_win[i] for i in routed}
        text = f"S={'/'.join(str(self.n_win[i]) for i in routed) if len(sides) > 1 else sides.pop()}"
        text += f" k={'/'.join(str(self.topks[i]) for i in routed)}"
        names = [self.backends[i] for i in routed]
        if any(names):
            text += f" {names[0] if len(set(names)) == 1 else '/'.join(names)}"
        return text + (f" {self.regime}" if self.regime != "eager" else "")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits on what may change the model; None is no limit.

    Attributes:
        min_keys: Fewest keys per query and stage (0 where the stage is not routed).
        max_region_px: Longest side of a region per stage, in pixels of the image.
        max_keys: Most keys per query and stage.
        floor_only: Of the top-k that keep ``min_keys``, only the smallest: more would only cost more.
        n_win: The only S allowed, per stage.
        topks: The only top-k allowed, per stage.
    """

    min_keys: tuple[int, ...] | None = None
    max_region_px: tuple[float, ...] | None = None
    max_keys: tuple[int, ...] | None = None
    floor_only: bool = False
    n_win: tuple[int, ...] | None = None
    topks: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Bounds:
        """The inverse of `to_dict`."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


# No limits at all.
FREE = Bounds()

"""Encoding: settings as the parameters of an Optuna trial, and back.

S and top-k are ordinal (an index into the legal values), so that samplers know what lies next to what; the
choices of a study never depend on another parameter, which Optuna does not allow for categories. Several
parameter sets may stand for one setting: keys tell (`Setting.key`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bratune.tune.setting import Setting
from bratune.tune.space import Space

__all__ = ["Encoding"]


class Encoding:
    """How settings of a space are written as parameters.

    Args:
        space: What is legal.
        backends: Names that any stage may take.
        regimes: Regimes that a setting may have.
    """

    def __init__(self, space: Space, backends: Sequence[str], regimes: Sequence[str] = ("eager",)) -> None:
        self.space, self.backends, self.regimes = space, tuple(backends), tuple(regimes)
        routed = space.routed
        if space.per_stage:
            self.windows = {i: space.windows(i) for i in routed}
        else:
            shared = tuple(w.n_win for w in space.shared_windows())
            self.windows = dict.fromkeys(routed, shared)
        self.levels = max(len(space.topks(i, s)) for i in routed for s in self.windows[i])

    def _side_name(self, index: int) -> str:
        return f"n_win_{index + 1}" if self.space.per_stage else "n_win"

    def params(self, setting: Setting) -> dict[str, Any]:
        """The parameters of a setting; values that are not legal become the nearest legal ones."""
        found: dict[str, Any] = {}
        for i in self.space.routed:
            sides = self.windows[i]
            at = min(range(len(sides)), key=lambda j: abs(sides[j] - setting.n_win[i]))
            topks = self.space.topks(i, sides[at])
            level = min(range(len(topks)), key=lambda j: abs(topks[j] - setting.topks[i]))
            found[self._side_name(i)] = at
            found[f"level_{i + 1}"] = level
            found[f"backend_{i + 1}"] = setting.backends[i]
        if len(self.regimes) > 1:
            found["regime"] = setting.regime
        return found

    def suggest(self, trial: Any) -> Setting:
        """The setting that a trial proposes."""
        space = self.space
        sides = [space.base_n_win] * len(space.variant.dims)
        topks = list(space.variant.topks)
        names = [""] * len(sides)
        for i in space.routed:
            windows = self.windows[i]
            sides[i] = windows[trial.suggest_int(self._side_name(i), 0, len(windows) - 1)]
            legal = space.topks(i, sides[i])
            topks[i] = legal[min(trial.suggest_int(f"level_{i + 1}", 0, self.levels - 1), len(legal) - 1)]
            names[i] = trial.suggest_categorical(f"backend_{i + 1}", self.backends)
        regime = self.regimes[0]
        if len(self.regimes) > 1:
            regime = trial.suggest_categorical("regime", self.regimes)
        return space.setting(sides, topks, names, regime=regime)

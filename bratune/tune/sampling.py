"""Sampling: settings as the parameters of an Optuna trial, and the search by what a sampler proposes.

S and top-k are ordinal (an index into the legal values), so that samplers know what lies next to what; the
choices of a study never depend on another parameter, which Optuna does not allow for categories. Several
parameter sets may stand for one setting: keys tell (`Setting.key`).

The search by proposals serves where there is no table (``--no-lut``) or where the table predicts badly;
nothing is assumed about how stages add up. A setting that was measured before costs nothing: its trial
repeats the known values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bratune.tune.setting import Setting
from bratune.tune.space import Space
from bratune.tune.table import hypervolume

if TYPE_CHECKING:
    from bratune.tune.tuner import Tuner

__all__ = ["Encoding", "black_box"]


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


# The search ends when the last ten new settings gained less than this share of hypervolume.
GAIN, WINDOW = 0.005, 10
# It also ends after so many repeats in a row, or so many settings that no backend accepts.
REPEATS = 60


def black_box(tuner: Tuner) -> None:
    """Let the sampler propose settings until trials or time are spent, or nothing more is gained."""
    most, repeats, refusals = tuner.request.how_much.verify, 0, 0
    history: list[float] = []
    while tuner.time_left() and len(tuner.verified()) < most and max(repeats, refusals) < REPEATS:
        known = tuner.settings.by_key()
        trial, setting = tuner.settings.propose(tuner.encoding.suggest)
        # The key comes last: a trial with a key is queued again after a kill, and then needs its setting.
        trial.set_user_attr("setting", setting.to_dict())
        trial.set_user_attr("key", setting.key)
        done = known.get(setting.key)
        if done is not None:
            repeats += 1
            attrs = {k: v for k, v in done.user_attrs.items() if k in ("record", "setting", "evidence")}
            attrs["repeats"] = done.number
            if done.values is None:
                tuner.settings.prune(trial, "as before", constraints=done.constraints, **attrs)
            else:
                tuner.settings.complete(trial, done.values, constraints=done.constraints, **attrs)
            continue
        repeats = 0
        start = tuner.clock()
        refused = [
            i + 1
            for i in tuner.space.routed
            if setting.backends[i]
            not in [name for name, _ in tuner.bench.offered(i, setting.n_win[i], setting.topks[i])]
        ]
        if refused:  # known before measuring: the sampler learns it as a broken constraint
            reason = f"stage {refused[0]} is refused by {setting.backends[refused[0] - 1]}"
            tuner.settings.prune(trial, reason, constraints={"unsupported": float(len(refused))})
            refusals += 1
            continue
        try:
            text = tuner.measure_setting(trial, setting)
        except BaseException:
            tuner.settings.release(trial)
            raise
        tuner.pace.note("setting", tuner.clock() - start)
        left = most - len(tuner.verified())
        best = min((v.ms for v in tuner.verified() if v.feasible), default=float("nan"))
        tuner.say(" · ".join(filter(None, [text, f"best {best:.3f} ms", tuner.pace.eta("setting", left)])))
        history.append(_volume(tuner))
        if len(history) > WINDOW and history[-1] <= history[-1 - WINDOW] * (1 + GAIN):
            tuner.say(f"the last {WINDOW} new settings gained less than {GAIN:.1%} of hypervolume: enough")
            return


def _volume(tuner: Tuner) -> float:
    """Hypervolume of the feasible settings below twice the default's costs."""
    default = tuner.find(tuner.reference)
    if default is None:
        return 0.0
    by_loss = tuner.second == "loss"
    ceiling = 1.0 if by_loss else 2.0 * (default.memory_mb or 1.0)
    points = [
        (v.ms, (v.loss or 0.0) if by_loss else (v.memory_mb or 0.0)) for v in tuner.verified() if v.feasible
    ]
    return hypervolume(points, (2.0 * default.ms, ceiling))

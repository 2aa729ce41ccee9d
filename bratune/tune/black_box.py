"""Black-box search: a sampler proposes whole settings; nothing is assumed about how stages add up.

It serves where there is no table (``--no-lut``) or where the table predicts badly. A setting that was
measured before costs nothing: its trial repeats the known values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bratune.tune.front import hypervolume

if TYPE_CHECKING:
    from bratune.tune.tuner import Tuner

__all__ = ["black_box"]

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

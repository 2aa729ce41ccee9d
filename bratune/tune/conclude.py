"""Conclude: pick, compare with the default, and write down what came out.

The plan is the pick only where the comparison shows that it is faster (or, for ``lightest``, smaller) and its
divergence keeps the limit; else it is the default, with the reason.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from bratune.errors import UsageError
from bratune.record import Record, utc_now
from bratune.tune.evidence import Evidence, prior_only
from bratune.tune.guard import Fresh, challenge
from bratune.tune.lost_accuracy import ALLOWED_LOSS
from bratune.tune.pick import Verified, acceptable, pick
from bratune.tune.plan import EndToEnd, Plan, stage_plans
from bratune.tune.setting import Setting
from bratune.tune.table import Entry
from bratune.tune.tuner import Tuner
from bratune.variant import stages

__all__ = ["conclude", "front_rows"]


def conclude(tuner: Tuner, fresh: Fresh, *, command: str = "", complete: bool = True) -> Plan:
    """The plan of a finished or interrupted search.

    Args:
        tuner: After `Tuner.search`.
        fresh: Makes engines for the comparison; see `bratune.tune.guard`.
        command: What makes this plan again.
        complete: The search ran to its end.

    Raises:
        UsageError: the default itself could not be measured.
    """
    default = tuner.find(tuner.reference)
    if default is None:
        tried = tuner.settings.by_key().get(tuner.reference.key)
        why = tried.user_attrs.get("reason", "") if tried else _why_not_tried(tuner)
        raise UsageError(
            f"the default {tuner.reference} could not be measured, so nothing can be compared with it: {why}"
        )
    limits = tuner.fidelity.limits if tuner.fidelity is not None and tuner.second == "loss" else None
    rule = tuner.request.pick
    if limits is None and rule in ("safe", "balanced", "fast"):
        rule = "fastest"  # the model is the reference's, or its floors hold: only cost is left to choose by
    found = pick(rule, tuner.verified(), limits=limits, confidence=tuner.request.confidence)
    chosen, outcome, reason = _decide(tuner, fresh, default, found.chosen, found.reason, rule)
    setting = chosen.setting
    request = tuner.request
    parts = stages(
        tuner.space.variant,
        tuner.space.height,
        tuner.space.width,
        batch=tuner.space.batch,
        n_win=setting.n_win,
        topks=setting.topks,
        dtype=tuner.space.dtype,
        direction=tuner.space.direction,
    )
    error = tuner.error()
    return Plan(
        model=request.model,
        task=request.task,
        height=request.height,
        width=request.width,
        batch=request.batch,
        dtype=request.dtype,
        amp=request.amp,
        direction=request.direction,
        l2=request.l2,
        setting=setting.replace(layout=request.layout),
        default=tuner.reference.replace(layout=request.layout),
        stages=stage_plans(setting, parts, _stage_times(tuner, setting)),
        end_to_end=outcome,
        evidence=evidence_of(tuner, chosen),
        machine=tuner.engine.machine,
        reason=reason,
        measured=_how_measured(tuner),
        table_error=_finite(dataclasses.asdict(error)) if error.n else {"n": 0},
        diagnostics=_diagnostics(tuner, setting),
        created_utc=utc_now(),
        command=command,
        study=tuner.settings.name,
        seed=request.seed,
        complete=complete,
    )


def _why_not_tried(tuner: Tuner) -> str:
    """Why a search ended before the default was measured."""
    deaths = tuner.settings.deaths(tuner.reference.key)
    lost = f"{deaths} worker(s) died while measuring it; " if deaths else ""
    if tuner.request.budget_s:
        return f"{lost}the budget of {tuner.request.budget_s:g} s ended first; a larger one would help"
    if tuner.settings.busy_elsewhere():
        return f"{lost}another worker has it; the same command goes on"
    return f"{lost}the search ended before its turn; the same command goes on"


def _decide(
    tuner: Tuner, fresh: Fresh, default: Verified, chosen: Verified, reason: str, rule: str
) -> tuple[Verified, EndToEnd, str]:
    if chosen.setting.key == default.setting.key:
        rival = _rival(tuner, default, rule)
        if rival is None:
            outcome = EndToEnd(
                default_ms=default.ms,
                verdict="default kept",
                reason="the default is the pick, and no other may be as fast: nothing to compare",
            )
            return default, outcome, reason
        chosen, reason = rival, "as fast as the default within the noise of the search"
    bench, rounds = tuner.bench, tuner.request.how_much.rounds
    tuner.say(f"comparing {chosen.setting} with the default in {rounds} fresh processes")
    outcome = challenge(bench.model_cell(default.setting), bench.model_cell(chosen.setting), fresh, rounds)
    tuner.say(outcome.reason)
    if outcome.verdict == "faster" or rule.startswith("trial:"):
        return chosen, outcome, reason
    lighter = (chosen.memory_mb or 0.0) < (default.memory_mb or 0.0)
    if rule == "lightest" and lighter and outcome.speedup_ci:
        return chosen, outcome, f"{reason}; slower or not faster than the default"
    kept = f"the default is kept: {chosen.setting} was compared with it ({reason}), but {outcome.reason}"
    return default, dataclasses.replace(outcome, tuned_ms=outcome.default_ms), kept


def _rival(tuner: Tuner, default: Verified, rule: str) -> Verified | None:
    """What would be picked were it not for the default, where the search cannot tell which is faster."""
    if rule not in ("fastest", *ALLOWED_LOSS):
        return None
    limits = tuner.fidelity.limits if tuner.fidelity is not None and tuner.second == "loss" else None
    feasible = [v for v in tuner.verified() if v.feasible]
    if limits is not None and rule in limits:
        feasible = acceptable(feasible, limits[rule], tuner.request.confidence)
    others = [v for v in feasible if v.setting.key != default.setting.key and v.ci[0] <= default.ci[1]]
    return min(others, key=lambda v: (v.ms, v.trial), default=None)


def evidence_of(tuner: Tuner, chosen: Verified) -> Evidence:
    """What is known about the accuracy of a verified setting."""
    trial = tuner.settings.by_key().get(chosen.setting.key)
    if trial is not None and "evidence" in trial.user_attrs:
        return Evidence.from_dict(trial.user_attrs["evidence"])
    reference = tuner.request.reference
    same = tuner.space.model_key(chosen.setting) == tuner.space.model_key(reference)
    return prior_only(unchanged=same, omega=tuner.request.omega)


def _diagnostics(tuner: Tuner, setting: Setting) -> dict[str, Any]:
    """The recall of the plan and of the reference, where there are weights and pictures to look at."""
    from bratune.tune.checkpoint_fidelity import CheckpointFidelity

    if not isinstance(tuner.fidelity, CheckpointFidelity):
        return {}
    looked_at = {"plan": setting, "reference": tuner.reference}
    recall = {
        name: [dataclasses.asdict(layer) for layer in tuner.fidelity.recall(one)]
        for name, one in looked_at.items()
    }
    return {"recall": recall}


def _stage_times(tuner: Tuner, setting: Setting) -> dict[int, dict[str, Any]]:
    """Default and tuned times of each routed stage, by its number from 1."""
    records = {t.user_attrs["key"]: t for t in tuner.cells.trials("COMPLETE")}
    complete = not tuner.cells.trials("WAITING")
    found: dict[int, dict[str, Any]] = {}
    for i in tuner.space.routed:
        rows = []
        for s in (tuner.reference, setting):
            entry = Entry(
                stage=i, n_win=s.n_win[i], topk=s.topks[i], backend=s.backends[i], config=s.configs[i]
            )
            trial = records.get(tuner.bench.block_cell(entry).cell_id)
            rows.append(None if trial is None else Record.from_dict(trial.user_attrs["record"]))
        default, own = rows
        blocks = tuner.space.variant.depths[i]
        values: dict[str, Any] = {"complete": complete}
        if default is not None and default.median_ms is not None:
            values["default_ms"] = blocks * default.median_ms
        if own is not None and own.median_ms is not None:
            values |= {"tuned_ms": blocks * own.median_ms, "n": own.n_samples}
            if own.ci_lo_ms is not None and own.ci_hi_ms is not None:
                values["ci"] = (blocks * own.ci_lo_ms, blocks * own.ci_hi_ms)
        found[i + 1] = values
    return found


def _how_measured(tuner: Tuner) -> str:
    kinds = {t.user_attrs["record"].get("evidence", "measured") for t in tuner.settings.trials("COMPLETE")}
    return next((kind for kind in ("modelled", "replayed") if kind in kinds), "measured")


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v == v}  # NaN has no place in JSON


def front_rows(tuner: Tuner, plan: Plan) -> list[dict[str, Any]]:
    """Every verified setting as a row, by rising latency, with its evidence and its part in the story."""
    from bratune.tune.front import Point, pareto

    verified = sorted(tuner.verified(), key=lambda v: (v.ms, v.trial))

    def second(v: Verified) -> float:
        return (v.loss if tuner.second == "loss" else v.memory_mb) or 0.0

    front = {p.item for p in pareto(Point((v.ms, second(v)), v.trial) for v in verified if v.feasible)}
    names = {s.key: name for name, s in reversed(tuner.named().items())}
    rows = []
    for v in verified:
        rows.append(
            {
                "trial": v.trial,
                "setting": str(v.setting),
                "name": names.get(v.setting.key, ""),
                "ms": v.ms,
                "ci_ms": list(v.ci),
                "predicted_ms": v.predicted_ms,
                "images_per_s": 1e3 * tuner.request.batch / v.ms,
                "peak_alloc_mb": v.memory_mb,
                "divergence": v.loss,
                "evidence": str(evidence_of(tuner, v)),
                "feasible": v.feasible,
                "front": v.trial in front,
                "picked": v.setting.key == plan.setting.key,
            }
        )
    return rows

"""Conclude: pick, compare with the default and the published form, and write down what came out.

The plan is the pick, or one that the search cannot tell from it, only where the closing comparison shows that
it is faster (or, for ``lightest``, smaller) and its divergence keeps the limit; else it is the default, with
the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bratune.cell import Cell
from bratune.errors import UsageError
from bratune.measure.verdict import Verdict
from bratune.record import Record, utc_now
from bratune.run.passes import disturbance
from bratune.tune.closing import Closing, compare
from bratune.tune.evidence import Evidence, agreement, measured_top1, prior_only
from bratune.tune.lost_accuracy import ALLOWED_LOSS, CONFIDENCE, Counts, change_interval
from bratune.tune.pick import Pick, Verified, acceptable, pick
from bratune.tune.plan import EndToEnd, Plan, stage_plans
from bratune.tune.setting import Setting
from bratune.tune.table import Entry
from bratune.tune.tuner import GATHER, Tuner

__all__ = ["conclude", "front_rows"]


# Candidates of the closing comparison: each takes its share of every pass.
CANDIDATES = 3
# Two processes that time the same model differ by a tenth, and so may two settings that are equally fast.
SEARCH_NOISE = 0.1
# Passes that are made of a comparison even where the budget is spent: two say little of their own scatter.
LEAST_PASSES = 3


def conclude(tuner: Tuner, *, command: str = "", complete: bool = True) -> Plan:
    """The plan of a finished or interrupted search.

    Args:
        tuner: After `Tuner.search`.
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
    chosen, outcome, reason = _decide(tuner, default, found, rule, complete=complete)
    setting = chosen.setting
    request = tuner.request
    parts = tuner.space.stages_of(setting)
    error = tuner.error()
    return Plan(
        **request.question,
        setting=setting.replace(layout=request.layout),
        default=tuner.reference.replace(layout=request.layout),
        stages=stage_plans(setting, parts, _stage_times(tuner, setting)),
        end_to_end=outcome,
        evidence=_evidence_of_the_pick(tuner, chosen, rule),
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
    tuner: Tuner, default: Verified, found: Pick, rule: str, *, complete: bool
) -> tuple[Verified, EndToEnd, str]:
    """What becomes the plan, how it compares end to end, and why."""
    candidates = _candidates(tuner, default, found.chosen, rule)
    bench = tuner.bench
    base, cells = bench.model_cell(default.setting), [bench.model_cell(v.setting) for v in candidates]
    official = bench.published_cell(tuner.reference)
    closing = _compare(tuner, base, dict(zip(cells, candidates, strict=True)), official)
    best = closing.fastest()
    chosen, reason = default, found.reason
    if best is not None:
        chosen = candidates[cells.index(best)]
    elif candidates and _stands_anyway(found.chosen, default, closing.verdicts.get(cells[0]), rule):
        chosen, reason = found.chosen, f"{found.reason}; it is not shown to be faster than the default"
    if chosen is not default and chosen is not found.chosen:
        reason = f"fastest of {len(candidates)} that the search could not tell apart ({found.reason})"
    if chosen is default and candidates:
        told = "; ".join(f"{v.setting} is {closing.words(c)}" for c, v in zip(cells, candidates, strict=True))
        reason = f"the default is kept, nothing is shown to be faster: {told}"
    elif chosen is default:
        reason = found.reason if complete else f"of what was measured, the default is fastest; {_open(tuner)}"
    busy = disturbance(row for rows in closing.rows.values() for row in rows)
    reason = "; ".join(filter(None, [reason, busy]))
    return chosen, _end_to_end(closing, base, bench.model_cell(chosen.setting), official), reason


def _compare(tuner: Tuner, base: Cell, candidates: Mapping[Cell, Verified], official: Cell | None) -> Closing:
    names = [str(v.setting) for v in candidates.values()] + (["the published form"] if official else [])
    if not names:
        return Closing({})
    passes = tuner.request.how_much.passes
    tuner.say(f"comparing with the default, in turn in {passes} fresh processes: {', '.join(names)}")
    pace = tuner.pace
    closing = compare(
        tuner.engine,
        base,
        list(candidates),
        official,
        passes,
        enough=lambda made: made >= LEAST_PASSES and pace.left() <= 0,
    )
    for cell, candidate in candidates.items():
        tuner.say(f"{candidate.setting}: {closing.words(cell)}")
    return closing


def _end_to_end(closing: Closing, base: Cell, chosen: Cell, official: Cell | None) -> EndToEnd:
    times, own = closing.times, chosen != base
    verdict = closing.verdicts.get(chosen)
    return EndToEnd(
        published=times.get(official) if official else None,
        default=times.get(base),
        tuned=times.get(chosen),
        passes=closing.passes,
        verdict=verdict.verdict if verdict and own else None,
        speedup_vs_default=closing.speedup(chosen) if own else None,
        speedup_vs_published=closing.speedup_over(chosen, official) if official else None,
        reason=closing.words(chosen) if own else "the plan is the default",
    )


def _candidates(tuner: Tuner, default: Verified, chosen: Verified, rule: str) -> list[Verified]:
    """Who may replace the default: the pick, and what the search cannot tell from the fastest.

    Gather-then-dense everywhere, which the published form stands for anyway, is there only as the pick.
    """
    found = [] if chosen.setting.key == default.setting.key else [chosen]
    if rule not in ("fastest", *ALLOWED_LOSS):
        return found
    limits = tuner.fidelity.limits if tuner.fidelity is not None and tuner.second == "loss" else None
    feasible = [v for v in tuner.verified() if v.feasible]
    if limits is not None and rule in limits:
        feasible = acceptable(feasible, limits[rule], tuner.request.confidence)
    gather = tuner.named().get(GATHER, default.setting)
    out = {default.setting.key, gather.key, chosen.setting.key}
    limit = (1 + SEARCH_NOISE) * min(chosen.ms, default.ms)
    others = [v for v in feasible if v.setting.key not in out and v.ms <= limit]
    return [*found, *sorted(others, key=lambda v: (v.ms, v.trial))][:CANDIDATES]


def _stands_anyway(chosen: Verified, default: Verified, verdict: Verdict | None, rule: str) -> bool:
    """Whether a pick that is not shown to be faster becomes the plan all the same."""
    if chosen.setting.key == default.setting.key:
        return False
    lighter = (chosen.memory_mb or 0.0) < (default.memory_mb or 0.0)
    return (
        rule.startswith("trial:")
        or not default.feasible
        or (rule == "lightest" and lighter and verdict is not None)
    )


def _open(tuner: Tuner) -> str:
    """What an unfinished search has not looked at."""
    cells, settings = (len(ledger.trials("WAITING")) for ledger in (tuner.cells, tuner.settings))
    return f"the search is unfinished: {cells} stage options and {settings} settings were not measured"


def evidence_of(tuner: Tuner, chosen: Verified) -> Evidence:
    """What is known about the accuracy of a verified setting."""
    trial = tuner.settings.by_key().get(chosen.setting.key)
    if trial is not None and "evidence" in trial.user_attrs:
        return Evidence.from_dict(trial.user_attrs["evidence"])
    reference = tuner.request.reference
    same = tuner.space.model_key(chosen.setting) == tuner.space.model_key(reference)
    return prior_only(unchanged=same, omega=tuner.request.omega)


def _evidence_of_the_pick(tuner: Tuner, chosen: Verified, rule: str) -> Evidence:
    """What a plan says: where a rule looked at what others lose too, the limits hold for all of them."""
    found = evidence_of(tuner, chosen)
    among = sum(v.feasible and v.counts is not None for v in tuner.verified())
    if rule not in ALLOWED_LOSS or chosen.counts is None or among < 2:
        return found
    return shared(found, chosen.counts, among)


def shared(found: Evidence, counts: Counts, among: int) -> Evidence:
    """What is known of a setting that was chosen by what it loses among others on the same images.

    Args:
        found: E2 or E3, as if it had been the only one.
        counts: Of its answers.
        among: Settings that were judged.
    """
    known: dict[str, Any] = dict(found.values)
    known["most_lost"] = counts.most_lost(known["confidence"], among=among)
    names = ["images", "most_lost", "confidence"]
    if counts.lost is not None and counts.gained is not None:
        each = 1 - (1 - CONFIDENCE) / among
        interval = change_interval(counts.gained, counts.lost, counts.images, confidence=each)
        taken = {name: known[name] for name in (*names, "change", "top1")}
        again = measured_top1(interval=interval, **taken)
    else:
        taken = {name: known[name] for name in (*names, "agree", "kl")}
        (low, high), (kl_low, kl_high) = known["agreement_interval"], known["kl_interval"]
        again = agreement(bound=(low, high), kl_interval=(kl_low, kl_high), **taken)
    text = f"{again.text}; chosen among {among} on these images, with limits that hold for all of them"
    return Evidence(level=found.level, text=text, values={**known, **again.values, "among": among})


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
    from bratune.tune.table import Point, pareto

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
                "ci_ms": list(v.ci) if v.ci else None,
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

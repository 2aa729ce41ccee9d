"""The study of the tuner's regret, in a world whose truth is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from recorded import NAMES, Recorder

from bratune.studies import coverage
from bratune.studies.regret import plans_of, regrets_of, settings_of, stored_regrets
from bratune.tune.bench import Bench, registry_offers
from bratune.tune.evidence import prior_only
from bratune.tune.plan import EndToEnd, Plan, stage_plans
from bratune.tune.request import TuneRequest
from bratune.tune.setting import Setting
from bratune.tune.synthetic import MACHINE, SyntheticWorld

REQUEST = TuneRequest(
    model="biformer_tiny",
    task="classification",
    height=224,
    width=224,
    batch=8,
    dtype="bfloat16",
    backends=NAMES,
)


def bench(world: SyntheticWorld) -> Bench:
    return Bench(world, REQUEST, registry_offers(MACHINE, NAMES))


def plan(seed: int, setting: Setting, default: Setting) -> Plan:
    return Plan(
        **REQUEST.question,
        setting=setting,
        default=default,
        stages=stage_plans(setting, REQUEST.space.stages_of(setting), {}),
        end_to_end=EndToEnd(),
        evidence=prior_only(unchanged=True),
        machine=MACHINE,
        seed=seed,
        command=" ".join(["bratune tune", *(f"--backend {name}" for name in NAMES)]),
    )


def test_regret_is_what_a_plan_takes_beyond_the_best_swap(tmp_path: Path) -> None:
    world = Recorder(tmp_path / "truth" / "records.jsonl")
    settings = settings_of(bench(world), ())
    default = settings[0]
    assert len(settings) == 1 + 3 * (len(NAMES) - 1)  # every other backend in each of three stages
    times = {setting.key: world.model_ms(REQUEST.space, setting) for setting in settings}
    best = min(times.values())
    plans = [plan(seed, setting, default) for seed, setting in enumerate(settings)]
    for one in plans:
        one.save(tmp_path / f"tune-{one.seed}" / "plan.json")
    assert plans_of(tmp_path) == plans
    rows = regrets_of(world, plans, 4)
    assert [row.regret for row in rows] == pytest.approx([times[s.key] / best - 1 for s in settings])
    assert rows[0].verdict == ""
    assert {row.verdict for row in rows[1:]} <= {"FASTER", "SLOWER", "SAME", "UNDECIDED"}
    assert stored_regrets(tmp_path) == rows  # without measuring again
    result = CliRunner().invoke(coverage.main, ["show", "-o", str(tmp_path)], catch_exceptions=False)
    within = sum(times[s.key] <= 1.03 * best for s in settings)
    slower = sum(row.verdict == "SLOWER" for row in rows)
    assert (
        f"regret of {within} of {len(rows)} plans at most 3 %, {slower} slower than the default"
        in result.output
    )
    assert json.loads((tmp_path / "coverage-study.json").read_text())["tune"]["within"] == within


def test_a_plan_outside_the_swaps_is_part_of_the_truth() -> None:
    world = SyntheticWorld(seed=1, noise=0.0)
    default = settings_of(bench(world), ())[0]
    other = dataclasses.replace(default, backends=("dense", "dense", "dense", ""))
    assert other in settings_of(bench(world), [plan(0, other, default)])

"""A whole tuning run in a synthetic world: found, never worse, resumable, shared, honest about its table."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bratune.cell import Cell
from bratune.errors import UsageError
from bratune.record import Record
from bratune.tune.conclude import conclude, front_rows
from bratune.tune.encoding import Encoding
from bratune.tune.fidelity_source import FidelitySource
from bratune.tune.finalists import Final
from bratune.tune.guard import judged
from bratune.tune.plan import Plan, load_plan
from bratune.tune.request import Request
from bratune.tune.synthetic import BACKENDS, SyntheticFidelity, SyntheticWorld, offers
from bratune.tune.tuner import Tuner


def request(**changes: Any) -> Request:
    return Request(
        **{
            "model": "biformer_tiny",
            "task": "classification",
            "height": 224,
            "width": 224,
            "batch": 8,
            "dtype": "bfloat16",
            "effort": "quick",
            **changes,
        }
    )


def tuner(folder: Path, world: Any, asked: Request, *, kind: str = "journal", **more: Any) -> Tuner:
    url = f"{kind}:///{folder}/study.{kind}"
    fidelity: FidelitySource | None = None
    if asked.second == "loss":
        fidelity = SyntheticFidelity(asked.space, asked.reference, seed=1)
    return Tuner(world, asked, url, offers=offers, fidelity=fidelity, **more)


def tune(folder: Path, world: Any, asked: Request, **more: Any) -> Plan:
    worker = tuner(folder, world, asked, **more)
    worker.search()
    return end(worker)


def end(worker: Tuner, **more: Any) -> Plan:
    """Conclude, the comparison on the engine of the search."""
    return conclude(worker, lambda: contextlib.nullcontext(worker.engine), **more)


WITH_WEIGHTS = {"checkpoint": "w.pth", "images": "d"}


def test_without_data_the_fastest_setting_above_the_floors_is_found(tmp_path: Path) -> None:
    world, asked = SyntheticWorld(seed=1), request()
    plan = tune(tmp_path, world, asked)
    space = asked.space
    truths = [
        world.model_ms(
            space, space.setting(s.n_win, [space.topks(i, s.n_win)[0] for i in space.routed] + [-2], names)
        )
        for s in space.shared_windows()
        for names in itertools.product(BACKENDS, repeat=3)
        for names in [(*names, "")]
    ]
    assert world.model_ms(space, plan.setting) <= 1.1 * min(truths)
    assert plan.end_to_end.verdict == "faster"
    assert plan.end_to_end.speedup_ci is not None
    assert plan.end_to_end.speedup_ci[0] > 1
    assert plan.evidence.level == "E0"
    assert plan.measured == "modelled"


@pytest.mark.parametrize("seed", range(6))
def test_default_is_kept_when_nothing_is_to_be_gained(tmp_path: Path, seed: int) -> None:
    world = SyntheticWorld(seed=seed, equal=True, noise=0.03)
    plan = tune(tmp_path, world, request())
    assert plan.end_to_end.verdict == "default kept"
    assert plan.setting == plan.default


def test_weights_alone_change_only_the_cost(tmp_path: Path) -> None:
    plan = tune(tmp_path, SyntheticWorld(seed=1), request(**WITH_WEIGHTS))
    assert (plan.n_win, plan.topks) == (plan.default.n_win, plan.default.topks)
    assert plan.setting != plan.default
    assert "the function is the same" in plan.evidence.text


def test_with_images_and_permission_the_pick_keeps_the_divergence_limit(tmp_path: Path) -> None:
    asked = request(**WITH_WEIGHTS, allow_model_changes=True, pick="safe", effort="standard")
    worker = tuner(tmp_path, SyntheticWorld(seed=1), asked)
    worker.search()
    plan = end(worker)
    found = worker.find(plan.setting)
    assert found is not None
    assert found.loss is not None
    assert found.loss <= 0.003
    assert plan.evidence.level == "E2"
    assert all(k <= own for k, own in zip(plan.topks[:3], (1, 4, 16), strict=True) if plan.n_win[0] == 7)
    rows = front_rows(worker, plan)
    assert [row["ms"] for row in rows] == sorted(row["ms"] for row in rows)
    assert sum(row["picked"] for row in rows) == 1


def test_table_error_is_measured_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    plan = tune(tmp_path, SyntheticWorld(seed=2), request(), say=said.append)
    assert plan.table_error["n"] >= 2
    assert 0 < plan.table_error["mape"] < 0.5
    assert any(line.startswith("table error over") for line in said)


def test_table_that_predicts_badly_hands_over_to_the_sampler(tmp_path: Path) -> None:
    said: list[str] = []
    world = SyntheticWorld(seed=3, coupling=0.9)
    tune(tmp_path, world, request(effort="standard"), say=said.append)
    assert any("the sampler takes over" in line for line in said)


def test_constraint_keeps_settings_out_of_the_pick(tmp_path: Path) -> None:
    worker = tuner(tmp_path, SyntheticWorld(seed=1), request())
    worker.search()
    fastest = min(v.ms for v in worker.verified())
    asked = request(constraints=(f"median_ms>={1.05 * fastest}",))
    worker = tuner(tmp_path, SyntheticWorld(seed=1), asked)
    worker.search()
    chosen = worker.find(end(worker).setting)
    assert chosen is not None
    assert chosen.ms >= 1.05 * fastest
    assert any(not v.feasible for v in worker.verified())


def test_constant_region_setting_is_shown_but_not_picked_below_the_floors(tmp_path: Path) -> None:
    asked = request(task="segmentation", height=512, width=512, batch=1)
    worker = tuner(tmp_path, SyntheticWorld(), asked)
    worker.search()
    own = worker.find(worker.named()["constant-region"])
    assert own is not None
    assert not own.feasible
    names = [t.user_attrs["name"] for t in worker.settings.trials()][:2]
    assert names == ["default", "constant-region"]


def test_cells_out_of_memory_are_pruned_and_the_rest_goes_on(tmp_path: Path) -> None:
    world = SyntheticWorld(seed=1, memory_gb=0.35)
    worker = tuner(tmp_path, world, request(batch=32))
    worker.search()
    pruned = worker.cells.trials("PRUNED")
    assert pruned
    assert all(t.constraints == {"memory": 1.0} for t in pruned)
    assert worker.table.entries


class Killed(BaseException):
    """A signal in the middle of a measurement."""


class Fragile:
    """An engine that is interrupted at one measurement."""

    def __init__(self, world: SyntheticWorld, at: int) -> None:
        self.world, self.left = world, at
        self.machine = world.machine

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        for cell in cells:
            self.left -= 1
            if self.left == 0:
                raise Killed
            yield from self.world.run([cell])


@pytest.mark.parametrize("at", [1, 5, 20, 30])
def test_interrupted_run_goes_on_and_ends_like_an_undisturbed_one(tmp_path: Path, at: int) -> None:
    whole = tune(tmp_path / "whole", SyntheticWorld(seed=4, noise=0.0), request())
    world = SyntheticWorld(seed=4, noise=0.0)
    with pytest.raises(Killed):
        tune(tmp_path / "torn", Fragile(world, at), request())
    resumed = tune(tmp_path / "torn", world, request())
    assert resumed.setting == whole.setting
    searched = [c.cell_id for c in world.measured if c.part == "block"]
    assert len(searched) == len(set(searched))  # nothing was measured twice


def test_same_request_again_measures_only_the_comparison(tmp_path: Path) -> None:
    tune(tmp_path, SyntheticWorld(seed=1), request())
    world = SyntheticWorld(seed=1)
    tune(tmp_path, world, request())
    assert {c.part for c in world.measured} == {"model"}
    assert len(world.measured) == 12  # six rounds of two


def test_stage_options_are_shared_by_requests_with_other_limits(tmp_path: Path) -> None:
    tune(tmp_path, SyntheticWorld(seed=1), request(effort="standard"))
    world = SyntheticWorld(seed=1)
    tune(tmp_path, world, request(constraints=("peak_alloc_mb<=90000",), effort="standard"))
    assert not [c for c in world.measured if c.part == "block"]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random", "brute"])
def test_search_without_a_table_measures_whole_models_only(tmp_path: Path, sampler: str) -> None:
    world = SyntheticWorld(seed=1)
    asked = request(table=False, sampler=sampler, trials=12)
    worker = tuner(tmp_path, world, asked)
    worker.search()
    plan = end(worker)
    assert {c.part for c in world.measured} == {"model"}
    assert 3 <= len(worker.verified()) <= 12
    assert plan.end_to_end.verdict == "faster"
    keys = [v.setting.key for v in worker.verified()]
    assert len(keys) == len(set(keys))


def test_budget_stops_the_search_and_keeps_what_is_there(tmp_path: Path) -> None:
    ticks = itertools.count()
    said: list[str] = []
    asked = request(budget_s=60.0)
    worker = tuner(tmp_path, SyntheticWorld(seed=1), asked, clock=lambda: float(next(ticks)), say=said.append)
    worker.search()
    plan = end(worker, complete=False)
    assert any("stay queued for the next run" in line for line in said)
    assert not plan.complete
    assert worker.cells.trials("WAITING")


def test_plan_of_a_run_reads_back(tmp_path: Path) -> None:
    plan = tune(tmp_path, SyntheticWorld(seed=1), request(effort="standard"))
    assert load_plan(plan.save(tmp_path / "plan.json")) == plan
    assert plan.stages[2].tuned_ms is not None
    assert plan.stages[3].kind == "full"


def test_study_of_another_machine_is_refused(tmp_path: Path) -> None:
    tune(tmp_path, SyntheticWorld(), request(), study="shared")
    other = SyntheticWorld()
    machine = type(other.machine)(**{**other.machine.to_dict(), "sm_count": 66})
    moved = Fragile(other, 10**9)
    moved.machine = machine
    with pytest.raises(UsageError, match="was measured on sm90-132sm-80gib and this is sm90-66sm-80gib"):
        tuner(tmp_path, moved, request(), study="shared")


def _help(folder: str) -> None:
    tuner(Path(folder), SyntheticWorld(seed=1), request()).help(patience_s=3.0)


@pytest.mark.slow
def test_workers_that_join_share_the_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=_help, args=(str(tmp_path),)) for _ in range(2)]
    worker = tuner(tmp_path, SyntheticWorld(seed=1), request())
    for helper in helpers:
        helper.start()
    worker.search()
    plan = end(worker)
    for helper in helpers:
        helper.join()
    assert [h.exitcode for h in helpers] == [0, 0]
    done = [t.user_attrs["key"] for t in worker.cells.trials("COMPLETE")]
    assert len(done) == len(set(done))
    assert plan.end_to_end.verdict == "faster"


@pytest.mark.parametrize(
    ("model", "size"),
    [("biformer_tiny", (224, 224)), ("biformer_stl", (224, 224)), ("biformer_small", (512, 512))],
)
def test_encoding_gives_back_the_setting(model: str, size: tuple[int, int]) -> None:
    import optuna

    asked = request(model=model, height=size[0], width=size[1])
    space = asked.free_space
    encoding = Encoding(space, tuple(BACKENDS))
    for name, setting in space.first_settings().items():
        whole = space.setting(setting.n_win, setting.topks, "dense")
        params = encoding.params(whole)
        assert encoding.suggest(optuna.trial.FixedTrial(params)) == whole, name


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("faster", "faster"),
        ("same", "default kept"),
        ("ambiguous", "default kept"),
        ("slower", "default kept"),
    ],
)
def test_only_a_confirmed_gain_replaces_the_default(verdict: str, expected: str) -> None:
    cell = Cell(part="model", problem=request().space.stage(0, 7, 1).problem)  # type: ignore[arg-type]
    final = Final(
        candidate=cell,
        default=cell,
        candidate_ms=(1.0,) * 6,
        default_ms=(1.1,) * 6,
        speedup=1.1,
        ci_lo=1.05,
        ci_hi=1.2,
        confidence=0.95,
        verdict=verdict,
    )
    assert judged(final).verdict == expected


def test_comparison_without_a_time_decides_nothing() -> None:
    cell = Cell(part="model", problem=request().space.stage(0, 7, 1).problem)  # type: ignore[arg-type]
    found = judged(Final(candidate=cell, default=cell, reason="the candidate is oom"))
    assert (found.verdict, found.reason) == ("not compared", "the candidate is oom")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "fidelity"}, "needs something to measure it on"),
        ({"effort": "heroic"}, "quick, standard, full"),
        ({"constraints": ("x<=1",)}, "no number of a record is called"),
    ],
)
def test_requests_that_cannot_be_met_say_why(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        request(**changes)


def test_request_survives_json() -> None:
    asked = request(**WITH_WEIGHTS, constraints=("peak_alloc_mb<=1",), trained_topks=(1, 4, 16, -2))
    assert Request.from_dict(asked.to_dict()) == asked


def test_where_many_cells_run_at_a_time_the_table_is_measured_together(tmp_path: Path) -> None:
    class Wide(SyntheticWorld):
        slots = 4

        def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
            waiting = list(cells)
            goes.append(len(waiting))
            yield from super().run(waiting)

    goes: list[int] = []
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    one = tune(tmp_path / "one", SyntheticWorld(seed=1, noise=0.0), request())
    many = tune(tmp_path / "many", Wide(seed=1, noise=0.0), request())
    assert max(goes) == 4 * 4
    assert many.setting == one.setting

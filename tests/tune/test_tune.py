"""A whole tuning run in a synthetic world: found, never worse, resumable, shared, honest about its table."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bratune.cell import Cell
from bratune.errors import PlanError, UsageError
from bratune.record import Record
from bratune.run.groups import group_of
from bratune.tune.conclude import _candidates, conclude, front_rows
from bratune.tune.fidelity_source import FidelitySource
from bratune.tune.lost_accuracy import ALLOWED_LOSS
from bratune.tune.plan import Plan, install, load_plan
from bratune.tune.request import TuneRequest
from bratune.tune.sampling import Encoding
from bratune.tune.setting import Setting
from bratune.tune.show import front_table, plan_text
from bratune.tune.synthetic import BACKENDS, MACHINE, SyntheticFidelity, SyntheticWorld, offers
from bratune.tune.tuner import Tuner


def request(**changes: Any) -> TuneRequest:
    return TuneRequest(
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


def tuner(folder: Path, world: Any, asked: TuneRequest, *, kind: str = "journal", **more: Any) -> Tuner:
    url = f"{kind}:///{folder}/study.{kind}"
    fidelity: FidelitySource | None = None
    if asked.second == "loss":
        fidelity = SyntheticFidelity(asked.space, asked.reference, seed=1)
    return Tuner(world, asked, url, offers=offers, fidelity=fidelity, **more)


def tune(folder: Path, world: Any, asked: TuneRequest, **more: Any) -> Plan:
    worker = tuner(folder, world, asked, **more)
    worker.search()
    return end(worker)


def end(worker: Tuner, **more: Any) -> Plan:
    return conclude(worker, **more)


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
    found = plan.end_to_end
    assert found.verdict == "FASTER"
    assert found.speedup_vs_default is not None
    assert found.speedup_vs_default.lo is not None
    assert found.speedup_vs_default.lo > 1
    truth = world.model_ms(space, plan.default) / world.model_ms(space, plan.setting)
    assert found.speedup_vs_default.value == pytest.approx(truth, rel=0.03)
    official = space.setting(plan.default.n_win, plan.default.topks, "gather")
    assert found.speedup_vs_published is not None
    truth = world.model_ms(space, official) / world.model_ms(space, plan.setting)
    assert found.speedup_vs_published.value == pytest.approx(truth, rel=0.03)
    assert plan.evidence.level == "E0"
    assert plan.measured == "modelled"


@pytest.mark.parametrize("seed", range(6))
def test_default_is_kept_when_nothing_is_to_be_gained(tmp_path: Path, seed: int) -> None:
    world = SyntheticWorld(seed=seed, equal=True, noise=0.03)
    plan = tune(tmp_path, world, request())
    assert plan.setting == plan.default
    assert plan.end_to_end.verdict is None
    assert plan.end_to_end.speedup_vs_default is None


def test_weights_alone_change_only_the_cost(tmp_path: Path) -> None:
    plan = tune(tmp_path, SyntheticWorld(seed=1), request(**WITH_WEIGHTS))
    assert (plan.n_win, plan.topks) == (plan.default.n_win, plan.default.topks)
    assert plan.setting != plan.default
    assert "the function is the same" in plan.evidence.text


def test_with_labelled_images_and_permission_the_pick_keeps_the_limit_of_lost_accuracy(
    tmp_path: Path,
) -> None:
    asked = request(**WITH_WEIGHTS, allow_model_changes=True, pick="safe", effort="standard")
    worker = tuner(tmp_path, SyntheticWorld(seed=1), asked)
    worker.search()
    plan = end(worker)
    found = worker.find(plan.setting)
    assert found is not None
    assert found.counts is not None
    assert plan.evidence.level == "E3"
    judged = sum(v.feasible and v.counts is not None for v in worker.verified())
    assert plan.evidence.values["most_lost"] == found.counts.most_lost(among=judged) <= ALLOWED_LOSS["safe"]
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


class Fragile(SyntheticWorld):
    """A world that is interrupted at one measurement."""

    left = 10**9

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        for cell in cells:
            self.left -= 1
            if self.left == 0:
                raise Killed
            yield from super().run([cell])


@pytest.mark.parametrize("at", [1, 5, 20, 30])
def test_interrupted_run_goes_on_and_ends_like_an_undisturbed_one(tmp_path: Path, at: int) -> None:
    whole = tune(tmp_path / "whole", SyntheticWorld(seed=4, noise=0.0), request())
    world = SyntheticWorld(seed=4, noise=0.0)
    torn = Fragile(seed=4, noise=0.0)
    torn.left = at
    with pytest.raises(Killed):
        tune(tmp_path / "torn", torn, request())
    resumed = tune(tmp_path / "torn", world, request())
    assert resumed.setting == whole.setting
    searched = [c.cell_id for c in (*torn.measured, *world.measured) if c.part == "block"]
    assert len(searched) == len(set(searched))  # nothing was measured twice


def test_same_request_again_measures_only_the_comparison(tmp_path: Path) -> None:
    tune(tmp_path, SyntheticWorld(seed=1), request())
    world = SyntheticWorld(seed=1)
    tune(tmp_path, world, request())
    assert {c.part for c in world.measured} == {"model"}
    assert len(world.measured) % 6 == 0  # passes of the pick, its rivals, the default and the published form
    assert {c.form for c in world.measured} == {"plain", "published"}


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
    assert plan.end_to_end.verdict == "FASTER"
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
    assert "unfinished" in plan_text(plan)
    with pytest.raises(PlanError, match="unfinished search"):
        install(dataclasses.replace(plan, measured="measured"), tmp_path)


def test_unfinished_search_says_what_it_does_not_know_and_never_compares_with_gather(tmp_path: Path) -> None:
    said: list[str] = []
    worker = tuner(tmp_path, SyntheticWorld(seed=1), request(), say=said.append)
    worker.enqueue_settings(worker.named().items())
    for _ in worker.named():  # the default and gather everywhere, and no other
        worker.drain_settings()
    worker.cells.enqueue(worker.options.cell_items(worker.bench.options(0)))
    default = worker.find(worker.reference)
    assert default is not None
    assert _candidates(worker, default, default, "fastest") == []
    plan = end(worker, complete=False)
    waiting = len(worker.cells.trials("WAITING"))
    assert plan.setting == plan.default
    assert (
        f"the search is unfinished: {waiting} stage options and 0 settings were not measured" in plan.reason
    )
    assert any("in turn in 6 fresh processes: the published form" in line for line in said)
    assert plan.end_to_end.verdict is None
    assert plan.end_to_end.speedup_vs_published is not None


def test_unknown_interval_is_left_out_of_the_front(tmp_path: Path) -> None:
    class Curt(SyntheticWorld):
        def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
            for row in super().run(cells):
                yield row.replace(ci_lo_ms=row.median_ms, ci_hi_ms=row.median_ms)

    worker = tuner(tmp_path, Curt(seed=1), request())
    worker.enqueue_settings(worker.named().items())
    worker.drain_settings()
    rows = front_rows(worker, end(worker))
    assert [row["ci_ms"] for row in rows] == [None] * len(rows)
    assert "0.000" not in front_table(rows)


def test_small_budget_verifies_swaps_of_one_stage_first(tmp_path: Path) -> None:
    worker = tuner(tmp_path, SyntheticWorld(seed=1, noise=0.0), request(budget_s=1000.0))
    worker.enqueue_settings(worker.named().items())
    worker.drain_settings()
    worker.measure_table()
    own, before = worker.reference, len(worker.settings.trials())
    swaps = worker.table.swaps(own)
    changes = [sum(a != b for a, b in zip(s.backends, own.backends, strict=True)) for s in swaps]
    assert changes == [1] * len(swaps)
    assert len(swaps) == len(worker.space.routed)
    worker.pace.note("setting", 500.0)  # the rest of the budget is two of them
    worker.verify()
    tried = [Setting.from_dict(t.user_attrs["setting"]) for t in worker.settings.trials()]
    assert tried[before:][: len(swaps)] == swaps


def test_plan_of_a_run_reads_back(tmp_path: Path) -> None:
    plan = tune(tmp_path, SyntheticWorld(seed=1), request(effort="standard"))
    assert load_plan(plan.save(tmp_path / "plan.json")) == plan
    assert plan.stages[2].tuned_ms is not None
    assert plan.stages[3].kind == "full"


def test_study_of_another_machine_is_refused(tmp_path: Path) -> None:
    tune(tmp_path, SyntheticWorld(), request(), study="shared")

    class Moved(SyntheticWorld):
        machine = dataclasses.replace(MACHINE, sm_count=66)

    with pytest.raises(UsageError, match="was measured on sm90-132sm-80gib and this is sm90-66sm-80gib"):
        tuner(tmp_path, Moved(), request(), study="shared")


def _help(folder: str) -> None:
    tuner(Path(folder), SyntheticWorld(seed=1), request()).help(patience_s=3.0)


@pytest.mark.slow
def test_workers_that_join_share_the_work(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
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
    assert plan.end_to_end.verdict == "FASTER"


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
    assert TuneRequest.from_dict(asked.to_dict()) == asked


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


def test_the_options_of_a_stage_take_turns_where_the_engine_lets_them(tmp_path: Path) -> None:
    class InTurn(SyntheticWorld):
        turns = True

        def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
            waiting = list(cells)
            goes.append(waiting)
            yield from super().run(waiting)

    goes: list[list[Cell]] = []
    for name in ("one", "turns"):
        (tmp_path / name).mkdir()
    one = tune(tmp_path / "one", SyntheticWorld(seed=1, noise=0.0), request())
    turns = tune(tmp_path / "turns", InTurn(seed=1, noise=0.0), request())
    together = [go for go in goes if len(go) > 1 and go[0].part == "block"]
    assert together
    for go in together:
        assert len({group_of(cell) for cell in go}) == 1
        assert len({cell.backend for cell in go}) > 1
    assert turns.setting == one.setting


def test_options_that_were_measured_in_turn_are_in_the_table_however_late_it_became(tmp_path: Path) -> None:
    class Slow(SyntheticWorld):
        turns = True

        def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
            for row in super().run(cells):
                now[0] += 2.0
                yield row

    now = [0.0]
    world = Slow(seed=1, noise=0.0)
    worker = tuner(tmp_path, world, request(budget_s=100.0), clock=lambda: now[0])
    worker.enqueue_settings(worker.named().items())
    worker.drain_settings()
    worker.measure_table()
    blocks = {cell for cell in world.measured if cell.part == "block"}
    assert worker.cells.trials("WAITING"), "the time of the table ended before all options had their turn"
    assert len(worker.table.entries) == len(blocks) > 0


def test_times_of_a_search_differ_by_their_settings_and_not_by_the_minute(tmp_path: Path) -> None:
    class Moody(SyntheticWorld):
        """The machine has another speed whenever it is asked."""

        def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
            speed = next(speeds)
            for row in super().run(cells):
                assert row.median_ms is not None
                yield row.replace(median_ms=speed * row.median_ms, ci_lo_ms=None, ci_hi_ms=None)

    speeds = itertools.cycle((1.0, 0.7, 1.6, 1.2, 0.5))
    world = Moody(seed=1, noise=0.0)
    worker = tuner(tmp_path, world, request())
    worker.search()
    default = worker.find(worker.reference)
    assert default is not None
    named = {setting.key for setting in worker.named().values()}
    found = [v for v in worker.verified() if v.setting.key not in named]
    assert len(found) >= 3
    truth = world.model_ms(worker.space, default.setting)
    for one in found:
        ratio = world.model_ms(worker.space, one.setting) / truth
        assert one.ms / default.ms == pytest.approx(ratio), str(one.setting)

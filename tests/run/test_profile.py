"""A profiling run from end to end on a fake engine, what its rows say together, and how they are shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bratune.backend import Backend
from bratune.cell import Cell
from bratune.errors import BratuneError, TargetError, UnknownNameError, UsageError
from bratune.kernels import registry
from bratune.machine import Machine, detect
from bratune.measure.meter import meter_for
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.report.explain_tables import n_win_table
from bratune.report.profile_tables import profile_markdown, profile_text
from bratune.report.timm_format import timm_csv, timm_row
from bratune.run import session
from bratune.run.engine import CellEngine
from bratune.run.measure_cell import run_cell
from bratune.run.runner import LocalRunner
from bratune.run.summary import best_attention, differ, group, residual
from bratune.run.target import find_target
from bratune.store import Store
from bratune.tables import Note, Table, to_csv, to_markdown, to_text
from bratune.work.cells import scenes
from bratune.work.explain import explain_stages
from bratune.work.measured_n_win import stored_blocks
from bratune.work.request import Request, make_request

CPU = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="Some CPU", sm_count=2, threads=2)


class FakeEngine:
    """Answers every cell from a table of milliseconds by backend and part; notes what was asked."""

    machine = CPU
    slots = passes = 1
    turns = False

    def __init__(self, **times: float | str) -> None:
        self.times: dict[str, float | str] = {"block": 8.0, "model": 100.0, **times}
        self.asked: list[Cell] = []

    def run(self, cells: Iterable[Cell]) -> Iterator[Record]:
        for cell in cells:
            self.asked.append(cell)
            key = cell.backend.replace("-", "_") if cell.part == "attention" else cell.part
            known = self.times.get(f"{key}_{cell.stage}", self.times.get(key, 1.0))
            if isinstance(known, str):
                yield Record.of(cell, CPU, outcome=known, reason="a reason")
                continue
            ms = known if cell.part != "model" or cell.backend == "gather" else known / 2
            yield Record.of(
                cell,
                CPU,
                median_ms=ms,
                ci_lo_ms=ms * 0.99,
                ci_hi_ms=ms * 1.01,
                noise_pct=1.0,
                images_per_s=1e3 * cell.problem.batch / ms,
                workspace_mb=12.5,
                peak_alloc_mb=80.0,
            )


def request(**asked: Any) -> Request:
    return make_request(CPU, **({"backends": ("gather", "dense", "triton")} | asked))


def profile(engine: FakeEngine, stages: tuple[int, ...] = (), **asked: Any) -> list[Record]:
    baseline = "gather" if "gather" in asked.get("backends", ("gather",)) else asked["backends"][0]
    return list(session.run(request(**{"forms": (baseline,), **asked}), engine, stages))


# --- the session -------------------------------------------------------------------------------------


def test_the_fastest_backend_of_each_stage_goes_into_its_block_and_into_the_model() -> None:
    engine = FakeEngine(gather=4.0, dense_1=5.0, dense_2=2.0, dense_3=1.0, triton="unsupported")
    rows = profile(engine)
    blocks = [c.backend for c in engine.asked if c.part == "block"]
    assert blocks == ["gather", "dense", "dense", "gather"]
    models = [c.backend for c in engine.asked if c.part == "model"]
    assert models == ["gather", "gather,dense,dense,gather"]
    assert [r.speedup for r in rows if r.part == "model"] == [1.0, 2.0]


def test_a_backend_that_failed_the_gate_cannot_win() -> None:
    engine = FakeEngine(gather=4.0, dense=3.0, triton="incorrect")
    rows = profile(engine, whole_model=False)
    best = best_attention(rows, 1)
    assert best is not None
    assert best.backend == "dense"


@pytest.mark.parametrize("outcome", ["unsupported", "oom", "incorrect", "error", "crashed", "timeout"])
def test_a_stage_where_nothing_could_be_timed_has_no_block_and_the_model_keeps_the_baseline(
    outcome: str,
) -> None:
    nothing = {"gather_2": outcome, "dense_2": outcome, "triton_2": outcome}
    engine = FakeEngine(gather=4.0, dense=2.0, triton=1.0, **nothing)
    profile(engine)
    assert [c.stage for c in engine.asked if c.part == "block"] == [1, 3, 4]
    assert engine.asked[-1].backend == "triton,gather,triton,gather"


def test_the_model_is_timed_once_where_the_baseline_is_fastest_everywhere() -> None:
    engine = FakeEngine(gather=1.0, dense=2.0, triton=2.0)
    assert [r.backend for r in profile(engine) if r.part == "model"] == ["gather"]


def test_the_model_of_the_fastest_backends_is_left_out_where_auto_is_that_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: dict[int, tuple[str, dict[str, Any] | None]] = {
        1: ("triton", None),
        2: ("triton", None),
        3: ("dense", None),
    }

    def choose(problem: Problem, machine: Machine) -> tuple[Backend, dict[str, Any] | None]:
        name, config = taken[{56: 1, 28: 2, 14: 3}[problem.height]]
        return registry.get(name), config

    monkeypatch.setattr("bratune.kernels.tuned.choose", choose)
    best = {"gather": 3.0, "dense": 2.0, "triton": 1.0, "dense_3": 0.5}
    forms = ("published", "gather", "auto")
    rows = profile(FakeEngine(**best), forms=forms)
    assert [r.backend for r in rows if r.part == "model"] == ["gather", "", "auto"]
    assert "auto takes the fastest backend of every stage" in profile_text(rows)
    taken[3] = ("dense", {"block": 64})  # a plan's settings make it another model
    rows = profile(FakeEngine(**best), forms=forms)
    assert [r.backend for r in rows if r.part == "model"] == [
        "gather",
        "",
        "auto",
        "triton,triton,dense,gather",
    ]
    assert "auto takes" not in profile_text(rows)


def test_without_the_baseline_the_first_backend_stands_in_and_nothing_has_a_speedup() -> None:
    rows = profile(FakeEngine(dense=2.0, triton=1.0), backends=("dense", "triton"))
    assert [r.backend for r in rows if r.part == "model"] == ["dense", "triton"]
    assert {r.speedup for r in rows} == {None}


@pytest.mark.parametrize(
    ("direction", "forms"),
    [
        ("fwd", ["gather", "published", "auto", "runtime"]),
        ("fwd-bwd", ["gather", "published", "auto", "lean"]),
    ],
)
def test_whole_models_tell_what_is_gained_by_what(direction: str, forms: list[str]) -> None:
    engine = FakeEngine(dense=0.5)
    rows = profile(engine, forms=(), direction=direction)
    models = [c for c in engine.asked if c.part == "model"]
    names = [c.backend if c.form == "plain" else c.form for c in models]
    assert names == [*forms, "dense,dense,dense,gather"]
    text = profile_text(rows)
    assert all(f"\n{name}" in text for name in ("published", "gather everywhere", "auto ", forms[-1]))


def test_without_stages_only_whole_models_are_measured() -> None:
    engine = FakeEngine()
    profile(engine, parts=False, forms=("published", "runtime"), batches=(1, 2))
    assert [(c.part, c.form) for c in engine.asked] == [("model", "published"), ("model", "runtime")] * 2


def test_peers_take_turns_with_the_model_of_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from bratune.run.groups import groups_of
    from bratune.work.cells import scenes

    monkeypatch.setattr("bratune.work.request.peer_name", lambda name: name)
    found = scenes(request(batches=(1, 2), peers=("swin",), forms=("gather", "runtime")))
    groups = groups_of([cell for scene in found for cell in (*scene.form_cells(), *scene.peer_cells())])
    assert [[(c.form, c.problem.batch) for c in group] for group in groups] == [
        [("plain", batch), ("runtime", batch), ("timm", batch)] for batch in (1, 2)
    ]


def test_only_the_stages_asked_for_are_measured() -> None:
    engine = FakeEngine()
    profile(engine, stages=(2,), whole_model=False)
    assert {c.stage for c in engine.asked} == {2}


def test_every_batch_size_has_rows_of_its_own() -> None:
    rows = profile(FakeEngine(dense=0.5), batches=(4, 1))
    assert [(r.batch, r.part) for r in rows if r.part == "model"] == [(1, "model")] * 2 + [(4, "model")] * 2
    assert len(group(rows)) == 2


def test_a_session_plans_what_it_does() -> None:
    engine = FakeEngine(gather=4.0, dense=2.0)
    profile(engine, routes=("recorded", "same"), forms=())
    planned = session.plan(request(routes=("recorded", "same")))
    assert len(planned) == len(engine.asked)
    known = {p.cell for p in planned if p.cell}
    assert known < set(engine.asked)


# --- a real run, small -------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"image": (64, 64), "n_win": (2,), "topks": (1, 2, 3, -2)}
QUICK = MeterSettings(min_time_s=0.0, warmup_s=0.0, min_samples=2, max_samples=2, l2="warm")


def test_a_small_profile_runs_and_its_records_are_complete(tmp_path: Path) -> None:
    here = detect("cpu")
    asked = make_request(here, backends=("gather", "dense"), **SMALL)
    store = Store(tmp_path / "records.jsonl")
    with CellEngine(LocalRunner(here, QUICK), QUICK, store=store, run_id="a-run") as engine:
        rows = list(session.run(asked, engine, (1,)))
    timed = [row for row in rows if row.outcome == "measured"]
    assert timed == rows, [row.reason for row in rows if row not in timed]
    assert [row for row in store.records() if row.outcome != "started"] == rows
    for row in rows:
        assert row.n_samples == 2
        assert row.run_id == "a-run"
        assert row.repro.startswith("bratune profile --model biformer_tiny")
        assert (row.speedup is not None) == (
            bool(row.backend) or row.form == "published"
        ) or row.part == "block"
    checked = [row for row in rows if row.backend]
    assert all(row.max_rel_err is not None and row.max_rel_err < 1e-5 for row in checked)
    assert {row.stage for row in rows if row.part == "block"} == {1}
    assert residual(rows, 1) is not None
    text = profile_text(rows)
    assert "whole model" in text
    assert "gather everywhere" in text


def _cell(**changes: Any) -> Cell:
    (scene,) = scenes(make_request(CPU, **SMALL, backends=("gather",)))
    return next(iter(scene.attention_cells(scene.stages[0]))).replace(**changes)


class _Raising:
    """A meter whose device fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def measure(self, call: Any, settings: MeterSettings, *, before: Any = None) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 34.7 GiB\nmore"), "oom", "34.7 GiB"),
        (MemoryError(), "oom", "MemoryError"),
        (RuntimeError("device-side assert triggered"), "error", "RuntimeError: device-side assert triggered"),
        (TypeError(""), "error", "TypeError"),
        (BratuneError("the meter is broken"), "error", "the meter is broken"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_fails_becomes_a_row_with_one_sentence(error: Exception, outcome: str, reason: str) -> None:
    row = run_cell(_cell(), detect("cpu"), _Raising(error), QUICK).record
    assert row.outcome == outcome
    assert reason in row.reason
    assert "\n" not in row.reason
    assert row.median_ms is None


def test_energy_is_that_of_what_was_timed(compiling: Any) -> None:
    """A row of a graph or of compiled code must not carry the joules of the eager call."""
    (scene,) = scenes(make_request(CPU, **SMALL, backends=("gather",), regimes=("compile",)))
    assert run_cell(scene.model_cell(("gather",)), CPU, compiling, QUICK).record.ok
    assert compiling.energy_of == [compiling.made]


def test_an_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_cell(_cell(), detect("cpu"), _Raising(KeyboardInterrupt()), QUICK)  # type: ignore[arg-type]


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bratune.kernels import registry

    backend = registry.get("gather")
    right = type(backend).forward
    monkeypatch.setattr(
        type(backend), "forward", lambda self, *args, **kwargs: right(self, *args, **kwargs) * 1.01
    )
    row = run_cell(_cell(), detect("cpu"), _Raising(AssertionError("timed")), QUICK).record
    assert row.outcome == "incorrect"
    assert "differs from the reference by 0.01" in row.reason
    assert row.max_rel_err == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "triton"}, "needs a CUDA device"),
        ({"regime": "graph"}, "a CUDA graph needs a CUDA device"),
    ],
)
def test_what_cannot_run_here_is_refused_with_its_reasons(
    changes: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    here = detect("cpu")
    row = run_cell(_cell(**changes), here, meter_for(here), QUICK).record
    assert row.outcome == "unsupported"
    assert said in row.reason


# --- what rows say together --------------------------------------------------------------------------


def test_the_residual_is_the_sum_of_the_parts_against_the_block() -> None:
    rows = profile(FakeEngine(gather=4.0, dense=2.0, triton=3.0, block=10.0), whole_model=False)
    found = residual(rows, 1)
    assert found is not None
    assert found.backend == "dense"
    assert found.parts_ms["attention"] == 2.0
    assert found.sum_ms == 2.0 + 7 * 1.0
    assert found.relative == pytest.approx(-0.1)


def test_a_part_that_did_not_settle_is_marked() -> None:
    rows = profile(FakeEngine(gather=4.0, lepe=15.5), whole_model=False)
    rows = [row.replace(noise_pct=26.0) if row.part == "lepe" and row.stage == 1 else row for row in rows]
    found = residual(rows, 1)
    assert found is not None
    assert found.unsettled == {"lepe"}
    again = residual([row.replace(evidence="replayed") for row in rows], 1)
    assert again is not None
    assert again.unsettled == {"lepe"}
    text = profile_text(rows)
    assert " 15.500~ " in text
    assert text.count("15.500 ") == 3
    assert "~ did not settle: half its interval is more than 10 %" in text
    assert "~" not in profile_text(profile(FakeEngine(gather=4.0), whole_model=False))


def test_times_that_were_taken_while_held_back_are_counted() -> None:
    rows = profile(FakeEngine(gather=4.0, triton="oom"), stages=(1,), whole_model=False)
    timed = sum(row.median_ms is not None for row in rows)
    slowed = {"attention": "cpu_steal", "mlp": "hw_thermal,sw_power_cap"}
    rows = [row.replace(throttle_reasons=slowed.get(row.part, "")) for row in rows]
    assert (
        f"3 of {timed} times taken while held back by: cpu_steal (the host ran others on these processors), "
        "hw_thermal, sw_power_cap"
    ) in profile_text(rows)
    assert "held back" not in profile_text(profile(FakeEngine(gather=4.0), stages=(1,)))


def test_there_is_no_residual_where_a_part_has_no_time() -> None:
    assert residual(profile(FakeEngine(gather=4.0, mlp="error")), 1) is None
    assert residual(profile(FakeEngine(gather=4.0, block="oom")), 1) is None


def test_rows_differ_when_their_intervals_part() -> None:
    a = Record(median_ms=1.0, ci_lo_ms=0.9, ci_hi_ms=1.1)
    assert differ(a, Record(median_ms=1.3, ci_lo_ms=1.2, ci_hi_ms=1.4))
    assert not differ(a, Record(median_ms=1.15, ci_lo_ms=1.05, ci_hi_ms=1.2))
    assert not differ(a, Record(outcome="oom", reason="x"))


# --- tables ------------------------------------------------------------------------------------------


def test_the_text_fits_a_hundred_columns_and_says_why_a_backend_is_not_here() -> None:
    rows = profile(
        FakeEngine(gather=4.0, dense=2.0, triton="unsupported"), models=("biformer_small",), task="detection"
    )
    text = profile_text(rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "biformer_small · detection · 800x1344 · batch 1 · float32 · fwd · warm cache · eager" in text
    assert "not here: a reason" in text
    lines = [line for line in text.splitlines() if "dense *" in line]
    assert len(lines) == 3
    assert all("2.00x" in line and "±1.0 %" in line and "12.5" in line for line in lines)


def test_overlapping_intervals_put_the_speedup_in_parentheses() -> None:
    text = profile_text(
        profile(FakeEngine(gather=2.0, dense=1.99, triton=1.0), stages=(1,), whole_model=False)
    )
    assert "(1.01x)" in text
    assert " 2.00x" in text


@pytest.mark.parametrize(
    ("outcome", "word"), [("incorrect", "WRONG RESULT, not timed"), ("oom", "oom: a reason")]
)
def test_failures_are_shown_as_rows(outcome: str, word: str) -> None:
    assert word in profile_text(profile(FakeEngine(dense=outcome), whole_model=False))


def test_kinds_of_routes_get_a_column_when_there_are_several() -> None:
    rows = profile(FakeEngine(dense=2.0), routes=("recorded", "same"), stages=(1,), whole_model=False)
    text = profile_text(rows)
    assert "routes" in text
    assert text.count("same") == 3


def test_a_reason_that_holds_for_every_stage_stands_once() -> None:
    rows = profile(FakeEngine(gather=2.0, dense=1.0, triton="unsupported"), whole_model=False)
    for text in (profile_text(rows), profile_markdown(rows)):
        assert text.count("triton: not here: a reason") == text.count("a reason") == 1
    one_stage = [row.replace(median_ms=1.0) if row.stage == 1 and not row.ok else row for row in rows]
    one_stage = [row.replace(outcome="measured") if row.median_ms == 1.0 else row for row in one_stage]
    assert profile_text(one_stage).count("not here: a reason") == 2  # it runs at the first stage


def test_markdown_has_as_many_cells_in_every_row() -> None:
    text = profile_markdown(profile(FakeEngine(dense=2.0, triton="unsupported")))
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count(" | ") for line in table.splitlines()}) == 1


def test_a_note_takes_the_rest_of_its_row_and_wraps() -> None:
    table = Table(("<a", "b"), (("x", "1"), Note(("y",), "word " * 40)), title="title")
    lines = to_text(table, width=60).splitlines()
    assert lines[0] == "title"
    assert all(len(line) <= 60 for line in lines)
    assert lines[4].startswith("   word")
    assert "| y | word" in to_markdown(table)


def test_csv_leaves_absent_values_empty() -> None:
    assert to_csv(["a", "b"], [[None, 0], ["x,y", 1.5]]) == 'a,b\n,0\n"x,y",1.5'


def test_timm_columns() -> None:
    row = Record(
        model="biformer_tiny",
        part="model",
        backend="dense",
        batch=2,
        image_height=224,
        image_width=224,
        direction="fwd",
        dtype="float32",
        median_ms=100.0,
        images_per_s=20.0,
        tflops_s=2 * 2 * 2.216e9 / 0.1 / 1e12,
    )
    assert timm_row(row) == {
        "model": "biformer_tiny",
        "infer_samples_per_sec": 20.0,
        "infer_step_time": 100.0,
        "infer_batch_size": 2,
        "infer_img_size": 224,
        "infer_gmacs": 2.22,
        "param_count": 13.14,
        "backend": "dense",
        "dtype": "float32",
    }
    train = timm_row(row.replace(direction="fwd-bwd", image_width=448))
    assert (train["train_samples_per_sec"], train["train_img_size"]) == (20.0, "224x448")
    assert timm_csv([row]).splitlines()[1].startswith("biformer_tiny,20.0,100.0,2,224,2.22,13.14")
    assert timm_csv([]).startswith("model,infer_samples_per_sec")


# --- target and explain ------------------------------------------------------------------------------


def test_a_gpu_that_is_not_here_is_a_target_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bratune.run.target.detect", lambda device: CPU)
    target = find_target("h200")
    assert target.absent is not None
    assert (target.machine.gpu_key, target.machine.capability) == ("h200", (9, 0))
    with pytest.raises(TargetError, match=r"H200.* cannot be measured here") as error:
        target.require_present()
    assert error.value.exit_code == 5


def test_a_board_and_the_cpu_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--gpu h200 asks about a H200 .* and --device cpu names"):
        find_target("h200", "cpu")


def test_cpu_and_auto_are_targets_that_are_here() -> None:
    assert find_target("cpu").absent is None
    assert find_target("auto", "cpu").machine.kind == "cpu"
    with pytest.raises(UnknownNameError, match="a100"):
        find_target("a1000")


def test_explain_shows_the_fastest_measured_s(tmp_path: Path) -> None:
    request = make_request(CPU, models=("biformer_tiny",))
    times = {7: 2.0, 14: 1.5}
    for n_win, ms in times.items():
        stage = request.stages("biformer_tiny", 1)[0]
        assert stage.problem is not None
        cell = Cell(
            part="block",
            problem=stage.problem,
            backend="dense",
            model="biformer_tiny",
            image=(224, 224),
            stage=1,
            n_win=str(n_win),
            topk="1",
        )
        Store(tmp_path / "rows.jsonl").append(Record.of(cell, CPU, outcome="measured", median_ms=ms))
    facts = explain_stages(scenes(request)[0], CPU, stored_blocks(CPU, [tmp_path]))
    found = facts[0].measured_n_win
    assert found is not None
    assert (found.n_win, found.ms, found.backend, found.tried) == (14, 1.5, "dense", (7, 14))
    assert facts[1].measured_n_win is None
    elsewhere = dataclasses.replace(CPU, gpu_name="another")
    assert stored_blocks(elsewhere, [tmp_path]) == ()
    lines = n_win_table(facts, lambda fact: "measure it").rows
    assert lines[0] == Note(
        ("1", "7", "64", "14.6", "15"), "S=14, 1.500 ms per block with dense (measured: 7, 14)"
    )
    assert lines[1] == Note(("2", "7", "64", "11.6", "23"), "not measured yet: measure it")


def test_explain_counts_padding_pairs_and_gathered_bytes() -> None:
    facts = explain_stages(scenes(make_request(CPU, models=("biformer_small",), task="detection"))[0], CPU)
    third = facts[2]
    assert round(third.padding_waste, 2) == 0.46
    assert third.keys_per_query == 384
    assert third.pairs == 64 * 96 * 384
    assert third.gathered_bytes == 256 * 384 * 512 * 4
    assert third.reasons["gather"] == ()
    assert any("CUDA" in reason for reason in third.reasons["triton"])
    assert facts[3].optimal_n_win is None

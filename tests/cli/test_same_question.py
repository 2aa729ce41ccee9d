"""The same words mean the same cells, whichever verb hears them; the defaults come from one table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bratune import gpus
from bratune.cell import Cell
from bratune.cli import profile as profile_verb
from bratune.cli import run
from bratune.cli import tune as tune_verb
from bratune.defaults import defaults_for
from bratune.machine import Machine, detect
from bratune.measure.settings import MeterSettings
from bratune.predict.model import ModelEngine, absent_machine
from bratune.record import Record
from bratune.report.demo import modelled_records
from bratune.run.measure_cell import Result
from bratune.run.runner import Turns
from bratune.store import read_records
from bratune.store.pooled import IN_TURN_WITH
from bratune.tune.bench import Bench
from bratune.tune.table import Entry
from bratune.work.cells import joined_backends, scenes
from bratune.work.explain import explain_stages
from bratune.work.request import Request, make_request

A100, T4 = gpus.resolve("a100"), gpus.resolve("t4")
# Three tasks, three models, two regimes; the STL models need an S that tiles their maps.
QUESTIONS = [
    (model, task, regime)
    for model in ("biformer_tiny", "biformer_small", "biformer_stl")
    for task in ("classification", "segmentation", "detection")
    for regime in ("eager", "graph")
    if (model, task) != ("biformer_stl", "detection")
]


def flags(model: str, task: str, regime: str) -> list[str]:
    return ["--model", model, "--task", task, "--regime", regime]


def options_of(verb: Any, arguments: list[str]) -> dict[str, Any]:
    with verb.command.make_context(verb.command.name, list(arguments)) as ctx:
        return dict(ctx.params)


def profiled(words: list[str], machine: Machine) -> Request:
    """The request of ``bratune profile``."""
    from bratune.cli.options import request_values, settings_of

    (asked,) = settings_of(options_of(profile_verb, words))
    return make_request(machine, **request_values(asked), regimes=asked["regime"], l2=asked["l2"])


def tuned(words: list[str], machine: Machine) -> Bench:
    """What ``bratune tune`` makes cells with."""
    request = tune_verb._request(options_of(tune_verb, words), machine)
    return Bench(ModelEngine(A100), request)


def predicted(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[Record]:
    capsys.readouterr()
    assert run(["predict", "--gpu", "a100", "-b", "1", "--no-compile", "--format", "json", *words]) == 0
    return [Record.from_json(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(("model", "task", "regime"), QUESTIONS)
@pytest.mark.parametrize("backend", ["dense", "gather-sdpa"])
def test_a_model_by_one_backend_is_one_cell_for_every_verb(
    model: str, task: str, regime: str, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, machine = flags(model, task, regime), absent_machine(A100)
    if model == "biformer_stl" and task == "segmentation":
        words += ["--res", "512"]
    (scene,) = scenes(profiled(words, machine))
    whole = scene.model_cell((backend,))
    bench = tuned(words, machine)
    reference = bench.request.reference
    # As the tuner says it: stage by stage, nothing where the attention is full.
    names = [backend if k > 0 else "" for k in reference.topks]
    assert bench.model_cell(reference.replace(backends=tuple(names), regime=regime)) == whole
    rows = predicted([*words, "--backend", backend], capsys)
    attention = [
        scene.stage_cell("attention", s, backend=backend) for s in scene.stages if s.kind == "routed"
    ]
    assert {row.cell_id for row in rows} == {cell.cell_id for cell in [*attention, whole]}
    facts = explain_stages(scene, machine)
    assert [fact.stage.problem for fact in facts][: len(attention)] == [cell.problem for cell in attention]


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_the_demo_asks_what_profile_asks(task: str) -> None:
    words = ["--model", "biformer_tiny", "--task", task]
    (scene,) = scenes(profiled(words, absent_machine(A100)))
    rows = modelled_records([A100], model="biformer_tiny", task=task, batches=(1,))
    shown = {row.cell_id for row in rows}
    for backend in ("gather", "triton"):
        assert scene.model_cell((backend,)).cell_id in shown
        assert scene.stage_cell("attention", scene.stages[0], backend=backend).cell_id in shown


def test_a_block_is_one_cell_for_profile_and_tune() -> None:
    words, machine = flags("biformer_tiny", "detection", "graph"), absent_machine(A100)
    (scene,), bench = scenes(profiled(words, machine)), tuned(words, machine)
    entry = Entry(stage=1, n_win=16, topk=4, backend="triton")
    assert bench.block_cell(entry) == scene.block_cell(scene.stages[1], "triton")


def test_tune_times_the_routes_of_the_weights_that_profile_times(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"")
    monkeypatch.setattr("bratune.work.modules.check_checkpoint", lambda *_: None)
    words, machine = ["--checkpoint", str(weights)], absent_machine(A100)
    bench = tuned(words, machine)
    cell = bench.model_cell(bench.request.reference.replace(backends=("dense", "dense", "dense", "")))
    assert json.loads(cell.extra) == {"checkpoint": str(weights)}
    asked = options_of(profile_verb, words)
    (scene,) = scenes(make_request(machine, models=("biformer_tiny",), checkpoint=str(asked["checkpoint"])))
    assert cell == scene.model_cell(("dense",))


# --- the defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", [A100, T4])
def test_a_board_has_one_default_dtype_for_every_verb(
    board: gpus.GPU, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = absent_machine(board)
    usual = defaults_for(machine)
    assert usual.dtype == ("bfloat16" if board is A100 else "float16")
    request, bench = profiled([], machine), tuned([], machine)
    assert (request.dtype, request.layout, request.l2) == (usual.dtype, usual.layout, (usual.l2,))
    own = bench.request
    assert (own.dtype, own.layout, own.l2, own.effort) == (usual.dtype, usual.layout, usual.l2, usual.effort)
    assert run(["predict", "--gpu", board.key, "-b", "1", "--no-compile", "--format", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["dtype"] for row in rows} == {usual.dtype}


def test_tune_refuses_two_cache_states_in_a_dry_run_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "--l2", "both", "--dry-run", "--device", "cpu"]) == 2
    assert "a plan is made for one cache state" in capsys.readouterr().err


# --- how backends are spelt --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "spelt"),
    [
        (("gather",), "gather"),
        (("gather", "gather", "gather", "gather"), "gather"),
        (("gather", "gather", "gather", "reference"), "gather"),
        (("gather", "gather", "gather", ""), "gather,gather,gather,gather-sdpa"),
        (("dense", "dense", "dense", ""), "dense"),
        (("dense", "dense", "dense", "gather"), "dense,dense,dense,gather"),
        (("dense", "dense", "dense", "triton"), "dense"),
        (("dense", "triton", "dense", "auto"), "dense,triton,dense,gather-sdpa"),
        (("auto",), "auto"),
        (("reference",), "reference"),
    ],
)
def test_what_runs_alike_is_spelt_alike(asked: tuple[str, ...], spelt: str) -> None:
    (scene,) = scenes(make_request(absent_machine(A100)))
    assert joined_backends(scene.stages, asked) == spelt
    assert scene.model_cell(asked).backend == spelt


def test_a_stage_of_convolutions_has_no_backend() -> None:
    (scene,) = scenes(make_request(absent_machine(A100), topks=(0, 4, 16, -2)))
    assert joined_backends(scene.stages, ("dense",)) == "dense"
    assert joined_backends(scene.stages, ("x", "dense", "triton", "")) == ",dense,triton,gather-sdpa"


# --- each other's rows -------------------------------------------------------------------------------


def test_predicted_rows_join_measured_ones_in_the_report() -> None:
    from bratune.report.figures.facts import with_bounds

    (scene,) = scenes(make_request(absent_machine(A100), models=("biformer_tiny",)))
    cell = scene.model_cell(("triton",))
    measured = Record.of(cell, absent_machine(A100), median_ms=5.0)
    bounds = [
        r for r in modelled_records([A100], model="biformer_tiny", batches=(1,)) if r.evidence == "bound"
    ]
    found = with_bounds([measured, *bounds])
    assert [r.cell_id for r in found if r.evidence == "bound"].count(cell.cell_id) == 1


class Counting:
    """In the place of workers: every cell takes a time that follows from what it is."""

    evidence = "measured"

    def __init__(self, machine: Machine, settings: MeterSettings, **_: object) -> None:
        self.machine, self.settings = machine, settings

    def run(self, cell: Cell, *, limit_s: float, give_up_ms: float | None = None) -> Result:
        median = 1.0 + int(cell.cell_id, 16) % 100 / 100
        row = Record.of(cell, self.machine, median_ms=median, ci_lo_ms=0.99 * median, ci_hi_ms=1.01 * median)
        return Result(row, (median,))

    def run_group(self, turns: Turns) -> Iterator[tuple[Cell, Result]]:
        for cell in turns.cells:
            result = self.run(cell, limit_s=turns.limit_s)
            ratio = None if turns.base in (None, cell) else 1.1
            yield cell, Result(result.record.replace(ratio=ratio, ratio_lo=ratio, ratio_hi=ratio), (1.0,))

    def fresh(self) -> None: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("verbs", [("profile", "tune"), ("tune", "profile")])
def test_profile_and_tune_in_one_folder_measure_nothing_twice(
    verbs: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bratune.run.isolated.IsolatedRunner", Counting)
    words = ["--device", "cpu", "--effort", "quick", "-o", str(tmp_path)]
    words += [word for name in ("gather", "gather-sdpa", "dense") for word in ("--backend", name)]
    runs: list[dict[str, set[int]]] = []
    for verb in verbs:
        known = len(list(read_records([tmp_path]))) if runs else 0
        assert run([verb, *words, *(["--no-install"] if verb == "tune" else [])]) == 0, capsys.readouterr()
        found: dict[str, set[int]] = {}
        for row in list(read_records([tmp_path]))[known:]:
            if row.outcome != "started" and IN_TURN_WITH not in row.sampling:
                number = row.pass_number or 1
                assert number not in found.setdefault(row.cell_id, set())
                found[row.cell_id].add(number)
        runs.append(found)
    first, second = runs
    assert not [cell for cell, passes in second.items() if passes & first.get(cell, set())]
    bench = tuned(words, detect("cpu"))
    asked = {bench.block_cell(e).cell_id for i in bench.space.routed for e in bench.options(i)}
    shared = asked & (first if verbs[0] == "profile" else second).keys()  # blocks by the best backends
    assert len(shared) >= len(bench.space.routed)
    if verbs[0] == "profile":
        assert all(first[cell] == {1, 2} for cell in shared)
        assert not shared & second.keys()
    else:
        assert all((first[cell], second[cell]) == ({1}, {2}) for cell in shared)

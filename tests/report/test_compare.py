"""Comparing sets of records: what is paired, what is refused, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bratune.cell import Cell
from bratune.cli import run
from bratune.errors import StoreError, UsageError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import Record
from bratune.report.compare import compare, load_set, regressions
from bratune.store import Store


def cell(stage: int = 1, regime: str = "eager", backend: str = "gather") -> Cell:
    problem = Problem(
        batch=1, height=56 // stage, width=56 // stage, heads=2, head_dim=32, region=(4, 4), topk=2
    )
    return Cell(
        part="attention", problem=problem, backend=backend, model="biformer_tiny", stage=stage, regime=regime
    )


def machine(key: str = "a100") -> Machine:
    return Machine(kind="cuda", device="cuda:0", gpu_key=key, gpu_name=key)


def write(
    path: Path,
    median: float,
    *,
    runs: int = 5,
    stages: tuple[int, ...] = (1, 2),
    regime: str = "eager",
    key: str = "a100",
    samples: bool = True,
) -> Path:
    target = Store(path)
    for number in range(runs):
        for stage in stages:
            level = median * stage * (1 + 0.001 * ((number * 7) % 5 - 2))
            times = [level * (1 + 0.002 * ((i * 5) % 7 - 3)) for i in range(21)]
            row = Record.of(
                cell(stage, regime),
                machine(key),
                run_id=f"run{number}",
                median_ms=level,
                ci_lo_ms=level * 0.995,
                ci_hi_ms=level * 1.005,
            )
            target.append(row, times if samples else None)
    return path


def test_cells_that_differ_have_labels_that_differ(tmp_path: Path) -> None:
    at = cell().replace(n_win="7", topk="1")
    whole = cell().replace(part="model", stage=0, n_win="7,7,7,7", topk="1,4,16,-2", backend="auto")
    cells = [
        at,
        at.replace(topk="4"),
        at.replace(n_win="8"),
        at.replace(route_distribution="same"),
        at.replace(config='{"a":1}'),
        whole,
        whole.replace(form="runtime"),
        whole.replace(topk="4,8,16,-2"),
    ]
    for name in ("a", "b"):
        target = Store(tmp_path / name / "records.jsonl")
        for number, one in enumerate(cells):
            for which in (1, 2, 3):
                target.append(Record.of(one, machine(), median_ms=1.0 + number, pass_number=which))
    rows = compare([load_set(str(tmp_path / name)) for name in ("a", "b")]).rows
    assert [row.base_ms for row in rows] == pytest.approx([1.0 + number for number in range(len(cells))])
    assert len({row.what for row in rows}) == len(cells)
    assert "S=7 k=4" in rows[1].what
    assert "runtime auto S=7/7/7/7 k=1/4/16/-2" in rows[6].what


@pytest.mark.parametrize("samples", [True, False])
def test_every_common_cell_gets_a_verdict(tmp_path: Path, samples: bool) -> None:
    a = write(tmp_path / "a.jsonl", 1.0, samples=samples)
    b = write(tmp_path / "b.jsonl", 0.8, samples=samples)
    found = compare([load_set(str(a)), load_set(str(b))])
    assert [row.verdict.verdict for row in found.rows] == ["FASTER", "FASTER"]
    assert [row.verdict.passes for row in found.rows] == [(5, 5), (5, 5)]
    assert found.rows[0].verdict.ratio == pytest.approx(0.8, rel=0.01)
    assert found.rows[0].evidence == "measured"


def test_three_sets_are_each_compared_with_the_first(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.jsonl", t) for i, t in enumerate((1.0, 0.8, 1.3))]
    found = compare([load_set(str(p)) for p in paths])
    assert [(row.other[-7:], row.verdict.verdict) for row in found.rows] == [
        ("1.jsonl", "FASTER"),
        ("1.jsonl", "FASTER"),
        ("2.jsonl", "SLOWER"),
        ("2.jsonl", "SLOWER"),
    ]


def test_cells_of_different_regimes_are_refused_unless_told(tmp_path: Path) -> None:
    a = load_set(str(write(tmp_path / "a.jsonl", 1.0)))
    b = load_set(str(write(tmp_path / "b.jsonl", 0.5, regime="graph")))
    with pytest.raises(UsageError, match=r"regime: eager in .*a.jsonl, graph in .*b.jsonl.*--across"):
        compare([a, b])
    assert [r.verdict.verdict for r in compare([a, b], across=True).rows] == ["FASTER", "FASTER"]


def test_cells_that_only_one_set_has_are_counted(tmp_path: Path) -> None:
    a = load_set(str(write(tmp_path / "a.jsonl", 1.0, stages=(1, 2))))
    b = load_set(str(write(tmp_path / "b.jsonl", 1.0, stages=(2, 3, 4))))
    found = compare([a, b])
    assert (len(found.rows), found.only_in_one) == (1, 3)


def test_failures_and_bounds_are_not_times(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 1.0, runs=1, stages=(1,))
    target = Store(path)
    target.append(Record.of(cell(2), machine(), outcome="oom", reason="out of memory"))
    target.append(Record.of(cell(3), machine(), evidence="bound", outcome="modelled", median_ms=0.1))
    assert len(load_set(str(path)).records) == 1


def test_a_set_of_several_machines_must_be_named(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", 1.0, key="a100")
    write(tmp_path / "y.jsonl", 0.5, key="h100")
    with pytest.raises(UsageError, match="holds records of a100, h100; name one"):
        load_set(str(tmp_path))
    assert load_set(f"{tmp_path}@h100").gpu_key == "h100"
    with pytest.raises(UsageError, match="no timed record of 't4'"):
        load_set(f"{tmp_path}@t4")


def test_a_path_may_hold_the_sign_that_names_a_machine(tmp_path: Path) -> None:
    folder = tmp_path / "me@host"
    folder.mkdir()
    write(folder / "x.jsonl", 1.0, key="a100")
    for argument in (str(folder), f"{folder}@a100", f"{folder}/x.jsonl@a100"):
        assert load_set(argument).gpu_key == "a100"


def test_what_is_neither_path_nor_key_is_said_to_be_neither() -> None:
    with pytest.raises(StoreError, match="neither a file, a folder nor a GPU key"):
        load_set("a1000")


def test_only_a_sure_and_large_slowdown_is_a_regression(tmp_path: Path) -> None:
    a = load_set(str(write(tmp_path / "a.jsonl", 1.0)))
    b = load_set(str(write(tmp_path / "b.jsonl", 1.05)))
    found = compare([a, b])
    assert len(regressions(found, 0.03)) == 2
    assert regressions(found, 0.10) == []


@pytest.mark.parametrize(("other", "code"), [(1.0, 0), (0.8, 0), (1.2, 3)])
def test_the_exit_code_says_whether_there_is_a_regression(
    tmp_path: Path, other: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path / "a.jsonl", 1.0), write(tmp_path / "b.jsonl", other)
    assert run(["compare", str(a), str(b), "--fail-on-regression", "3%"]) == code
    assert ("regression: " in capsys.readouterr().err) is (code == 3)


def test_json_has_the_verdict_of_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a.jsonl", 1.0), write(tmp_path / "b.jsonl", 0.8)
    assert run(["compare", str(a), str(b), "--format", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["verdict"] for row in rows] == ["FASTER", "FASTER"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument"),
        (["nothing-here", "neither"], 1, "neither a file"),
        (["{a}"], 2, "two or more"),
    ],
)
def test_bad_requests_are_one_sentence(
    tmp_path: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write(tmp_path / "a.jsonl", 1.0)
    assert run(["compare", *(x.replace("{a}", str(a)) for x in arguments)]) == code
    assert message in capsys.readouterr().err


def write_in_turn(folder: Path, *, delayed: float = 1.0, code: str = "same", base: str = "gather") -> str:
    """Six passes of two stages, by a baseline and another backend, on a machine of changing speed."""
    target = Store(folder / "records.jsonl")
    for number in range(1, 7):
        speed = 1.0 + (number * 7 + len(folder.name)) % 5 / 5
        for stage in (1, 2):
            for name, level in ((base, 1.0), ("sparse", delayed * (1 + 0.001 * (number % 3)))):
                row = Record.of(
                    cell(stage, backend=name),
                    machine(),
                    run_id="r",
                    median_ms=speed * level,
                    ci_lo_ms=speed * level * 0.999,
                    ci_hi_ms=speed * level * 1.001,
                    pass_number=number,
                    passes=6,
                    source_hash=code if name == base else "other",
                )
                ratio = None if name == base else 1 / level
                target.append(row.replace(ratio=ratio, ratio_lo=ratio, ratio_hi=ratio))
    return str(folder)


def test_two_runs_are_compared_beside_a_baseline_that_is_the_same_code(tmp_path: Path) -> None:
    before = load_set(write_in_turn(tmp_path / "a"))
    after = load_set(write_in_turn(tmp_path / "bcd", delayed=1.1))
    found = compare([before, after])
    assert [(row.what.split()[4], row.verdict.verdict) for row in found.rows] == [
        ("gather", "UNDECIDED"),
        ("sparse", "SLOWER"),
    ] * 2
    assert (found.beside, found.other_baselines) == (2, 0)


@pytest.mark.parametrize("changed", [{"code": "new"}, {"base": "dense"}])
def test_a_baseline_that_is_other_code_says_nothing_of_the_machine(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    before = load_set(write_in_turn(tmp_path / "a"))
    after = load_set(write_in_turn(tmp_path / "bcd", delayed=1.1, **changed))
    found = compare([before, after])
    assert {row.verdict.verdict for row in found.rows} == {"UNDECIDED"}
    assert (found.beside, found.other_baselines) == (0, 2)


def test_the_command_says_once_what_cells_were_compared_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [write_in_turn(tmp_path / name) for name in ("a", "bcd")]
    assert run(["compare", *sets]) == 0
    said = capsys.readouterr().err
    assert said.count("2 cells are compared beside the baseline that took turns with them") == 1

"""Records: units in the names, absent stays absent, failures carry a reason, JSON and back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from bratune.cell import Cell
from bratune.errors import BratuneError, ProblemError, StoreError, UnknownNameError
from bratune.machine import Machine
from bratune.problem import Problem
from bratune.record import OUTCOMES, SCHEMA, Record, new_run_id

PROBLEM = Problem(batch=2, height=56, width=56, heads=2, head_dim=32, region=(8, 8), topk=1)
CELL = Cell(
    part="attention",
    problem=PROBLEM,
    backend="gather",
    model="biformer_tiny",
    task="classification",
    image=(224, 224),
    stage=1,
    block_count=2,
    n_win="7",
    topk="1",
)
MACHINE = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="Some CPU", sm_count=2, threads=2)


def test_a_record_of_a_cell_says_what_how_and_where() -> None:
    row = Record.of(CELL, MACHINE, median_ms=1.5, n_samples=10)
    assert row.cell_id == CELL.cell_id
    assert (row.model, row.stage, row.backend, row.region, row.image_height) == (
        "biformer_tiny",
        1,
        "gather",
        "8x8",
        224,
    )
    assert (row.gpu_name, row.threads, row.compute_capability) == ("Some CPU", 2, "")
    assert row.ok
    assert row.to_cell() == CELL


def test_absent_fields_are_left_out_of_the_line_and_come_back_as_none() -> None:
    line = Record.of(CELL, MACHINE, outcome="started").to_json()
    assert "median_ms" not in json.loads(line)
    assert Record.from_json(line).median_ms is None


@pytest.mark.parametrize(
    "row",
    [
        Record(),
        Record.of(CELL, MACHINE, median_ms=0.25, git_dirty=False, launch_bound=True, max_rel_err=0.0),
        Record.of(CELL, MACHINE, outcome="oom", reason='asked for 34 GiB, "24" are there\nsecond line'),
    ],
    ids=["empty", "measured", "failed"],
)
def test_a_record_survives_its_line(row: Record) -> None:
    assert "\n" not in row.to_json()
    assert Record.from_json(row.to_json()) == row


def test_a_record_holds_no_dictionary_and_each_different_text_once() -> None:
    line = Record.of(CELL, MACHINE, reason="the same words in every row", median_ms=1.0).to_json()
    one, other = Record.from_json(line), Record.from_json(line)
    assert not hasattr(one, "__dict__")
    assert one.reason is other.reason
    assert one.cell is other.cell


@pytest.mark.parametrize("outcome", [o for o in OUTCOMES if o not in ("measured", "modelled", "started")])
def test_a_failure_needs_a_reason(outcome: str) -> None:
    with pytest.raises(StoreError, match="needs a reason"):
        Record.of(CELL, MACHINE, outcome=outcome)
    row = Record.of(CELL, MACHINE, outcome=outcome, reason="because")
    assert not row.ok


@pytest.mark.parametrize(
    ("values", "said"), [({"outcome": "fine"}, "outcome 'fine'"), ({"evidence": "hearsay"}, "evidence")]
)
def test_unknown_words_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(StoreError, match=said):
        Record(**values)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_none_cannot_be_written(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Record.of(CELL, MACHINE, median_ms=number).to_json()


def test_fields_of_a_newer_version_are_ignored_and_a_newer_schema_is_refused() -> None:
    data = Record.of(CELL, MACHINE).to_dict()
    assert Record.from_dict({**data, "aura": "purple"}).cell_id == CELL.cell_id
    with pytest.raises(StoreError, match="a newer bratune would read them"):
        Record.from_dict({**data, "schema": SCHEMA + 1})


@pytest.mark.parametrize("line", ["", "{", "[1, 2]", '{"outcome": "fine"}'])
def test_a_line_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(StoreError):
        Record.from_json(line)


# --- cells -------------------------------------------------------------------------------------------


def test_a_cell_has_the_same_name_in_every_process() -> None:
    assert CELL.cell_id == Cell.from_dict(json.loads(json.dumps(CELL.to_dict()))).cell_id
    assert len(CELL.cell_id) == 16
    assert int(CELL.cell_id, 16) >= 0


def test_settings_are_the_same_however_they_are_spelt() -> None:
    one, other = CELL.replace(config='{"b": 1, "a": 2}'), CELL.replace(config='{"a":2,"b":1}')
    assert one == other
    assert one.cell_id == other.cell_id
    assert one.settings == {"a": 2, "b": 1}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Cell) if f.name != "problem"])
def test_every_field_of_a_cell_is_part_of_its_name(field: str) -> None:
    others: dict[str, Any] = {
        "part": "block",
        "form": "runtime",
        "config": '{"x": 1}',
        "image": (256, 256),
        "regime": "graph",
        "l2": "warm",
        "route_distribution": "random",
        "extra": '{"x": 1}',
    }
    value = getattr(CELL, field)
    if field not in others:
        others[field] = not value if isinstance(value, bool) else value + type(value)(1)
    assert CELL.replace(**{field: others[field]}).cell_id != CELL.cell_id


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"part": "soul"}, UnknownNameError),
        ({"form": "fluid"}, UnknownNameError),
        ({"regime": "lazy"}, UnknownNameError),
        ({"l2": "tepid"}, UnknownNameError),
        ({"route_distribution": "scenic"}, UnknownNameError),
        ({"config": "{"}, ProblemError),
    ],
)
def test_a_cell_is_checked_when_it_is_made(changes: dict[str, str], kind: type[BratuneError]) -> None:
    with pytest.raises(kind):
        CELL.replace(**changes)


def test_cells_with_different_problems_have_different_names() -> None:
    assert CELL.replace(problem=PROBLEM.replace(batch=3)).cell_id != CELL.cell_id


@pytest.mark.parametrize(
    ("written", "form", "backend"),
    [
        ("gather,dense,dense,gather", "plain", "gather,dense,dense,gather"),
        ("published", "published", ""),
        ("runtime", "runtime", "auto"),
        ("lean", "lean", "auto"),
        ("timm", "timm", ""),
    ],
)
def test_rows_from_before_there_were_forms_say_theirs(written: str, form: str, backend: str) -> None:
    new = Record.of(CELL.replace(part="model", backend=written), MACHINE).to_dict()
    cell = json.loads(new["cell"])
    del new["form"], cell["form"]
    row = Record.from_dict(new | {"cell": json.dumps(cell)})
    assert (row.form, row.backend) == (form, backend)
    assert (row.to_cell().form, row.to_cell().backend) == (form, backend)


def test_a_plain_cell_has_the_name_that_it_had_before_there_were_forms() -> None:
    assert CELL.cell_id == "0f99457c2904c6b4"
    assert CELL.replace(form="runtime").cell_id != CELL.cell_id


def test_a_row_without_its_cell_says_so() -> None:
    with pytest.raises(StoreError, match="describes no cell"):
        Record(cell_id="abc").to_cell()


HOSTILE: dict[str, Any] = {
    "no object": 5,
    "a list": [1, 2],
    "nothing": {},
    "no problem": {**CELL.to_dict(), "problem": {}},
    "a problem that is none": {**CELL.to_dict(), "problem": 7},
    "one side": {**CELL.to_dict(), "image": [224]},
    "endless": {**CELL.to_dict(), "image": [float("inf"), 1]},
    "endless region": {**CELL.to_dict(), "problem": {**PROBLEM.to_dict(), "region": [float("inf"), 1]}},
    "heads without end": {**CELL.to_dict(), "problem": {**PROBLEM.to_dict(), "heads": 10**400}},
    "words for heads": {**CELL.to_dict(), "problem": {**PROBLEM.to_dict(), "heads": "many"}},
    "words for S": {**CELL.to_dict(), "n_win": "seven"},
    "a list for S": {**CELL.to_dict(), "n_win": [7]},
    "deep settings": {**CELL.to_dict(), "config": "[" * 100_000},
}


@pytest.mark.parametrize("cell", [*map(json.dumps, HOSTILE.values()), "[" * 100_000, "{"], ids=range(15))
def test_a_row_that_describes_no_cell_says_so_whatever_it_holds(cell: str) -> None:
    with pytest.raises(StoreError, match="row abc describes no cell"):
        Record(cell_id="abc", cell=cell).to_cell()


def test_a_row_without_a_pass_is_one_process_and_a_row_with_one_keeps_it() -> None:
    row = Record.of(CELL, MACHINE, median_ms=2.0, pass_number=2, passes=3, cpu_wait_pct=0.0, ratio=1.5)
    again = Record.from_json(row.to_json())
    assert (again.pass_number, again.passes, again.cpu_wait_pct, again.ratio) == (2, 3, 0.0, 1.5)
    old = {k: v for k, v in row.to_dict().items() if k not in ("pass_number", "passes", "ratio")}
    assert Record.from_dict(old).pass_number is None
    for name in ("pass_number", "ratio_lo"):
        with pytest.raises(StoreError, match=f"{name} should be above 0"):
            Record.from_dict({**row.to_dict(), name: 0})


def test_runs_that_begin_in_one_second_have_names_of_their_own_that_sort_by_time() -> None:
    names = [new_run_id() for _ in range(20)]
    assert len(set(names)) == 20
    first, last = (name.partition("-")[0] for name in (names[0], names[-1]))
    assert first <= last

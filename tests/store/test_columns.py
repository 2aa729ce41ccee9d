"""Reading many rows: the quick ways give what parsing every line gives, and refuse what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest

from bratune.record import Record
from bratune.store import Store, read, read_fields, read_records
from bratune.store.columns import Columns, Unusual, parse_together
from bratune.store.index import Index

# Texts that could be taken for the end of a value, for another field or for another line.
TEXTS = (
    "",
    "gather",
    'a "quoted" word',
    "ends in \\",
    '\\"',
    ',"median_ms":7.0,',
    '{"schema":1,',
    "größe ☃",
    "a\nb",
    ",",
)


def some_rows(count: int, seed: int = 0) -> list[Record]:
    chance = random.Random(seed)

    def number() -> float | None:
        return chance.choice([None, 1, 1e-300, 3.25e17, chance.random()])

    return [
        Record(
            cell_id=f"{chance.randrange(5):016x}",
            outcome=chance.choice(["measured", "measured", "started"]),
            backend=chance.choice(TEXTS),
            config=json.dumps({"a": chance.choice(TEXTS)}),
            stage=chance.choice([None, 1, 4]),
            amp=chance.choice([None, True, False]),
            median_ms=number(),
            ci_hi_ms=number(),
            cell=json.dumps({"config": chance.choice(TEXTS), "median_ms": 1.0}),
        )
        for _ in range(count)
    ]


def parsed_one_by_one(path: Path, names: list[str], *, started: bool) -> dict[str, list[Any]]:
    rows = [row.to_dict() for row in read_records([path]) if started or row.outcome != "started"]
    return {name: [row[name] for row in rows] for name in names}


def same(found: Any, wanted: Any) -> bool:
    return bool(found == wanted) or (wanted is None and bool(pandas.isna(found)))


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "names",
    [["backend", "median_ms", "stage"], ["config", "amp", "cell", "outcome", "ci_hi_ms"], ["schema"], None],
    ids=lambda names: "all" if names is None else names[0],
)
def test_a_table_holds_what_the_lines_hold(
    tmp_path: Path, names: list[str] | None, seed: int, started: bool
) -> None:
    path = tmp_path / "a.jsonl"
    Store(path).extend(some_rows(60, seed))
    found = read(path, columns=names, started=started)
    wanted = parsed_one_by_one(path, list(found.columns), started=started)
    for name, column in wanted.items():
        assert len(found) == len(column)
        assert all(same(a, b) for a, b in zip(found[name].tolist(), column, strict=True)), name


def test_columns_have_the_kind_of_their_field() -> None:
    made = Columns(["backend", "median_ms", "stage", "batch"])
    made.add_rows([{"batch": 1, "stage": 2}, {"batch": 2}])
    table = made.table()
    assert [str(kind) for kind in table.dtypes[["median_ms", "stage", "batch"]]] == [
        "float64",
        "float64",
        "int64",
    ]
    assert str(table["backend"].dtype) == str(pandas.Series([""]).dtype)
    assert numpy.isnan(table["median_ms"]).all()
    assert len(Columns(["backend", "median_ms"]).table()) == 0


@pytest.mark.parametrize(
    "line",
    [
        b'{"schema":1,"cell_id":"torn{"schema":1,"backend":"gather"}\n',
        b"not json\n",
        b'{"schema":2,"backend":"gather"}\n',
        b'{"schema":1,"backend":"gather"}',
        b"[1]\n",
        b'{"schema":1},{"schema":1}\n',
    ],
)
def test_lines_that_are_no_records_are_not_taken_for_some(line: bytes) -> None:
    good = b'{"schema":1,"backend":"gather"}\n'
    with pytest.raises(Unusual):
        Columns(["backend"]).add_lines([good, line, good])
    if line.endswith(b"\n"):
        with pytest.raises(Unusual):
            parse_together([good, line, good])


@pytest.mark.parametrize("names", [["backend"], ["median_ms"], None])
def test_a_broken_line_is_named_whichever_columns_are_asked_for(
    tmp_path: Path, names: list[str] | None
) -> None:
    path = tmp_path / "a.jsonl"
    Store(path).extend(some_rows(3))
    with path.open("ab") as file:
        file.write(b'{"schema":1,"backend":"to{"schema":1,"backend":"gather"}\n')
    with pytest.warns(UserWarning, match=r"a\.jsonl, line 4: is not JSON"):
        assert len(read(path, columns=names, started=True)) == 3
    with pytest.warns(UserWarning, match="line 4"):
        assert len(list(read_fields([path]))) == 3


def test_a_number_that_is_a_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"schema":1,"median_ms":1.5}\n{"schema":1,"median_ms":"fast"}\n')
    for reader in (lambda: read(path, columns=["median_ms"]), lambda: list(read_records([path]))):
        with pytest.warns(UserWarning, match="line 2: median_ms should be a number and is 'fast'"):
            assert len(reader()) == 1


def test_batches_do_not_lose_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bratune.store.lines._BATCH_BYTES", 100)
    path = tmp_path / "a.jsonl"
    rows = [row.replace(outcome="measured") for row in some_rows(50)]
    Store(path).extend(rows)
    assert read(path, columns=["cell_id"])["cell_id"].tolist() == [row.cell_id for row in rows]
    assert list(read_records([path])) == rows


# --- the index --------------------------------------------------------------------------------


def test_an_index_gives_the_finished_rows_of_a_cell_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = some_rows(80)
    Store(path).extend(rows)
    index = Index(path)
    for number in range(5):
        name = f"{number:016x}"
        wanted = [row for row in rows if row.cell_id == name and row.outcome != "started"]
        assert index.rows(name) == wanted
    assert index.rows("nobody") == []
    assert len(Index(tmp_path / "nothing.jsonl")) == 0


def test_an_index_sees_what_is_added_later_and_never_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    index = Index(path)
    row = Record(cell_id="a", median_ms=1.0)
    line = row.to_json().encode() + b"\n"
    for end, wanted in ((20, 0), (len(line) - 1, 0), (len(line), 1)):
        path.write_bytes(line[:end])
        assert len(index.rows("a")) == wanted
    Store(path).append(row.replace(median_ms=2.0))
    assert [r.median_ms for r in index.rows("a")] == [1.0, 2.0]


def test_an_index_reads_the_file_that_takes_the_place_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Store(path).extend([Record(cell_id="a", median_ms=1.0), Record(cell_id="b", median_ms=2.0)])
    index = Index(path)
    (tmp_path / "new").write_text(Record(cell_id="b", median_ms=2.0).to_json() + "\n")
    (tmp_path / "new").replace(path)
    Store(path).append(Record(cell_id="b", median_ms=3.0))
    assert index.rows("a") == []
    assert [r.median_ms for r in index.rows("b")] == [2.0, 3.0]


@pytest.mark.parametrize("line", ["not json", '{"schema":2,"cell_id":"a"}'])
def test_an_index_names_a_line_that_it_cannot_read(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(Record(cell_id="a", median_ms=1.0).to_json() + "\n" + line + "\n")
    with pytest.warns(UserWarning, match=r"a\.jsonl, line 2: "):
        index = Index(path)
    assert [r.median_ms for r in index.rows("a")] == [1.0]

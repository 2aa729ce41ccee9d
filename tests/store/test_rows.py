"""Packed rows: what they hold is what one object per line holds, in a fraction of its memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from bratune import store
from bratune.record import Record
from bratune.store import Rows, Store, pool, read_records, read_rows
from bratune.studies.scale import rows as rows_of_a_sweep

NAMES = ("", "gather", "dense", 'a "quoted" word', "größe ☃")


def some_rows(count: int, seed: int = 0) -> list[Record]:
    chance = random.Random(seed)
    return [
        Record(
            cell_id=chance.choice([f"{chance.randrange(9):016x}", "short", "ähnlich"]),
            outcome=(outcome := chance.choice(["measured", "started", "oom"])),
            reason="no memory" if outcome == "oom" else "",
            part=chance.choice(["attention", "model"]),
            form=chance.choice(["", "plain"]),
            backend=chance.choice(NAMES),
            stage=chance.choice([None, 1, 4]),
            amp=chance.choice([None, True, False]),
            seed=chance.choice([0, 1, -5, 2**62 + 1]),
            median_ms=chance.choice([None, 1.5, 1e-300, 2.0]),
            ratio=chance.choice([None, 1.5]),
            cell=json.dumps({"a": chance.choice(NAMES)}),
        )
        for _ in range(count)
    ]


def written(path: Path, rows: list[Record]) -> list[Record]:
    """What `read_records` gives of rows that were written, without those that were only started."""
    Store(path).extend(rows)
    return [row for row in read_records([path]) if row.outcome != "started"]


@pytest.mark.parametrize("seed", range(3))
def test_packed_rows_are_the_records_that_were_written(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bratune.store.lines._BATCH_BYTES", 1000)  # several chunks
    wanted = written(tmp_path / "a.jsonl", some_rows(200, seed))
    found = read_rows([tmp_path])
    assert list(found) == wanted
    assert [found[0], found[-1], *found[3:5]] == [wanted[0], wanted[-1], *wanted[3:5]]
    assert list(Rows.of(wanted)) == wanted
    for name in {row.cell_id for row in wanted}:
        assert found.named(name) == [row for row in wanted if row.cell_id == name]
    assert found.named("nobody") == found.named("ñ") == []
    assert list(found.timed()) == [row for row in wanted if row.ok]


def test_no_rows_are_no_groups_and_no_table() -> None:
    for rows in (Rows.of([]), Rows.of([Record(outcome="started")]), Rows.of([])[:1], Rows.of([]).timed()):
        assert (len(rows), list(rows), list(rows.groups(["cell_id"])), rows.named("a")) == (0, [], [], [])
        assert (rows.different("gpu_key"), rows.sizes(["task"]), pool(rows)) == ([], [], [])


def test_a_field_that_is_not_needed_has_its_default(tmp_path: Path) -> None:
    wanted = written(tmp_path / "a.jsonl", some_rows(20))
    assert list(read_rows([tmp_path], without=["cell"])) == [row.replace(cell="") for row in wanted]


@pytest.mark.parametrize("names", [["cell_id"], ["backend", "stage", "amp"], ["median_ms", "seed"], ["task"]])
@pytest.mark.parametrize("together", [1, 7, 4096])
def test_groups_come_in_the_order_of_their_first_rows(
    tmp_path: Path, names: list[str], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bratune.store.rows._TOGETHER", together)
    rows = written(tmp_path / "a.jsonl", some_rows(100))
    wanted: dict[tuple[object, ...], list[Record]] = {}
    for row in rows:
        wanted.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    assert [list(group) for group in read_rows([tmp_path]).groups(names)] == list(wanted.values())
    several = [group for group in wanted.values() if len(group) > 1]
    assert [list(group) for group in read_rows([tmp_path]).groups(names, least=2)] == several


def test_a_row_of_an_earlier_version_and_one_without_a_reason_are_read_as_everywhere(tmp_path: Path) -> None:
    lines = [
        '{"schema":1,"part":"model","backend":"published","median_ms":2}',
        '{"schema":1,"outcome":"oom"}',
        '{"schema":1,"part":"model","backend":"gather","of_a_newer_version":[1]}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="line 2: a row with outcome 'oom' needs a reason"):
        found = list(read_rows([tmp_path]))
    with pytest.warns(UserWarning, match="line 2"):
        assert found == list(read_records([tmp_path]))
    assert [(row.form, row.backend) for row in found] == [("published", ""), ("plain", "gather")]


def test_a_group_that_is_too_large_for_objects_is_pooled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        Record(
            cell_id=f"{i % 3}", part="block", median_ms=1 + i / 50, ci_lo_ms=1.0, ci_hi_ms=3.0, n_samples=i
        )
        for i in range(30)
    ]
    rows[7] = rows[7].replace(outcome="crashed", reason="a signal", median_ms=None)
    wanted = pool(rows)
    monkeypatch.setattr("bratune.store.rows._MOST_OBJECTS", 3)
    assert pool(rows) == wanted
    assert [row.passes for row in wanted] == [10, 9, 10]


def rows_on_disk(path: Path, cells: int, passes: int) -> None:
    """Rows of a sweep, with numbers of their own."""
    chance = random.Random(0)
    Store(path).extend(
        row.replace(
            cell_id=f"{number:016x}",
            pass_number=one,
            **{name: chance.random() for name in ("median_ms", "p10_ms", "p90_ms", "min_ms", "images_per_s")},
        )
        for one in range(1, passes + 1)
        for number, row in enumerate(rows_of_a_sweep(cells))
    )


def bytes_of(made: Callable[[], object]) -> int:
    """What is allocated and still held when something is made."""
    tracemalloc.start()
    try:
        held = made()
        found, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held
    return found


def test_a_packed_row_needs_a_few_hundred_bytes(tmp_path: Path) -> None:
    """With 3 million rows and 2 GiB, 700 bytes are what there is for each; an object needs 1,700."""
    rows_on_disk(tmp_path / "a.jsonl", 500, 10)
    list(read_rows([tmp_path])[:1])  # what is imported is not counted
    packed = bytes_of(lambda: read_rows([tmp_path])) / 5000
    assert packed < 300
    held = read_rows([tmp_path])
    assert bytes_of(lambda: list(held[:1000])) / 1000 > 3 * packed


def test_the_index_of_a_store_needs_tens_of_bytes_a_row(tmp_path: Path) -> None:
    rows_on_disk(tmp_path / "a.jsonl", 3000, 1)
    len(Store(tmp_path / "a.jsonl").index())  # what is imported is not counted
    assert bytes_of(Store(tmp_path / "a.jsonl").index) / 3000 < 60


def test_pooled_rows_are_a_table_of_the_columns_of_read(tmp_path: Path) -> None:
    rows_on_disk(tmp_path / "a.jsonl", 50, 2)
    table, read = store.pooled([tmp_path]), store.read(tmp_path)
    assert list(table.columns) == list(read.columns)
    assert table["cell_id"].tolist() == read["cell_id"].tolist()[:50]
    assert set(table["passes"]) == {2}

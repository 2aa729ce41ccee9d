"""`bratune cache`: every subcommand on small stores, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest
from click.testing import CliRunner, Result

from bratune import store
from bratune.cell import Cell
from bratune.cli.cache import command
from bratune.errors import BratuneError, MissingPackageError, StoreError, UsageError
from bratune.machine import Machine, detect
from bratune.measure.settings import MeterSettings
from bratune.problem import Problem
from bratune.record import Record
from bratune.run.reuse import key_of, source_hash
from bratune.store import Store
from bratune.store import maintenance as upkeep

QUICK = MeterSettings.for_effort("quick")
CELL = Cell(
    part="attention",
    problem=Problem(batch=1, height=8, width=8, heads=1, head_dim=8, region=(2, 2), topk=2),
    backend="gather",
)
H100 = Machine(kind="cuda", device="cuda:0", gpu_key="h100", gpu_name="H100", compute_capability="9.0")


def row(
    cell: Cell = CELL, machine: Machine | None = None, median_ms: float = 2.0, run_id: str = "r1"
) -> Record:
    return Record.of(
        cell,
        machine or detect("cpu"),
        median_ms=median_ms,
        run_id=run_id,
        source_hash=source_hash(cell),
        sampling=QUICK.sampling,
    )


def started(cell: Cell = CELL, run_id: str = "r1") -> Record:
    return Record.of(cell, detect("cpu"), outcome="started", run_id=run_id)


def written(path: Path, *rows: Record) -> Path:
    Store(path).extend(rows)
    return path


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    if isinstance(result.exception, BratuneError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_ls_counts_rows_by_outcome(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", started(), row(), row(median_ms=3.0))
    text = call("ls", tmp_path).output
    assert str(path) in text
    assert "2 measured, 1 started" in text
    assert "cpu" in text


def test_show_prints_the_fields_of_a_cell_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", row(), row(CELL.replace(seed=1)))
    text = call("show", CELL.cell_id[:8], tmp_path).output
    assert "median_ms            2.0" in text
    assert text.count("cell_id") == 1


def test_why_says_hit_for_a_row_of_here_and_now(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", row())
    assert "hit: measured in run r1" in call("why", CELL.cell_id, tmp_path, "--device", "cpu").output


def test_why_names_the_field_that_changed(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", row().replace(torch="2.0.0"))
    text = call("why", CELL.cell_id, tmp_path, "--device", "cpu").output
    assert "miss" in text
    assert "torch: stored 2.0.0, asked 2." in text


@pytest.mark.parametrize(
    ("beginning", "error", "message"),
    [("zz", StoreError, "no cell .* begins with 'zz'"), ("", UsageError, "2 cells .* begin with ''")],
)
def test_a_cell_that_is_not_one_is_refused(
    tmp_path: Path, beginning: str, error: type[BratuneError], message: str
) -> None:
    written(tmp_path / "a.jsonl", row(), row(CELL.replace(seed=1)))
    with pytest.raises(error, match=message):
        call("show", beginning, tmp_path)


def test_merge_adds_what_is_missing_once(tmp_path: Path) -> None:
    a = written(tmp_path / "a.jsonl", row(), row(median_ms=3.0))
    b = written(tmp_path / "b.jsonl", row(median_ms=3.0), row(median_ms=4.0))
    assert "1 rows added" in call("merge", a, b).stderr
    assert "0 rows added" in call("merge", a, b).stderr
    assert [r.median_ms for r in Store(a).records()] == [2.0, 3.0, 4.0]


def test_merge_into_a_folder_writes_its_records_file(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", row())
    call("merge", tmp_path / "new", source)
    assert len(Store(tmp_path / "new" / "records.jsonl").records()) == 1


def test_import_keeps_kinds_of_machines_apart(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", row(), row(machine=H100))
    call("import", source, "--into", tmp_path / "runs")
    for key in ("cpu", "h100"):
        assert [r.gpu_key for r in Store(tmp_path / "runs" / key / "records.jsonl").records()] == [key]


def test_import_refuses_rows_of_nobody(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", row().replace(gpu_key=""))
    with pytest.raises(StoreError, match="which machine"):
        call("import", source, "--into", tmp_path / "runs")


def test_prune_says_what_would_go_and_touches_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", started(), row(), row(median_ms=3.0))
    before = path.read_bytes()
    assert "2 rows would be dropped" in call("prune", path).stderr
    assert path.read_bytes() == before


def test_prune_keeps_the_last_row_of_a_key_and_started_lines_without_an_outcome(tmp_path: Path) -> None:
    other = CELL.replace(seed=1)
    path = written(tmp_path / "a.jsonl", started(), row(), row(median_ms=3.0), started(other, run_id="r2"))
    call("prune", path, "--yes")
    assert [(r.outcome, r.median_ms) for r in Store(path).records()] == [("measured", 3.0), ("started", None)]


def test_prune_tells_versions_apart(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", row(), row().replace(torch="2.0.0"))
    assert upkeep.prune(path, key_of=key_of) == (0, 2)


def test_prune_can_keep_several(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", *(row(median_ms=float(i)) for i in range(1, 6)))
    assert upkeep.prune(path, keep=2, key_of=key_of) == (3, 2)
    assert [r.median_ms for r in Store(path).records()] == [4.0, 5.0]


def test_an_interrupted_prune_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl", row(), row(median_ms=3.0))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StoreError, match="No space left"):
        upkeep.prune(path, key_of=key_of)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_compact_reads_back_as_the_same_table(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = written(tmp_path / "a.jsonl", started(), row(), row(machine=H100, median_ms=3.0))
    target = tmp_path / "a.parquet"
    call("compact", path, "-o", target)
    compact = pandas.read_parquet(target)
    table = store.read(path)
    assert list(compact.columns) == list(table.columns)
    for name in ("median_ms", "gpu_key", "batch", "compute_capability", "amp"):
        assert compact[name].tolist() == table[name].tolist(), name


def test_compact_skips_a_torn_line_and_names_a_broken_one(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path, target = written(tmp_path / "a.jsonl", row(), started()), tmp_path / "a.parquet"
    with path.open("a") as file:
        file.write('{"schema":1,"torn')
    with pytest.warns(UserWarning, match="torn"):
        assert upkeep.compact([path], target) == 1
    for line, message in (
        ("]", "line 3: is not JSON"),
        ('{"schema":99}', "schema 99"),
        ('{"schema":1,"median_ms":"fast"}', "line 3: median_ms should be a number"),
    ):
        written(path)  # cuts the torn line
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]) + line + "\n")
        with pytest.warns(UserWarning, match=message):
            assert upkeep.compact([path], target) == 1
    assert len(pandas.read_parquet(target)) == 1  # the copy from before is still there
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.parquet"]


def test_prune_keeps_what_a_newer_version_wrote_into_a_row(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", row(), row(median_ms=3.0))
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:-1] + ',"of_tomorrow":1}'
    path.write_text("\n".join(lines) + "\n")
    assert upkeep.prune(path, key_of=key_of) == (1, 1)
    assert path.read_text() == lines[1] + "\n"


def test_merge_and_import_write_in_bounded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_AT_ONCE", 2)
    rows = [row(median_ms=float(i)) for i in range(1, 6)]
    source = written(tmp_path / "a.jsonl", *rows, *rows)
    assert upkeep.merge(tmp_path / "b.jsonl", [source]) == 5
    assert upkeep.merge(tmp_path / "b.jsonl", [source]) == 0
    assert list(upkeep.import_records(tmp_path / "runs", [source]).values()) == [5]
    assert Store(tmp_path / "b.jsonl").records() == rows


@pytest.mark.parametrize("text", ["no json", "[]", '{"no": 1}'])
def test_a_row_that_describes_no_cell_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = written(tmp_path / "a.jsonl", row().replace(cell=text))
    with pytest.raises(BratuneError, match="describes no cell"):
        call("why", CELL.cell_id, path, "--device", "cpu")


def test_compact_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match=r"bratune\[parquet\]"):
        upkeep.compact([written(tmp_path / "a.jsonl", row())], tmp_path / "a.parquet")


def test_compact_wants_a_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must be a \.parquet file"):
        call("compact", written(tmp_path / "a.jsonl", row()), "-o", tmp_path / "a.csv")

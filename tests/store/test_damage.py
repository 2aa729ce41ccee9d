"""Damaged stores: nothing that parses is deleted, what is no store stays, a bad line costs itself."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

from bratune.cli import run
from bratune.errors import StoreError
from bratune.record import LONGEST, Record
from bratune.store import Store, read, read_fields, read_records
from bratune.store.index import Index
from bratune.store.maintenance import BAD_SUFFIX, import_records, merge, prune, repair

GOOD = [Record(cell_id=f"{n:016x}", median_ms=float(n), gpu_key="cpu") for n in (1, 2, 3)]


def line(**fields: Any) -> bytes:
    return json.dumps({"schema": 1, "cell_id": "x", **fields}, separators=(",", ":")).encode()


# A line between good ones, and what is said of it.
BAD = {
    "not JSON": (b"not json", "is not JSON"),
    "two glued": (line(backend="to")[:-3] + line(), "is not JSON"),
    "list": (b"[1]", "is not a JSON object"),
    "NaN": (b'{"schema":1,"cell_id":"x","median_ms":NaN}', "median_ms should be a finite number and is nan"),
    "infinity": (b'{"schema":1,"cell_id":"x","median_ms":-Infinity}', "median_ms should be a finite number"),
    "overflow": (b'{"schema":1,"cell_id":"x","median_ms":1e999}', "median_ms should be a finite number"),
    "zero": (line(median_ms=0), "median_ms should be above 0 and is 0"),
    "negative": (line(median_ms=-1.5), "median_ms should be above 0 and is -1.5"),
    "negative memory": (line(median_ms=1.0, peak_alloc_mb=-3), "peak_alloc_mb should be above 0 and is -3"),
    "400 digits": (
        b'{"schema":1,"cell_id":"x","batch":' + b"9" * 400 + b"}",
        "batch should be a finite number",
    ),
    "5000 digits": (b'{"schema":1,"cell_id":"x","batch":' + b"9" * 5000 + b"}", "is not JSON"),
    "text for number": (line(median_ms="fast"), "median_ms should be a number and is 'fast'"),
    "yes for number": (line(median_ms=True), "median_ms should be a number and is True"),
    "number for text": (line(median_ms=1.0, backend=7), "backend should be a text and is 7"),
    "half of one": (line(batch=1.5), "batch should be a whole number and is 1.5"),
    "words for numbers": (line(topk="1,many"), "topk should be whole numbers and is '1,many'"),
    "half a region": (line(region="8"), "region should be whole numbers and is '8'"),
    "of something else": (b'{"loss":1,"model":"mine"}', "is not a record: it has none of cell_id, outcome"),
    "half a character": (b'{"schema":1,"cell_id":"x","backend":"\\ud800"}', "backend holds half a character"),
    "no text": (b'{"schema":1,"cell_id":"x","backend":"\xff\xfe"}', "is not text"),
    "deep": (b'{"schema":1,"cell":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests too deep"),
    "zeros": (b"\0" * 5000, "is not JSON"),
    "zeros before": (b"\0" * 100 + line(median_ms=1.0), "is not JSON"),
    "newer": (line(schema=99), "have schema 99"),
    "schema yes": (line(schema=True), "have schema True"),
    "unknown outcome": (line(outcome="fine"), "outcome 'fine' is not known"),
    "huge": (b'{"schema":1,"cell_id":"x","reason":"' + b"y" * LONGEST + b'"}', "is longer than 16 MiB"),
}


def damaged(path: Path, bad: bytes) -> Path:
    lines = [row.to_json().encode() for row in GOOD]
    path.write_bytes(b"\n".join([lines[0], bad, *lines[1:]]) + b"\n")
    return path


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_costs_itself(tmp_path: Path, kind: str) -> None:
    bad, said = BAD[kind]
    path = damaged(tmp_path / "a.jsonl", bad)
    with pytest.warns(UserWarning, match="line 2: ") as seen:
        assert list(read_records([path])) == GOOD
    assert any(said in str(w.message) for w in seen)
    assert any(f"bratune cache repair {path}" in str(w.message) for w in seen)
    with pytest.warns(UserWarning, match="line 2: "):
        assert read(path)["median_ms"].tolist() == [1.0, 2.0, 3.0]
    with pytest.warns(UserWarning, match="line 2: "):
        assert [row["median_ms"] for row in read_fields([path])] == [1.0, 2.0, 3.0]


# What is wrong in a column that nobody asked for may stay unseen.
UNSEEN = ("number for text", "deep", "words for numbers", "half a region")


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind not in UNSEEN])
def test_a_bad_line_never_enters_a_column_that_is_asked_for(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path / "a.jsonl", BAD[kind][0])
    names = ["cell_id", "median_ms", "batch", "backend", "outcome", "peak_alloc_mb"]
    with pytest.warns(UserWarning, match="line 2: "):
        assert read(path, columns=names)["median_ms"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_does_not_keep_an_index_from_the_others(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path / "a.jsonl", BAD[kind][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = Index(path)
        assert [index.rows(row.cell_id) for row in GOOD] == [[row] for row in GOOD]
        assert index.rows("x") == []


@pytest.mark.parametrize("kind", BAD)
def test_repair_sets_a_bad_line_aside_as_it_is(tmp_path: Path, kind: str) -> None:
    path = damaged(tmp_path / "a.jsonl", BAD[kind][0])
    before = path.read_bytes()
    ((number, why),) = repair(path, rewrite=False)
    assert (number, path.read_bytes()) == (2, before)
    assert BAD[kind][1] in why
    repair(path)
    assert Path(f"{path}{BAD_SUFFIX}").read_bytes() == BAD[kind][0] + b"\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read_records([tmp_path])) == GOOD
    assert repair(path) == []


def test_repair_completes_a_last_record_and_sets_half_of_one_aside(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = b"\n".join(row.to_json().encode() for row in GOOD)
    path.write_bytes(b"\xef\xbb\xbf" + whole + b"\nbad")
    assert [number for number, _ in repair(path)] == [4]
    assert path.read_bytes() == whole + b"\n"


def test_a_link_to_records_stays_one_when_they_are_repaired(tmp_path: Path) -> None:
    path = damaged(tmp_path / "a.jsonl", b"not json")
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert len(repair(link)) == 1
    assert link.is_symlink()
    assert list(read_records([path])) == GOOD


def test_the_command_says_first_and_repairs_with_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(tmp_path / "a.jsonl", b"not \x1b[2J json")
    assert run(["cache", "repair", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "line 2: is not JSON" in said.out
    assert "1 lines would be set aside" in said.err
    assert run(["cache", "repair", str(path), "--yes"]) == 0
    assert list(read_records([path])) == GOOD


@pytest.mark.parametrize(
    "content", [b"my only copy", b"a\nb\n", b'{\n  "kind": "plan"\n}\n', b"\0" * 9000, b"PK\3\4"]
)
def test_a_file_that_is_no_store_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    source = tmp_path / "source.jsonl"
    Store(source).extend(GOOD)
    with pytest.raises(StoreError, match="holds something else than records"):
        Store(path)
    with pytest.raises(StoreError, match="holds something else than records"):
        merge(path, [source])
    with pytest.raises(StoreError):
        repair(path)
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "source.jsonl"]


def test_a_complete_last_record_without_newline_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(row.to_json().encode() for row in GOOD))
    Store(path).append(GOOD[0])
    assert list(read_records([path])) == [*GOOD, GOOD[0]]


@pytest.mark.parametrize(
    "tail",
    [b"my notes", GOOD[0].to_json().encode() + b"!", b"\0\0" + GOOD[0].to_json().encode(), b"[1, 2]"],
)
def test_what_follows_the_last_newline_is_kept_where_it_is_no_half_record(
    tmp_path: Path, tail: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    Store(path).extend(GOOD)
    before = path.read_bytes()
    path.write_bytes(before + tail)
    Store(path)
    assert path.read_bytes() == before + tail + b"\n"


@pytest.mark.parametrize("end", [1, 5, 12, 40])
def test_the_beginning_of_a_record_is_cut_wherever_it_ends(tmp_path: Path, end: int) -> None:
    path = tmp_path / "a.jsonl"
    torn = GOOD[0].to_json().encode()[:end]
    for before in (b"", GOOD[1].to_json().encode() + b"\n"):
        path.write_bytes(before + torn)
        Store(path)
        assert path.read_bytes() == before


def test_zeros_that_a_crash_left_at_the_end_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Store(path).extend(GOOD)
    before = path.read_bytes()
    path.write_bytes(before + b"\0" * 4096)
    Store(path)
    assert path.read_bytes() == before


def test_a_mark_at_the_beginning_hides_no_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(row.to_json().encode() + b"\n" for row in GOOD))
    assert list(read_records([path])) == GOOD
    assert Index(path).rows(GOOD[0].cell_id) == [GOOD[0]]
    Store(path).append(GOOD[0])
    assert len(read(path)) == 4


def test_escapes_in_a_text_are_spelled_out_however_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Store(path).append(GOOD[0].replace(gpu_name="\x1b[2J\u202e", reason="a\nb"))
    (row,) = read_records([path])
    assert (row.gpu_name, row.reason) == (r"\x1b[2J\u202e", "a\nb")
    for columns in (["gpu_name"], None):
        assert read(path, columns=columns)["gpu_name"].tolist() == [r"\x1b[2J\u202e"]


@pytest.mark.parametrize("key", ["../out", "/tmp/out", "a/b", "..", ".hidden", "a\0b"])
def test_an_import_writes_only_inside_its_folder(tmp_path: Path, key: str) -> None:
    source = tmp_path / "in" / "a.jsonl"
    Store(source).extend([GOOD[0], GOOD[1].replace(gpu_key=key)])
    with pytest.raises(StoreError, match="which is no key"):
        import_records(tmp_path / "runs", [source])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_many_bad_lines_are_counted_and_few_are_named(tmp_path: Path) -> None:
    path = damaged(tmp_path / "a.jsonl", b"\n".join([b"not json"] * 50))
    with pytest.warns(UserWarning, match="50 lines are no records") as seen:
        assert list(read_records([path])) == GOOD
    assert sum("this line is left out" in str(w.message) for w in seen) == 3


def test_records_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    for umask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            path = tmp_path / f"{umask:o}.jsonl"
            Store(path).extend(GOOD)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == mode


def test_a_folder_is_read_past_what_else_lies_in_it(tmp_path: Path) -> None:
    Store(tmp_path / "a.jsonl").extend(GOOD)
    (tmp_path / ".#a.jsonl").symlink_to("me@host.1234:5678")  # an editor's mark
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "log.jsonl").write_text('{"loss": 1}\n' * 3)
    (tmp_path / "empty.jsonl").touch()
    with pytest.warns(UserWarning, match=r"log\.jsonl holds something else than records and is left out"):
        assert list(read_records([tmp_path])) == GOOD
    with pytest.warns(UserWarning, match="left out"):
        assert len(read(tmp_path)) == 3
    with pytest.raises(StoreError, match="is not a record"):
        list(read_records([tmp_path / "log.jsonl"]))
    (tmp_path / "a.jsonl").unlink()
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(StoreError, match=r"log\.jsonl, line 1: is not a record"),
    ):
        list(read_records([tmp_path]))


@pytest.mark.parametrize("verb", ["repair", "prune"])
def test_upkeep_of_a_folder_leaves_what_is_no_store_and_does_the_rest(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = b'{"loss": 1}\n{"loss": 2'  # half a line, and of somebody else
    (tmp_path / "a.jsonl").write_bytes(other)
    started = Record(cell_id="a", run_id="r", outcome="started")
    path = damaged(tmp_path / "b.jsonl", b"not json" if verb == "repair" else started.to_json().encode())
    Store(path).append(Record(cell_id="a", run_id="r", median_ms=1.0))
    before = len(path.read_bytes().splitlines())
    assert run(["cache", verb, str(tmp_path), "--yes"]) == 1
    assert "a.jsonl" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == other
    assert len(path.read_bytes().splitlines()) == before - 1
    assert run(["cache", "ls", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "a.jsonl  no records: " in said
    assert "4 measured" in said


def test_prune_keeps_what_a_pass_in_flight_has_claimed(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl")
    started = Record(cell_id="a", run_id="r", outcome="started", pass_number=1, passes=2)
    other = started.replace(pass_number=2)
    store.extend([started, other, Record(cell_id="a", run_id="r", median_ms=1.0, pass_number=1, passes=2)])
    assert prune(store.path, key_of=lambda row: row.cell_id) == (1, 2)
    assert [row for row in store.records() if row.outcome == "started"] == [other]


def test_an_index_goes_on_in_the_file_that_takes_the_place_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl")
    store.extend([*GOOD, Record(cell_id="b", run_id="r", outcome="started")])
    index = store.index()
    assert len(index.unfinished("b")) == 1
    with store.path.open("ab") as file:
        file.write(b"not json\n")
    assert len(repair(store.path)) == 1
    store.append(GOOD[0].replace(run_id="another"))
    assert [row.run_id for row in index.rows(GOOD[0].cell_id)] == ["", "another"]
    store.append(Record(cell_id="b", run_id="r", median_ms=1.0))
    assert index.unfinished("b") == []
    store.path.unlink()
    assert len(index.rows(GOOD[0].cell_id)) == 2  # what was read is there


def test_report_and_compare_go_on_past_a_bad_line(tmp_path: Path) -> None:
    path = damaged(tmp_path / "a.jsonl", b"not json")
    with pytest.warns(UserWarning, match="line 2"):
        assert run(["report", str(path), "-o", str(tmp_path / "r.html")]) == 0
    with pytest.warns(UserWarning, match="line 2"):
        assert run(["cache", "ls", str(path)]) == 0

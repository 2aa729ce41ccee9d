"""The store: append only, one line each, torn lines, full disks, several writers."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from bratune.errors import StoreError, UnknownNameError
from bratune.record import Record
from bratune.store import Store, locked, read, read_records, record_files


def row(number: int, **values: object) -> Record:
    return Record(cell_id=f"{number:016x}", median_ms=float(number), **values)  # type: ignore[arg-type]


def test_rows_come_back_in_the_order_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "er" / "records.jsonl")
    for number in range(1, 6):
        store.append(row(number))
    assert [r.median_ms for r in store.records()] == [1, 2, 3, 4, 5]


def test_samples_go_beside_the_records_and_are_not_read_as_records(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.append(row(1), samples_ms=[1.0, 2.00000001])
    (line,) = store.samples_path.read_text().splitlines()
    assert json.loads(line)["samples_ms"] == [1.0, 2.0]
    assert record_files([tmp_path]) == [store.path]


def test_a_torn_last_line_is_skipped_with_a_warning_and_cut_by_the_next_writer(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.append(row(1))
    with store.path.open("a") as file:
        file.write('{"cell_id": "tor')
    with pytest.warns(UserWarning, match="torn"):
        assert len(store.records()) == 1
    Store(store.path).append(row(2))
    assert [r.median_ms for r in store.records()] == [1, 2]


def test_a_torn_line_longer_than_the_search_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Store(path).append(row(1))
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"schema":1,"reason":"' + b"x" * 200_000)
    Store(path)
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(row(1).to_json() + "\nnot json\n" + row(2).to_json() + "\n")
    with pytest.warns(UserWarning, match="line 2: is not JSON"):
        found = list(read_records([path]))
    assert [r.median_ms for r in found] == [1, 2]


def test_a_file_without_a_single_record_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("not json\nnor this\n")
    with pytest.warns(UserWarning, match="line 2"), pytest.raises(StoreError, match="line 1: is not JSON"):
        list(read_records([path]))


def test_a_row_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    with pytest.raises(StoreError, match="median_ms should be above 0 and is 0"):
        store.append(row(0))
    assert store.records() == []


def test_started_lines_are_left_out_of_the_table_unless_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.append(Record(cell_id="a", outcome="started"))
    store.append(row(1))
    assert len(read(store.path)) == 1
    assert len(read([tmp_path], started=True)) == 2
    assert read(tmp_path)["median_ms"].tolist() == [1.0]


def test_a_missing_place_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        read(tmp_path / "nothing")
    with pytest.raises(StoreError, match="holds no records"):
        read(tmp_path)


@pytest.mark.parametrize("place", ["a-file/records.jsonl", "a-folder"])
def test_an_unwritable_place_is_known_before_anything_is_measured(tmp_path: Path, place: str) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "a-folder").mkdir()
    with pytest.raises(StoreError, match="records cannot be written"):
        Store(tmp_path / place)


def test_a_full_disk_leaves_earlier_records_intact(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.append(row(1))
    before = store.path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))  # the next line will not fit
        with pytest.raises(StoreError, match="records cannot be written"):
            store.append(row(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert store.path.read_bytes() == before
    store.append(row(3))
    assert [r.median_ms for r in store.records()] == [1, 3]


def _write(path: Path, writer: int) -> None:
    store = Store(path)
    for number in range(1, 21):
        store.append(row(100 * writer + number, reason="x" * 2000))


def test_several_processes_share_a_file_without_mixing_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [r.median_ms for r in Store(path).records()]
    assert len(found) == 60
    for n in range(3):
        own = [m for m in found if m is not None and 100 * n <= m < 100 * n + 100]
        assert own == sorted(own)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        Store(tmp_path / "records.jsonl")


def test_read_gives_the_columns_that_are_asked_for_in_their_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.extend([row(2, backend="dense"), row(1, backend="gather")])
    found = read(store.path, columns=["median_ms", "backend", "reason"])
    assert list(found.columns) == ["median_ms", "backend", "reason"]
    assert found.values.tolist() == [[2.0, "dense", ""], [1.0, "gather", ""]]
    with pytest.raises(UnknownNameError, match=r"no column is called 'medain_ms'.*did you mean median_ms"):
        read(store.path, columns=["medain_ms"])


def test_a_file_system_without_locks_is_said_with_what_would_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(
        StoreError, match=r"no locks \(No locks available\); a folder on a local disk would work"
    ):
        Store(tmp_path / "records.jsonl")


def test_a_writer_that_waited_while_the_file_was_replaced_writes_into_the_new_one(tmp_path: Path) -> None:
    store = Store(tmp_path / "records.jsonl")
    store.append(row(1))
    with locked(store.path):
        waiting = threading.Thread(target=store.append, args=(row(2),))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        (tmp_path / "new").write_text(row(3).to_json() + "\n")
        (tmp_path / "new").replace(store.path)
    waiting.join()
    assert [r.median_ms for r in store.records()] == [3, 2]

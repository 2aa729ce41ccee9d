"""Time that threads wait for a processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from bratune.measure import waiting
from bratune.measure.waiting import Waiting


def thread(folder: Path, name: str, waited_ns: int) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "schedstat").write_text(f"123456 {waited_ns} 7\n")


def test_the_thread_that_waited_longest_counts_from_lap_to_lap(tmp_path: Path) -> None:
    thread(tmp_path, "1", 5_000_000)
    thread(tmp_path, "2", 1_000_000)
    clock = Waiting(tmp_path)
    assert clock.lap_ms() == 0
    thread(tmp_path, "1", 6_000_000)
    thread(tmp_path, "2", 4_000_000)
    assert clock.lap_ms() == 3.0
    assert clock.lap_ms() == 0
    clock.close()


def test_a_thread_that_began_later_counts_once_it_was_seen(tmp_path: Path) -> None:
    thread(tmp_path, "1", 0)
    clock = Waiting(tmp_path)
    thread(tmp_path, "2", 9_000_000)
    clock.refresh()
    assert clock.lap_ms() == 0  # what it waited before is no part of this lap
    thread(tmp_path, "2", 11_000_000)
    assert clock.lap_ms() == 2.0
    clock.close()


def test_without_counters_an_involuntary_switch_is_a_slice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((10, 10, 12))
    monkeypatch.setattr(waiting, "_switches", lambda: next(counts))
    clock = Waiting(tmp_path)
    assert clock.lap_ms() == 6.0


def test_this_process_is_counted() -> None:
    clock = Waiting()
    assert clock._files
    assert clock.lap_ms() >= 0
    clock.close()

"""Processor time that the host of a virtual machine gave to others."""

from __future__ import annotations

from pathlib import Path

import pytest

from bratune.machine import detect
from bratune.measure.cpu import CpuDevice
from bratune.measure.stolen import STOLEN, StolenTime


def write(path: Path, *, user: int, idle: int, steal: int) -> None:
    path.write_text(f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 {user} 0 0 {idle} 0 0 0 {steal} 0 0\n")


def test_the_share_is_of_the_time_that_was_wanted_since_the_last_question(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    write(stat, user=100, idle=0, steal=50)
    stolen = StolenTime(stat)
    assert stolen.share() == 0.0
    write(stat, user=130, idle=900, steal=60)
    assert stolen.share() == pytest.approx(0.25)
    assert stolen.share() == 0.0
    write(stat, user=140, idle=990, steal=60)
    assert stolen.share() == 0.0


@pytest.mark.parametrize(
    "text", [None, "", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8 9\n", "cpu a b c d e f g h\n"]
)
def test_where_nothing_is_counted_nothing_was_stolen(tmp_path: Path, text: str | None) -> None:
    stat = tmp_path / "stat"
    if text is not None:
        stat.write_text(text)
    stolen = StolenTime(stat)
    assert stolen.share() == 0.0


def test_a_reading_of_the_cpu_names_it_and_discards_nothing(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    write(stat, user=100, idle=0, steal=0)
    device = CpuDevice(detect("cpu"), StolenTime(stat))
    write(stat, user=109, idle=0, steal=1)
    reading = device.read()
    assert reading.throttle_reasons == (STOLEN,)
    assert not reading.throttled
    write(stat, user=200, idle=0, steal=2)
    assert device.read().throttle_reasons == ()

"""Energy on a simulated board whose power is known, read through a stand-in for NVML."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from bratune.errors import MeasureError
from bratune.machine import Machine
from bratune.measure.energy import energy_fields, measure_energy
from bratune.measure.telemetry import Telemetry

IDLE_W, BUSY_W = 70.0, 400.0


class Board:
    """A board with a clock: it draws 70 W, and 400 W while a call of 5 ms runs.

    Args:
        counter: Whether it has an energy counter, which then moves every ``step_s``.
        power: Whether it tells its power.
        processes: Process ids on it.
    """

    def __init__(
        self,
        *,
        counter: bool = True,
        power: bool = True,
        step_s: float = 0.02,
        processes: tuple[int, ...] = (),
        frozen: bool = False,
    ) -> None:
        self.now = self.joules = 0.0
        self.busy_w = IDLE_W
        self.counter, self.power, self.step_s, self.frozen = counter, power, step_s, frozen
        self.pids = processes or (os.getpid(),)
        self.calls = 0
        self._seen, self._seen_at = 0.0, 0.0

    def pass_time(self, seconds: float, watts: float) -> None:
        self.now += seconds
        self.joules += seconds * watts
        self.busy_w = watts

    def call(self) -> None:
        self.calls += 1
        self.pass_time(0.005, BUSY_W)

    def sleep(self, seconds: float) -> None:
        self.pass_time(seconds, IDLE_W)

    def clock(self) -> float:
        return self.now

    # what NVML would say

    def nvmlDeviceGetFieldValues(self, handle: Any, ids: list[int]) -> list[Any]:
        missing = [SimpleNamespace(nvmlReturn=3, valueType=0, value=SimpleNamespace(dVal=0.0))]
        if ids == [83] and self.counter:
            if self.now - self._seen_at >= self.step_s and not self.frozen:
                self._seen, self._seen_at = self.joules, self.now
            value = SimpleNamespace(ullVal=round(self._seen * 1e3))
            return [SimpleNamespace(nvmlReturn=0, valueType=3, value=value)]
        if ids == [186] and self.power:
            return [
                SimpleNamespace(nvmlReturn=0, valueType=1, value=SimpleNamespace(uiVal=self.busy_w * 1e3))
            ]
        return missing

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in self.pids]


def measure(board: Board) -> Any:
    return measure_energy(
        board.call, Telemetry(board, "handle"), wait=lambda: None, clock=board.clock, sleep=board.sleep
    )


@pytest.mark.parametrize("counter", [True, False])
def test_joules_per_call_are_power_times_time(counter: bool) -> None:
    found = measure(Board(counter=counter))
    assert found.joules == pytest.approx(BUSY_W * 0.005, rel=0.02)
    assert found.power_w == pytest.approx(BUSY_W, rel=0.02)
    assert found.idle_w == pytest.approx(IDLE_W, rel=0.05)
    assert found.method == ("counter" if counter else "integrated")


@pytest.mark.parametrize("counter", [True, False])
def test_every_window_lasts_a_second(counter: bool) -> None:
    found = measure(Board(counter=counter))
    assert found.windows == 3
    assert found.window_s >= 0.98
    assert "3 windows of 1.0 s" in found.describe()
    assert "idle 70 W included" in found.describe()


def test_a_slow_counter_gets_longer_windows_until_twenty_steps() -> None:
    found = measure(Board(step_s=0.1))
    assert found.ticks >= 20
    assert found.window_s >= 2.0
    assert found.joules == pytest.approx(BUSY_W * 0.005, rel=0.02)


def test_a_counter_that_does_not_move_gives_nothing() -> None:
    assert measure(Board(frozen=True)) is None


def test_a_board_that_tells_nothing_gives_nothing_and_is_not_kept_busy() -> None:
    board = Board(counter=False, power=False)
    assert measure(board) is None
    assert board.calls == 0


def test_another_process_makes_the_energy_nobodys() -> None:
    with pytest.raises(MeasureError, match="1 other process"):
        measure(Board(processes=(os.getpid(), 4242)))


def test_a_machine_without_sensors_leaves_the_fields_empty() -> None:
    cpu = Machine(kind="cpu", device="cpu", gpu_key="cpu", gpu_name="CPU")
    assert energy_fields(lambda: None, cpu, 1) == {}

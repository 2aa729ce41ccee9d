"""Energy: joules of a call, from the board's own meter.

NVML counts millijoules since the driver was loaded, on boards since Volta; the counter moves in steps of
10 ms and more, so a window lasts at least a second and at least twenty steps. Where the counter is missing,
power is read while the call repeats and integrated, which is coarser and says so (`Energy.method`). The board
draws power when it does nothing, too: that baseline is measured first and recorded, not subtracted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bratune.errors import MeasureError
from bratune.machine import Machine
from bratune.measure.telemetry import Telemetry, open_telemetry

__all__ = ["Energy", "energy_fields", "measure_energy"]

WINDOW_S = 1.0
WINDOWS = 3
LEAST_TICKS = 20
# A window that has not seen enough steps of the counter by then is not worth waiting for.
LONGEST_WINDOW_S = 10.0
IDLE_S = 1.0
# How often the idle baseline and a board without a counter are read.
POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What a call costs.

    Attributes:
        joules: Energy of the whole board per call, idle share included; median over the windows.
        power_w: Mean power over the windows.
        idle_w: Power of the board with this process on it and nothing running.
        window_s: Mean length of a window.
        windows: How many there were.
        ticks: Fewest steps of the counter (or readings of power) in a window.
        method: ``counter`` or ``integrated``.
        spread_pct: Range of the windows in per cent of their median.
    """

    joules: float
    power_w: float
    idle_w: float
    window_s: float
    windows: int
    ticks: int
    method: str
    spread_pct: float

    def describe(self) -> str:
        """The method as a record keeps it: how, how long, how even, and the idle power."""
        return (
            f"{self.method}, {self.windows} windows of {self.window_s:.1f} s, "
            f"spread {self.spread_pct:.0f} %, idle {self.idle_w:.0f} W included"
        )


@dataclass(frozen=True)
class _Window:
    joules: float
    seconds: float
    calls: int
    ticks: int


def measure_energy(
    call: Callable[[], object],
    telemetry: Telemetry,
    *,
    wait: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy | None:
    """The energy of a call, repeated for some seconds.

    Args:
        call: Runs the work once, without waiting for the device.
        telemetry: Sensors of the board that it runs on.
        wait: Waits until the device is done.
        clock: Seconds that only grow.
        sleep: Lets time pass.

    Returns:
        None where the board tells neither energy nor power.

    Raises:
        MeasureError: another process works on the board, whose energy cannot be told apart.
    """
    counter = telemetry.energy_j() is not None
    if not counter and telemetry.power_w() is None:
        return None
    foreign = telemetry.foreign_processes(holds_context=True)
    if foreign:
        raise MeasureError(
            f"{foreign} other process(es) use the board, so its energy is not this call's alone"
        )
    call()
    wait()
    idle_w = _idle_power(telemetry, counter, clock, sleep)
    take = _counted_window if counter else _integrated_window
    take(call, telemetry, wait, clock)  # warms the board up; cold silicon leaks less
    windows = [take(call, telemetry, wait, clock) for _ in range(WINDOWS)]
    per_call = [w.joules / w.calls for w in windows]
    middle = statistics.median(per_call)
    if middle <= 0:
        return None  # a counter that does not move
    return Energy(
        joules=middle,
        power_w=sum(w.joules for w in windows) / sum(w.seconds for w in windows),
        idle_w=idle_w,
        window_s=statistics.fmean(w.seconds for w in windows),
        windows=len(windows),
        ticks=min(w.ticks for w in windows),
        method="counter" if counter else "integrated",
        spread_pct=100 * (max(per_call) - min(per_call)) / middle,
    )


def _idle_power(
    telemetry: Telemetry, counter: bool, clock: Callable[[], float], sleep: Callable[[float], None]
) -> float:
    """Watts while nothing runs: the mean of readings, or the counter's rate where power is not told."""
    start, before, readings = clock(), telemetry.energy_j(), []
    while clock() - start < IDLE_S:
        sleep(POLL_S)
        power = telemetry.power_w()
        if power is not None:
            readings.append(power)
    if readings:
        return statistics.fmean(readings)
    after = telemetry.energy_j()
    assert counter
    assert before is not None
    assert after is not None
    return (after - before) / (clock() - start)


def _counted_window(
    call: Callable[[], object],
    telemetry: Telemetry,
    wait: Callable[[], None],
    clock: Callable[[], float],
) -> _Window:
    """From one step of the counter to another, so that no part of a step is lost."""
    last = _next_step(telemetry, call, wait, clock)
    start, first, calls, ticks = clock(), last, 0, 0
    while True:
        call()
        wait()
        calls += 1
        now = telemetry.energy_j()
        if now is not None and now > last:
            last, ticks = now, ticks + 1
            seconds = clock() - start
            if seconds >= WINDOW_S and (ticks >= LEAST_TICKS or seconds >= LONGEST_WINDOW_S):
                return _Window(last - first, seconds, calls, ticks)
        elif clock() - start >= LONGEST_WINDOW_S:
            return _Window(last - first, clock() - start, calls, ticks)


def _next_step(
    telemetry: Telemetry, call: Callable[[], object], wait: Callable[[], None], clock: Callable[[], float]
) -> float:
    first, start = telemetry.energy_j() or 0.0, clock()
    while clock() - start < WINDOW_S:
        call()
        wait()
        now = telemetry.energy_j()
        if now is not None and now > first:
            return now
    return first


def _integrated_window(
    call: Callable[[], object],
    telemetry: Telemetry,
    wait: Callable[[], None],
    clock: Callable[[], float],
) -> _Window:
    """Power by the trapezoid rule, read between calls."""
    start = clock()
    at, power = start, telemetry.power_w() or 0.0
    joules, calls, ticks = 0.0, 0, 0
    while clock() - start < WINDOW_S or ticks < 2:
        call()
        wait()
        calls += 1
        now = clock()
        if now - at >= POLL_S:
            reading = telemetry.power_w()
            reading = power if reading is None else reading
            joules += (now - at) * (power + reading) / 2
            at, power, ticks = now, reading, ticks + 1
    return _Window(joules, at - start, calls, ticks)


def energy_fields(call: Callable[[], object], machine: Machine, images: int) -> dict[str, Any]:
    """The energy fields of a record; empty on a CPU and where the board does not tell.

    Args:
        call: Runs the work once on the machine's device.
        machine: Where.
        images: Images per call.

    Returns:
        ``joules_per_image``, ``power_w`` and ``energy_method``; only ``energy_method``, with the reason,
        where another process makes the energy nobody's.
    """
    if not machine.is_cuda:
        return {}
    import torch

    with open_telemetry(machine) as telemetry:
        try:
            found = measure_energy(call, telemetry, wait=lambda: torch.cuda.synchronize(machine.device))
        except MeasureError as error:
            return {"energy_method": f"not measured: {error}"}
    if found is None:
        return {}
    return {
        "joules_per_image": found.joules / images,
        "power_w": found.power_w,
        "energy_method": found.describe(),
    }

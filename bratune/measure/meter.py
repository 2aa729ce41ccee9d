"""Meter: from a call to a measurement.

    >>> from bratune import machine
    >>> meter = meter_for(machine.detect())
    >>> m = meter.measure(lambda: a @ b, MeterSettings.for_effort("quick"))
    >>> m.median_ms, m.ci_lo_ms, m.ci_hi_ms, m.stop_reason

One loop serves every device (`DeviceMeter`); what differs stands behind `bratune.measure.device.Device`.
Whether the call computes the right thing is not asked here: `bratune.measure.gate` comes first.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics as means
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bratune.machine import Machine
from bratune.measure.device import Call, Device, Memory, Sample
from bratune.measure.settings import EFFORTS, MeterSettings, parse_percent, parse_seconds
from bratune.measure.statistics import median, median_interval, quantile, relative_noise_pct
from bratune.measure.stopping import StopRule
from bratune.measure.telemetry import Reading

__all__ = [
    "EFFORTS",
    "DeviceMeter",
    "Measurement",
    "Meter",
    "MeterSettings",
    "device_for",
    "meter_for",
    "parse_percent",
    "parse_seconds",
]

# Sensors are read between windows, never inside a sample: one NVML query may take a millisecond.
_WINDOW_S = 0.05
# After a throttled window the device rests, each time longer, so that it can cool.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Samples of one call and the state of the device while they were taken.

    Attributes:
        samples_ms: Kept samples in the order taken, in milliseconds.
        n_discarded: Samples thrown away because the device was throttled.
        stop_reason: Why sampling ended (see `bratune.measure.stopping`); says so when every sample was
            throttled and therefore none was discarded.
        compile_s: Seconds of compiling or capturing before the first sample; None in the eager regime.
        host_ms: Median time until the host had enqueued the call; None on a CPU.
        launch_bound: The host, not the device, sets the pace; None on a CPU.
        peak_alloc_mb: Most memory allocated at once, inputs and weights included, in 10**6 bytes.
        peak_reserved_mb: Most that the caching allocator held; None on a CPU.
        workspace_mb: Peak beyond what was live before the call, its output included.
        flush_mb: Bytes written to flush the last-level cache before each sample; 0 when it was kept warm.
        sm_clock_mhz: Median SM clock over the sampling windows.
        temp_c: Highest temperature.
        power_w: Mean power over the windows.
        throttle_reasons: What slowed the device down in any window, sorted.
        foreign_processes: Other processes seen on the device before or after; None when unknown.
        run: What was timed: the call itself, or what compiling or capturing has made of it.
    """

    samples_ms: tuple[float, ...]
    n_discarded: int = 0
    stop_reason: str = ""
    compile_s: float | None = None
    host_ms: float | None = None
    launch_bound: bool | None = None
    peak_alloc_mb: float | None = None
    peak_reserved_mb: float | None = None
    workspace_mb: float | None = None
    flush_mb: float = 0.0
    sm_clock_mhz: float | None = None
    temp_c: float | None = None
    power_w: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    foreign_processes: int | None = None
    run: Call | None = dataclasses.field(default=None, repr=False, compare=False)

    @functools.cached_property
    def _ordered(self) -> list[float]:
        return sorted(self.samples_ms)

    @property
    def n_samples(self) -> int:
        """Kept samples."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Middle of the samples."""
        return quantile(self._ordered, 0.5)

    @property
    def ci_lo_ms(self) -> float:
        """Lower end of the distribution-free 95 % interval of the median."""
        return median_interval(self._ordered)[0]

    @property
    def ci_hi_ms(self) -> float:
        """Upper end of the distribution-free 95 % interval of the median."""
        return median_interval(self._ordered)[1]

    @property
    def p10_ms(self) -> float:
        """A tenth of the samples are faster."""
        return quantile(self._ordered, 0.1)

    @property
    def p90_ms(self) -> float:
        """A tenth of the samples are slower."""
        return quantile(self._ordered, 0.9)

    @property
    def min_ms(self) -> float:
        """The fastest sample."""
        return self._ordered[0]

    @property
    def noise_pct(self) -> float | None:
        """Half the interval of the median in percent of it; None when one sample is all there is."""
        noise = relative_noise_pct(self._ordered)
        return None if noise == float("inf") else noise

    def to_record_fields(self) -> dict[str, Any]:
        """What a `bratune.record.Record` keeps of it, by field name; raw samples travel separately."""
        shared = (
            "n_samples n_discarded median_ms ci_lo_ms ci_hi_ms p10_ms p90_ms min_ms noise_pct stop_reason "
            "compile_s host_ms launch_bound peak_alloc_mb peak_reserved_mb workspace_mb flush_mb "
            "sm_clock_mhz temp_c power_w foreign_processes"
        )
        fields: dict[str, Any] = {name: getattr(self, name) for name in shared.split()}
        return fields | {"n_processes": 1, "throttle_reasons": ",".join(self.throttle_reasons)}


class Meter(Protocol):
    """Whoever can time a call."""

    def measure(self, call: Call, settings: MeterSettings, *, before: Call | None = None) -> Measurement:
        """Time a call as the settings ask.

        Args:
            call: Runs the whole work once (forward, or forward and backward), without waiting for the
                device; called many times.
            settings: How long, how often, in which regime.
            before: Run ahead of every sample and not timed: what precedes the call where it is used, so
                that caches hold what they hold there. A cold cache is flushed after it.

        Raises:
            MeasureError: the regime is not possible with this call or device.
        """
        ...


@dataclass
class _Window:
    """Samples between two readings of the sensors."""

    samples: list[Sample]
    after: Reading


class DeviceMeter:
    """The sampling loop, over any `Device`.

    Prepare for the regime, warm up by time, read memory from one untimed call, then sample in windows of
    about 50 ms until `StopRule` says why to stop. Windows in which the device was throttled are discarded
    and followed by a pause; if no other window is left, they are kept and the stop reason says so.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def measure(self, call: Call, settings: MeterSettings, *, before: Call | None = None) -> Measurement:
        """See `Meter.measure`."""
        device = self.device
        prepared = device.prepare(call, settings.regime)
        self._warm_up(prepared.run, settings.warmup_s)
        memory = device.memory(prepared.probe)
        foreign = device.foreign_processes()
        kept, throttled, reason = self._sample(prepared.run, settings, before)
        foreign_after = device.foreign_processes()
        if not kept:
            kept, throttled, reason = throttled, [], f"{reason}; every sample was throttled, all kept"
        if settings.l2 == "cold" and not device.flush_bytes:
            reason += "; the last-level cache is unknown and was not flushed"
        found = _summarise(
            kept,
            throttled,
            reason=reason,
            prepare_s=prepared.prepare_s,
            memory=memory,
            floor_ms=device.launch_floor_ms,
            flush_bytes=device.flush_bytes if settings.l2 == "cold" else 0,
            foreign=max((n for n in (foreign, foreign_after) if n is not None), default=None),
        )
        return dataclasses.replace(found, run=prepared.run)

    def _warm_up(self, run: Call, seconds: float) -> None:
        end = self.device.now() + seconds
        self.device.time(run)
        while self.device.now() < end:
            self.device.time(run)

    def _sample(
        self, run: Call, settings: MeterSettings, before: Call | None
    ) -> tuple[list[_Window], list[_Window], str]:
        """Kept windows, throttled windows and the reason to stop."""
        kept: list[_Window] = []
        throttled: list[_Window] = []
        rule = StopRule(settings)
        start = self.device.now()
        pause = _FIRST_PAUSE_S
        while True:
            window, reason = self._window(run, settings, before, rule, start)
            if not window.after.throttled:
                kept.append(window)
            else:
                throttled.append(window)
                rule.withdraw(sample.device_ms for sample in window.samples)
                elapsed = self.device.now() - start
                reason = rule.reason(elapsed)
                if not reason:
                    self.device.sleep(min(pause, max(0.0, settings.timeout_s - elapsed)))
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
            if reason:
                return kept, throttled, reason

    def _window(
        self, run: Call, settings: MeterSettings, before: Call | None, rule: StopRule, start: float
    ) -> tuple[_Window, str]:
        """Samples of at least one call and about 50 ms, then one reading of the sensors."""
        device = self.device
        samples: list[Sample] = []
        end = device.now() + _WINDOW_S
        reason = ""
        while not reason and (not samples or device.now() < end):
            if before is not None:
                before()
            if settings.l2 == "cold":
                device.flush()
            sample = device.time(run)
            samples.append(sample)
            rule.add(sample.device_ms)
            reason = rule.reason(device.now() - start)
        return _Window(samples, device.read()), reason


def _summarise(
    kept: Sequence[_Window],
    throttled: Sequence[_Window],
    *,
    reason: str,
    prepare_s: float | None,
    memory: Memory,
    floor_ms: float | None,
    flush_bytes: int,
    foreign: int | None,
) -> Measurement:
    samples = [sample for window in kept for sample in window.samples]
    readings = [window.after for window in kept]
    host = [sample.host_ms for sample in samples if sample.host_ms is not None]
    host_ms = median(host) if host else None
    device_ms = median([sample.device_ms for sample in samples])
    clocks = [r.sm_clock_mhz for r in readings if r.sm_clock_mhz is not None]
    temps = [r.temp_c for r in readings if r.temp_c is not None]
    powers = [r.power_w for r in readings if r.power_w is not None]
    everywhere = {name for window in (*kept, *throttled) for name in window.after.throttle_reasons}
    return Measurement(
        samples_ms=tuple(sample.device_ms for sample in samples),
        n_discarded=sum(len(window.samples) for window in throttled),
        stop_reason=reason,
        compile_s=prepare_s,
        host_ms=host_ms,
        launch_bound=_launch_bound(host_ms, device_ms, floor_ms),
        **dataclasses.asdict(memory),
        flush_mb=flush_bytes / 1e6,
        sm_clock_mhz=median(clocks) if clocks else None,
        temp_c=max(temps, default=None),
        power_w=means.fmean(powers) if powers else None,
        throttle_reasons=tuple(sorted(everywhere)),
        foreign_processes=foreign,
    )


def _launch_bound(host_ms: float | None, device_ms: float, floor_ms: float | None) -> bool | None:
    """Whether the device waits for the host.

    A sample begins on an idle device, so its device time is never less than the host's plus the latency of
    the last kernel. That latency is what the smallest call takes (``floor_ms``): a device that needs
    no longer than it after the host is done was waiting all along.
    """
    if host_ms is None:
        return None
    return host_ms >= device_ms - (floor_ms or 0.0)


def meter_for(machine: Machine) -> Meter:
    """The meter of a machine: CUDA events on a GPU, the wall clock on a CPU.

    Raises:
        MeasureError: the device of the machine cannot be used in this process.
    """
    return DeviceMeter(device_for(machine))


def device_for(machine: Machine) -> Device:
    """What takes single times on a machine; see `meter_for`."""
    if machine.is_cuda:
        from bratune.measure.cuda import CudaDevice

        return CudaDevice(machine)
    from bratune.measure.cpu import CpuDevice

    return CpuDevice(machine)
